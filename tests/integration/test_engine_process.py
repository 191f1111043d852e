"""A real engine process: how it starts, refuses, serves several fronts, and dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import MAX_FRAME_BYTES, encode_command
from agentspeed_engine.protocol.token_ids import pack_ids
from tests.support.engine_client import EngineProcess, Front, LinkClosed, Refused, alive, engine, environment, until

NANO = Path(__file__).resolve().parents[2] / "agentspeed" / "models" / "nano"

NOOP = {"model": "noop:512:0", "pages": 200, "context_limit": 4096, "check_every_step": True}
SLOW = NOOP | {"model": "noop:512:2"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with engine(tmp_path_factory.mktemp("shared"), **SLOW) as process:
        yield process


@pytest.fixture
def running(shared: EngineProcess) -> Iterator[EngineProcess]:
    """An engine that other tests use too: every link is closed and every branch gone before the next one."""
    yield shared
    shared.disconnect()
    watcher = shared.connect()
    until("every branch is gone", lambda: watcher.counts()["branches"] == 0 and watcher.counts()["links"] == 1)
    shared.disconnect()


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine of this test alone, which may end it."""
    with engine(tmp_path, **SLOW) as process:
        yield process


def refusal(folder: Path, *arguments: str, stdin: int = subprocess.PIPE) -> tuple[int, dict[str, str]]:
    """Exit status and the one line an engine that cannot start says."""
    command = [sys.executable, "-m", "agentspeed_engine.serve", "--socket", str(folder / "e.sock"), *arguments]
    done = subprocess.run(command, stdin=stdin, capture_output=True, env=environment(), timeout=50, text=True)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    said: dict[str, str] = json.loads(line)
    return done.returncode, said


def pages_held(front: Front) -> int:
    return front.counts()["pages_tail"]


# ---- start and end ------------------------------------------------------------------------------------------------
def test_the_welcome_says_what_the_engine_is_and_its_limits(running: EngineProcess) -> None:
    welcome = running.connect().welcome
    assert (welcome.pid, welcome.pages, welcome.context_limit, welcome.vocab_size) == (running.pid, 200, 4096, 512)
    assert welcome.limits["sessions"] == 1024
    assert welcome.protocol == wire.PROTOCOL


def test_options_may_be_flags(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "agentspeed_engine.serve",
        "--socket",
        str(tmp_path / "e.sock"),
        "--model",
        "noop:64:0",
        "--pages",
        "9",
        "--page-tokens",
        "16",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and "ready" in json.loads(process.stdout.readline())
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(str(tmp_path / "e.sock"))
            welcome = Front(link).welcome
    assert (welcome.pages, welcome.page_tokens, welcome.vocab_size) == (9, 16, 64)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--options", '{"model": "noop:64:0", "pagse": 3}'], "bad_options", "pagse"),
        (["--options", "{"], "bad_options", "Expecting property name"),
        (["--model", "noop:64:0", "--pages", "many"], "bad_options", "pages"),
        (["--model", "noop:64:0", "--pages", "0"], "bad_options", "pages"),
        (["--model", "noop:64:0", "--idle-seconds", "0"], "bad_options", "idle_seconds"),
        (["--model", "noop:64"], "bad_options", "noop:VOCABULARY:MILLISECONDS"),
        (["--model", "noop:64:0", "--context-limit", "100000"], "bad_options", "context_limit"),
        (["--model", "noop:64:0", "--pages", "3", "--context-limit", "4096"], "bad_options", "L1"),
        (["--model", str(NANO), "--pages", "4000000000"], "bad_options", "Give fewer pages"),
        (["--model", "/nowhere/at/all"], "bad_config", "not a folder"),
        (["--nonsense"], "bad_options", "--nonsense"),
        (["--model", "x", "--options", "{}"], "bad_options", "Give one of the two"),
    ],
)
def test_a_wrong_start_is_one_json_line_and_exit_status_2(
    tmp_path: Path, arguments: list[str], code: str, words: str
) -> None:
    status, said = refusal(tmp_path, *arguments)
    assert status == 2
    assert said["code"] == code
    assert words in said["message"] + said["remedy"]
    assert not (tmp_path / "e.sock").exists()


def test_an_engine_does_not_start_where_its_parent_could_not_be_missed(tmp_path: Path) -> None:
    status, said = refusal(tmp_path, "--model", "noop:64:0", stdin=subprocess.DEVNULL)
    assert status == 2
    assert "--stay" in said["remedy"]


def test_a_second_engine_does_not_take_the_socket_of_a_running_one(running: EngineProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentspeed_engine.serve", "--socket", str(running.path), "--model", "noop:64:0"]
    done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, env=environment(), timeout=50)
    assert done.returncode == 2
    assert b"already listening" in done.stderr
    assert running.connect().welcome.vocab_size == 512


def test_only_its_owner_reaches_the_socket(tmp_path: Path) -> None:
    with engine(tmp_path / "own", **NOOP) as process:
        assert process.path.stat().st_mode & 0o777 == 0o600
        assert process.path.parent.stat().st_mode & 0o777 == 0o700


def test_end_of_file_on_stdin_ends_an_orphaned_engine(doomed: EngineProcess) -> None:
    front = doomed.connect()
    turn = front.start(front.open([1]), max_tokens=4000)
    assert doomed.close() == 0
    with pytest.raises(LinkClosed) as closed:
        front.finish(turn)
    assert isinstance(closed.value.last, wire.Failed) and closed.value.last.code == "engine_stopping"
    assert not doomed.path.exists()


def test_a_killed_parent_takes_the_engine_with_it(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.support.engine_client import EngineProcess
engine = EngineProcess(Path({str(tmp_path)!r}), model="noop:64:1", pages=64)
print(engine.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    until("the engine is gone", lambda: not alive(pid))


def test_sigterm_ends_it_cleanly(doomed: EngineProcess) -> None:
    os.kill(doomed.pid, signal.SIGTERM)
    assert doomed.wait() == 0
    assert doomed.errors == ""


def test_a_killed_engine_ends_its_links_and_the_ids_can_be_opened_again(tmp_path: Path) -> None:
    with engine(tmp_path, **SLOW) as process:
        front = process.connect()
        turn = front.start(front.open([7]), max_tokens=4000)
        until("some tokens came", lambda: front.step() is None and len(turn.ids) > 5)
        process.kill()
        with pytest.raises(LinkClosed):
            front.finish(turn)
        mirrored = [7, *turn.ids]
    with engine(tmp_path, **SLOW) as process:
        front = process.connect()
        again = front.generate(front.open(mirrored), max_tokens=3)
        assert again.ids == [(mirrored[-1] + step) % 512 for step in (1, 2, 3)]


def test_a_bug_of_the_engine_ends_it_with_status_70_and_is_told_to_every_link(tmp_path: Path) -> None:
    script = f"""
import sys
from agentspeed_engine.serve import __main__ as start
from agentspeed_engine.exec.noop import NoopModel
def logits(self, batch):
    raise ZeroDivisionError("planted")
NoopModel.logits = logits
sys.argv = ["engine", "--socket", {str(tmp_path / "engine.sock")!r}, "--model", "noop:64:0", "--pages", "64"]
sys.exit(start.main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment() | {"AGENTSPEED_MALLOC": "as is"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "ready" in json.loads(process.stdout.readline())
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(str(tmp_path / "engine.sock"))
            front = Front(link)
            turn = front.start(front.open([1]), max_tokens=3)
            with pytest.raises(LinkClosed) as closed:
                front.finish(turn)
        assert isinstance(closed.value.last, wire.Failed) and closed.value.last.code == "internal"
        assert process.wait(20) == 70
        assert b"ZeroDivisionError: planted" in process.stderr.read()


# ---- frames -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x05\0\0\0hello", id="no msgpack"),
        pytest.param((MAX_FRAME_BYTES + 1).to_bytes(4, "little"), id="too long"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
        pytest.param(b"\x01\0\0\0\xc0", id="nil"),
        pytest.param(b"\0\0\0\0", id="empty"),
        pytest.param(b"\x0c\0\0\0\x94\xa5Hello\x01\x01\xa2\xff\xfe", id="no utf-8"),
        pytest.param(b"\x3a\x75\0\0\x95\xa5Hello\x01\x01\xa0" + b"\x91" * 30_000, id="too deep"),
    ],
)
@pytest.mark.parametrize("greet", [True, False])
def test_a_garbage_frame_ends_its_link_and_nothing_else(running: EngineProcess, garbage: bytes, greet: bool) -> None:
    other, bad = running.connect(), running.connect(greet=greet)
    if greet:
        bad.start(bad.open([1]), max_tokens=4000)
    bad.socket.sendall(garbage)
    with pytest.raises(LinkClosed) as closed:
        while True:
            bad.step()
    assert isinstance(closed.value.last, wire.Failed) and closed.value.last.code == "bad_frame"
    assert other.generate(other.open([3]), max_tokens=2).ids == [4, 5]
    until("the bad link's branch is gone", lambda: other.counts()["branches"] == 1)


def test_random_bytes_never_harm_the_engine(running: EngineProcess) -> None:
    import random

    draw = random.Random(11)
    for _ in range(40):
        bad = running.connect(greet=draw.random() < 0.5)
        bad.socket.sendall(draw.randbytes(draw.randrange(1, 200)))
        bad.close()
    front = running.connect()
    assert front.generate(front.open([3]), max_tokens=2).ids == [4, 5]
    until("the links of the others are gone", lambda: front.counts()["links"] == 1)


def test_hello_comes_first_and_in_this_protocol(running: EngineProcess) -> None:
    with pytest.raises(LinkClosed) as closed:
        running.connect(greet=False).ask(wire.GetStats(request=1), wire.Stats)
    assert isinstance(closed.value.last, wire.Failed) and "Hello" in closed.value.last.message
    with pytest.raises(Refused, match="protocol_mismatch"):
        running.connect(greet=False).ask(wire.Hello(request=1, protocol=99), wire.Welcome)


def test_a_frame_may_arrive_byte_by_byte(running: EngineProcess) -> None:
    front = running.connect()
    for byte in encode_command(wire.GetStats(request=77)):
        front.socket.sendall(bytes([byte]))
    assert front.answer(77, wire.Stats).counts["links"] == 1


# ---- fronts that come and go --------------------------------------------------------------------------------------
def test_turns_of_several_links_share_steps(running: EngineProcess) -> None:
    fronts = [running.connect() for _ in range(4)]
    before = fronts[0].counts()["steps"]
    turns = [front.start(front.open([index]), max_tokens=40) for index, front in enumerate(fronts)]
    for front, turn in zip(fronts, turns, strict=True):
        front.finish(turn)
    assert [turn.ids[:2] for turn in turns] == [[index + 1, index + 2] for index in range(4)]
    assert fronts[0].counts()["steps"] - before < 2 * 40


def test_a_link_does_not_see_the_branches_of_another(running: EngineProcess) -> None:
    mine, other = running.connect(), running.connect()
    branch = mine.open([1])
    with pytest.raises(Refused, match="branch_unknown"):
        other.generate(branch, max_tokens=1)


def test_a_dead_client_frees_everything_it_held(running: EngineProcess) -> None:
    watcher, client = running.connect(), running.connect()
    for start in range(6):
        branch = client.open(range(start * 7, start * 7 + 90))
        client.start(branch, max_tokens=4000)
        client.fork(branch, 2)
    client.close()  # in the middle of its turns
    until("its branches are gone", lambda: watcher.counts()["branches"] == 0)
    counts = watcher.counts()
    assert counts["pages_tail"] == 0 and counts["sessions"] == 0
    assert counts["pages_free"] + counts["pages_nodes"] == counts["pages_total"]


def test_cancelling_ends_the_turn_at_once_and_keeps_what_was_drawn(running: EngineProcess) -> None:
    front = running.connect()
    branch = front.open([1, 2, 3])
    turn = front.start(branch, max_tokens=4000)
    until("some tokens came", lambda: front.step() is None and len(turn.ids) > 3)
    known = front.cancel(branch)
    assert turn.ended is not None and turn.ended.reason == "cancelled"
    assert known == 3 + len(turn.ids) == turn.ended.known
    assert pages_held(front) == 0


def test_cancelling_with_a_cut_goes_back_to_before_the_call(running: EngineProcess) -> None:
    front = running.connect()
    branch = front.open([1, 2, 3])
    front.start(branch, [9, 9], max_tokens=4000)
    assert front.cancel(branch, cut=3) == 3
    assert front.generate(branch, max_tokens=1).ids == [4]


def test_a_live_fork_leaves_the_turn_running_and_the_child_at_the_same_point(running: EngineProcess) -> None:
    front = running.connect()
    branch = front.open([5])
    turn = front.start(branch, max_tokens=60)
    until("some tokens came", lambda: front.step() is None and len(turn.ids) > 3)
    (child,) = front.fork(branch)
    known = front.inspect(child).known
    front.finish(turn)
    assert turn.ids == [6 + step for step in range(60)]
    assert front.generate(child, max_tokens=2).ids == [5 + known, 6 + known]


# ---- the outbox ---------------------------------------------------------------------------------------------------
def test_a_slow_reader_stalls_nobody_and_loses_nothing(tmp_path: Path) -> None:
    options = {"model": "noop:512:0", "pages": 400, "context_limit": 8192, "outbox_bytes": 4096}
    with engine(tmp_path, **options) as process:
        slow, quick = process.connect(), process.connect()
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        turns = [
            slow.start(slow.open([index]), max_tokens=4000, sampling=wire.Sampling(logprobs=3)) for index in range(4)
        ]
        until("the engine drew them all", lambda: quick.counts()["tokens_drawn"] == 16_000, seconds=50)
        assert quick.generate(quick.open([3]), max_tokens=3).ids == [4, 5, 6]
        slow.finish(*turns)
        for index, turn in enumerate(turns):
            assert turn.ids == [(index + 1 + step) % 512 for step in range(4000)]
            assert len(turn.logprobs) == len(turn.top) == 4000
            assert turn.ended is not None and turn.ended.reason == "max_tokens"
            assert turn.frames < 4000, "deltas that wait are joined"


def test_commands_of_a_reader_that_is_far_behind_wait_in_its_own_socket(tmp_path: Path) -> None:
    with engine(tmp_path, **NOOP | {"outbox_bytes": 4096}) as process:
        flooder, quick = process.connect(), process.connect()
        count = 20_000
        frames = b"".join(encode_command(wire.GetStats(request=10 + number)) for number in range(count))
        sender = threading.Thread(target=flooder.socket.sendall, args=(frames,))
        sender.start()
        time.sleep(0.3)
        assert quick.generate(quick.open([3]), max_tokens=3).ids == [4, 5, 6]
        for number in range(count):
            flooder.answer(10 + number, wire.Stats)
        sender.join(10)
        assert not sender.is_alive()


def test_commands_are_handled_while_a_step_runs(tmp_path: Path) -> None:
    with engine(tmp_path, **NOOP | {"model": "noop:512:300"}) as process:
        front = process.connect()
        turn = front.start(front.open([1]), max_tokens=2)
        time.sleep(0.05)  # the first step is in flight for another 250 ms
        started = time.perf_counter()
        for _ in range(20):
            front.open([1, 2])
        assert time.perf_counter() - started < 0.2
        assert not turn.ids
        front.finish(turn)


def test_ids_outside_the_vocabulary_are_refused_and_the_link_stays(running: EngineProcess) -> None:
    front = running.connect()
    with pytest.raises(Refused, match="512"):
        front.open([512])
    with pytest.raises(Refused, match="uint32"):
        front.ask(wire.Open(request=front.number(), ids=b"abc"), wire.Opened)
    with pytest.raises(Refused, match="invalid_sampling"):
        front.generate(front.open([1]), sampling=wire.Sampling(temperature=-1.0))
    with pytest.raises(Refused, match="context_overflow"):
        front.ask(wire.Open(request=front.number(), ids=pack_ids([1] * 5000)), wire.Opened)
    assert front.generate(front.open([3]), max_tokens=2).ids == [4, 5]


def test_a_stop_string_without_a_tokenizer_ends_the_turn_with_the_reason(running: EngineProcess) -> None:
    front = running.connect()
    turn = front.generate(front.open([1]), max_tokens=5, stop_strings=(b"x",))
    assert turn.ended is not None and turn.ended.reason == "error"
    assert "tokenizer.json" in turn.ended.message
    assert front.generate(front.open([3]), max_tokens=2).ids == [4, 5]
