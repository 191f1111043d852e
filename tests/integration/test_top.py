"""`agentspeed top` against real engine processes: what it shows, whom it finds, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agentspeed_engine.protocol import messages as wire
from tests.support.engine_client import EngineProcess, Front, Refused, engine, environment, until
from tests.support.terminal import Terminal, terminal

OPTIONS: dict[str, Any] = {
    "model": "noop:512:4",
    "pages": 40,
    "page_tokens": 16,
    "context_limit": 400,
    "firm_pages": 10,
    "check_every_step": True,
}
SLOW = "noop:512:250"
COMMAND = [sys.executable, "-c", "from agentspeed.cli import main; main()", "top"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of this test alone."""
    monkeypatch.setenv("AGENTSPEED_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("AGENTSPEED_ENGINE", raising=False)
    return tmp_path / "run"


@pytest.fixture
def running(tmp_path: Path, place: Path) -> Iterator[EngineProcess]:
    with engine(tmp_path, **OPTIONS) as process:
        yield process


@pytest.fixture
def slow(tmp_path: Path, place: Path) -> Iterator[EngineProcess]:
    """A turn of 90 tokens runs for 22 seconds, and needs no page more in the first nine: longer than any machine takes
    to start the command."""
    with engine(tmp_path, **OPTIONS | {"model": SLOW}) as process:
        yield process


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment() | {"COLUMNS": "100"},
    )


def shown(*arguments: str) -> dict[str, Any]:
    """The one engine of `top --once --json`."""
    done = top("--once", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["engines"]
    assert isinstance(one, dict)
    return one


def busy(front: Front) -> dict[str, int]:
    """Sessions with a fork, a firm lease, a running turn, and one that waits for its room."""
    trunk = front.open(range(100), tenant="acme")
    _ = front.generate(trunk, max_tokens=1)
    child, _ = front.fork(trunk, 2)
    (grandchild,) = front.fork(child, 1)
    lease = front.ask(
        wire.Expect(request=front.number(), branch=trunk, seconds=60.0, keep="firm", tool="search"), wire.LeaseAnswer
    ).lease
    assert lease.keep == "firm", lease
    runs = front.open(range(200, 500))
    _ = front.start(runs, max_tokens=90)
    until("the first turn runs", lambda: front.inspect(runs).state == "Decoding")
    waits = front.open(range(300))
    _ = front.start(waits, max_tokens=90)
    return {"trunk": trunk, "child": child, "grandchild": grandchild, "runs": runs, "waits": waits}


def busy_for_long(front: Front) -> dict[str, int]:
    """The same, once the scheduler has seen why the last turn waits."""
    names = busy(front)
    until("the turn waits for a lease", lambda: front.inspect(names["waits"]).waiting_for == "firm leases")
    return names


def test_sessions_forks_a_lease_and_a_waiting_turn_are_seen(slow: EngineProcess) -> None:
    names = busy_for_long(slow.connect())
    seen = shown()
    assert (seen["pid"], seen["model"]) == (slow.pid, SLOW)
    branches = {one["branch"]: one for session in seen["sessions"] for one in session["branches"]}
    assert branches[names["child"]]["parent"] == names["trunk"]
    assert branches[names["grandchild"]]["parent"] == names["child"]
    assert branches[names["trunk"]]["lease"]["keep"] == "firm" and branches[names["trunk"]]["tool"] == "search"
    assert branches[names["runs"]]["state"] == "Decoding" and branches[names["runs"]]["tail_pages"] >= 1
    assert (branches[names["waits"]]["state"], branches[names["waits"]]["waiting_for"]) == ("Queued", "firm leases")
    assert [session["tenant"] for session in seen["sessions"]] == ["acme", "", ""]
    assert sum(seen["pages"].values()) == OPTIONS["pages"]
    for one in branches.values():
        assert sum(one["places"].values()) == one["known"]


def test_a_frame_for_people_names_the_same_within_100_columns(slow: EngineProcess) -> None:
    names = busy_for_long(slow.connect())
    done = top("--once")
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    for words in (
        f"process {slow.pid}",
        "session 1 acme",
        "for search",
        "firm 5",
        "waits for firm leases",
        f"queue, oldest first: {names['waits']}",
    ):
        assert words in done.stdout, done.stdout


def test_of_many_branches_the_busy_ones_are_shown_and_the_rest_counted(slow: EngineProcess) -> None:
    front = slow.connect()
    _ = front.fork(front.open([1, 2, 3]), 50)
    draws = front.open([4, 5])
    turn = front.start(draws, max_tokens=300)
    until("the turn draws", lambda: front.inspect(draws).state == "Decoding")
    done = top("--once", "--branches", "5")
    assert "+ 47 more" in done.stdout and "Decoding" in done.stdout
    assert turn.ended is None


def test_a_watcher_owns_nothing_and_closes_nothing(running: EngineProcess) -> None:
    front = running.connect()
    branch = front.open([1, 2, 3])
    for _ in range(3):
        _ = shown()
    assert front.inspect(branch).state == "Held"
    counts = front.counts()
    assert (counts["sessions"], counts["branches"]) == (1, 1)
    until("the watchers' links are gone", lambda: front.counts()["links"] == 1)


def test_who_asks_without_reading_gets_one_picture_and_refusals(running: EngineProcess) -> None:
    front = running.connect()
    _ = front.open([1, 2, 3])
    asked = [wire.Look(request=front.number()) for _ in range(20)]
    front.send(*asked)
    pictures = refused = 0
    for look in asked:
        try:
            _ = front.answer(look.request, wire.Picture)
            pictures += 1
        except Refused as error:
            assert error.code == "overloaded" and error.failed.retryable
            refused += 1
    assert pictures >= 1 and pictures + refused == 20
    assert front.ask(wire.Look(request=front.number()), wire.Picture).counts["branches"] == 1


def test_a_terminal_that_has_ascii_alone_gets_a_frame_drawn_in_it(slow: EngineProcess) -> None:
    names = busy(slow.connect())
    done = subprocess.run(
        [*COMMAND, "--once"],
        capture_output=True,
        timeout=50,
        check=False,
        env=environment() | {"COLUMNS": "100", "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode("ascii")
    assert "40 pages ####" in shown and f"| {names['child']} " in shown and "?" not in shown


def test_without_an_engine_it_says_so_and_ends_with_status_2(place: Path) -> None:
    for arguments in ((), ("--once",), ("--once", "--json")):
        done = top(*arguments)
        assert done.returncode == 2
        assert "No engine of yours is running" in done.stderr and "Start one" in done.stderr
        assert done.stdout == ""


def test_a_socket_nobody_listens_at_is_named(tmp_path: Path, place: Path) -> None:
    done = top("--once", str(tmp_path / "none.sock"))
    assert done.returncode == 2
    assert "none.sock" in done.stderr and "AGENTSPEED_ENGINE" not in done.stderr


def test_every_engine_of_the_user_is_found_and_killed_ones_are_forgotten(tmp_path: Path, place: Path) -> None:
    with engine(tmp_path / "a", **OPTIONS) as first, engine(tmp_path / "b", **OPTIONS) as second:
        both = json.loads(top("--once", "--json").stdout)["engines"]
        assert {one["pid"] for one in both} == {first.pid, second.pid}
        assert shown(str(second.path))["pid"] == second.pid
        _ = first.kill()
        assert shown()["pid"] == second.pid
        assert len(list(place.glob("*.json"))) == 1
    assert list(place.iterdir()) == []


def test_the_engine_it_is_told_to_attach_to_is_found_too(
    running: EngineProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTSPEED_RUNTIME_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("AGENTSPEED_ENGINE", str(running.path))
    assert shown()["pid"] == running.pid
    monkeypatch.setenv("AGENTSPEED_ENGINE", str(tmp_path / "none.sock"))
    assert "unset AGENTSPEED_ENGINE" in top("--once").stderr


def test_an_engine_killed_while_it_is_watched_ends_the_watch_with_status_3(running: EngineProcess) -> None:
    with subprocess.Popen(
        [*COMMAND, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as watch:
        assert watch.stdout is not None and watch.stderr is not None
        assert json.loads(watch.stdout.readline())["engines"][0]["pid"] == running.pid
        _ = running.kill()
        said = watch.stderr.read()
        assert watch.wait(20) == 3
    assert f"process {running.pid}" in said and "ended" in said
    assert "Traceback" not in said


@contextmanager
def stopped(process: EngineProcess) -> Iterator[None]:
    """It hangs, and lives."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


@contextmanager
def watched(*arguments: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """What `top --json` writes, frame by frame."""
    with subprocess.Popen(
        [*COMMAND, "--json", *arguments], stdout=subprocess.PIPE, text=True, env=environment()
    ) as watch:
        lines = watch.stdout
        assert lines is not None
        yield lambda: json.loads(lines.readline())
        assert watch.poll() is None
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) == 0


def test_an_engine_that_does_not_answer_at_the_start_is_named(running: EngineProcess) -> None:
    with stopped(running):
        done = top("--once", str(running.path))
    assert done.returncode == 2
    assert f"{running.path} has not answered for 5 s" in done.stderr


def test_an_engine_that_hangs_keeps_its_last_picture_and_neither_ends_nor_delays_the_watch(
    tmp_path: Path, place: Path
) -> None:
    with engine(tmp_path / "a", **OPTIONS) as hung, engine(tmp_path / "b", **OPTIONS) as well, watched() as frame:
        assert {one["silent_seconds"] for one in frame()["engines"]} == {0.0}
        with stopped(hung):
            _ = frame()
            clocks: dict[int, list[float]] = {hung.pid: [], well.pid: []}
            silent = 0.0
            for _ in range(4):
                for one in frame()["engines"]:
                    clocks[one["pid"]].append(one["clock"])
                    silent = max(silent, one["silent_seconds"])
        assert len(set(clocks[hung.pid][2:])) == 1 and silent > 2.0
        assert len(clocks[well.pid]) == 4
        assert max(later - earlier for earlier, later in pairwise(clocks[well.pid])) < 2.5
        after = [one for _ in range(4) for one in frame()["engines"] if one["pid"] == hung.pid]
        assert after[-1]["silent_seconds"] == 0.0 and after[-1]["clock"] > clocks[hung.pid][-1]


def test_a_watch_of_one_engine_alone_outlives_its_hanging(running: EngineProcess) -> None:
    with watched(str(running.path)) as frame:
        _ = frame()
        with stopped(running):
            while (one := frame()["engines"][0])["silent_seconds"] < 7.0:
                pass
        while one["silent_seconds"]:
            (one,) = frame()["engines"]
        assert one["pid"] == running.pid


def test_a_hanging_engine_that_was_never_seen_is_named_beside_the_others(tmp_path: Path, place: Path) -> None:
    with (
        engine(tmp_path / "a", **OPTIONS) as hung,
        engine(tmp_path / "b", **OPTIONS) as well,
        stopped(hung),
        watched() as frame,
    ):
        first = frame()
        assert [one["pid"] for one in first["engines"]] == [well.pid]
        while not (notes := frame()["notes"]):
            pass
        assert f"{hung.path} has not answered for " in notes[0]


def test_in_a_terminal_it_refreshes_and_ctrl_c_ends_it_cleanly(running: EngineProcess) -> None:
    front = running.connect()
    _ = front.start(front.open([1]), max_tokens=390)
    with terminal(COMMAND, environment()) as watch:
        _ = watch.until("session 1")
        _ = watch.until("tokens/s")
        watch.type(Terminal.CTRL_C)
        assert watch.end() == 0
    assert "Traceback" not in watch.seen


@contextmanager
def window(columns: int, lines: int) -> Iterator[Terminal]:
    """`top` in a terminal whose size can change."""
    sized = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")}
    watch = Terminal(COMMAND, sized | {"TERM": "xterm"})
    watch.resize(columns, lines)
    try:
        yield watch
    finally:
        watch.close()


def test_a_window_made_smaller_gets_frames_of_its_size(running: EngineProcess) -> None:
    _ = busy(running.connect())
    with window(100, 30) as watch:
        _ = watch.until("session 1")
        watch.resize(60, 10)
        frame = ""
        for _ in range(4):  # the last of these was begun after the change
            frame = watch.until("Ctrl-C ends")
        watch.type(Terminal.CTRL_C)
        assert watch.end() == 0
    lines = frame.splitlines()[1:]  # the first stands on what was left of the frame before
    assert len(lines) == 9 and all(len(line) <= 60 for line in lines), frame


def test_each_of_several_engines_has_its_part_of_a_low_window(tmp_path: Path, place: Path) -> None:
    with ExitStack() as engines:
        three = [engines.enter_context(engine(tmp_path / name, **OPTIONS)) for name in "abc"]
        for process in three:
            front = process.connect()
            _ = front.fork(front.open([1, 2, 3]), 20)
        watch = engines.enter_context(window(100, 18))
        frame = ""
        for _ in range(4):
            frame = watch.until("Ctrl-C ends")
        assert [f"process {process.pid}" in frame for process in three] == [True] * 3, frame


def test_an_engine_that_comes_back_is_watched_again(tmp_path: Path, place: Path) -> None:
    with engine(tmp_path / "other", **OPTIONS), engine(tmp_path / "same", **OPTIONS) as first, window(100, 30) as watch:
        _ = watch.until(f"process {first.pid}")
        _ = first.kill()
        _ = watch.until(f"process {first.pid}: ")
        with engine(tmp_path / "same", **OPTIONS) as second:
            _ = watch.until(f"process {second.pid}")
            os.kill(second.pid, signal.SIGSTOP)
            try:
                _ = watch.until("has not answered for 2 s")
            finally:
                os.kill(second.pid, signal.SIGCONT)
            _ = watch.until(f"process {second.pid}  ")


def test_a_terminal_that_cannot_move_its_cursor_gets_frame_after_frame(running: EngineProcess) -> None:
    watch = Terminal(COMMAND, environment() | {"TERM": "dumb", "COLUMNS": "100"})
    try:
        _ = watch.until("steps  ")
        _ = watch.until("steps/s")
        watch.type(Terminal.CTRL_C)
        assert watch.end() == 0
    finally:
        watch.close()


def test_an_engine_without_sessions_ends_after_its_idle_time_though_it_is_watched(tmp_path: Path, place: Path) -> None:
    with engine(tmp_path, **OPTIONS | {"idle_seconds": 1.5}) as process:
        front = process.connect()
        branch = front.open([1, 2])
        time.sleep(2.0)
        assert front.generate(branch, max_tokens=2).ended is not None  # a session at rest keeps it
        _ = front.end(branch)
        begun = time.monotonic()
        done = subprocess.run(
            [*COMMAND, "--json"], capture_output=True, text=True, timeout=50, check=False, env=environment()
        )
        assert done.returncode == 3
        assert "idle_seconds" in done.stderr
        assert process.wait() == 0
        assert 0.5 < time.monotonic() - begun < 15
    assert list(place.iterdir()) == []
