"""`agentspeed replay` over what real engine processes leave: after an orderly end, a kill, a crash, a long life."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agentspeed import Engine, errors, tool
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.serve.recording import FLIGHT, SUFFIX
from tests.support.broken_engine import BREAKS, engine_that_breaks
from tests.support.engine_client import Front, engine, environment

VOCABULARY = 90_001
OPTIONS: dict[str, Any] = {
    "model": f"noop:{VOCABULARY}:1",
    "pages": 60,
    "page_tokens": 16,
    "context_limit": 600,
    "firm_pages": 10,
    "prefill_chunk": 64,
    "host_slots": 40,
}
SECRET = 70_001
"""The first id of what is said here; the no-op model goes on counting from the last."""
CLI = "from agentspeed.cli import main; main()"
LINE = re.compile(r"^step (\d+)  t ([\d.]+)  .*digest [0-9a-f]{16}$")


def replayed(path: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + CLI, "replay", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment(),
    )


def steps_in(output: str) -> list[int]:
    return [int(found[1]) for line in output.splitlines() if (found := LINE.match(line))]


def recording(folder: Path) -> Path:
    """The one recording there."""
    (one,) = folder.glob(f"*{FLIGHT}")
    return one


def size_of(path: Path) -> int:
    return sum(segment.stat().st_size for segment in path.glob(f"*{SUFFIX}"))


def content_of(path: Path) -> bytes:
    return b"".join(segment.read_bytes() for segment in sorted(path.glob(f"*{SUFFIX}")))


def life(front: Front, first: int = SECRET) -> int:
    """A session with forks, an adoption, a rewind, a pause for a tool. The trunk stays open."""
    trunk = front.open(range(first, first + 100), tenant="acme-corp")
    _ = front.generate(trunk, max_tokens=5)
    one, other = front.fork(trunk, 2)
    _ = front.generate(one, range(first + 200, first + 240), max_tokens=5)
    _ = front.generate(other, max_tokens=5)
    assert front.adopt(trunk, one) > 0
    assert front.rewind(trunk, 77) == 77
    _ = front.ask(
        wire.Expect(request=front.number(), branch=trunk, seconds=30.0, tool="searching-the-web"), wire.LeaseAnswer
    )
    _ = front.end(other)
    return trunk


# ---- what is left of an engine -------------------------------------------------------------------------------------
def test_every_step_of_a_finished_run_is_replayed_and_equal(tmp_path: Path) -> None:
    with engine(tmp_path, **OPTIONS, record=str(tmp_path / "flights")) as process:
        front = process.connect()
        for number in range(4):
            _ = life(front, SECRET + 1000 * number)
        counts = front.counts()
        assert process.close() == 0
    path = recording(tmp_path / "flights")
    assert f"recording into {path}" in process.errors
    done = replayed(path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{OPTIONS['model']}, process {process.pid}, agentspeed ")
    assert steps_in(done.stdout) == list(range(counts["steps"]))
    assert lines[-1].startswith(f"{counts['steps']} steps replayed, ")


def test_a_step_in_the_middle_shows_branches_nodes_and_the_owner_of_every_page(tmp_path: Path) -> None:
    with engine(tmp_path, **OPTIONS, record=str(tmp_path / "flights")) as process:
        trunk = life(process.connect())
    path = recording(tmp_path / "flights")
    all_steps = replayed(path).stdout
    done = replayed(path, "--step", "8")
    assert done.returncode == 0, done.stderr
    assert steps_in(done.stdout) == [8]
    (line,) = (line for line in all_steps.splitlines() if line.startswith("step 8 "))
    assert line in done.stdout, "the same state, digest included"
    assert re.search(rf"^session {trunk} [0-9a-f]+  Held", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^node +parent +tokens +state +pages", done.stdout, re.MULTILINE)
    (owners,) = (line for line in done.stdout.splitlines() if line.startswith("pages: "))
    assert sum(map(int, re.findall(r"\d+", owners))) == OPTIONS["pages"]


def test_an_engine_killed_in_the_middle_of_a_turn_leaves_every_step_that_a_client_saw(tmp_path: Path) -> None:
    with engine(tmp_path, **OPTIONS, record=str(tmp_path / "flights")) as process:
        front = process.connect()
        _ = life(front)
        turn = front.start(front.open(range(SECRET, SECRET + 50)), max_tokens=500)
        while len(turn.ids) <= 30:
            front.step()
        seen = front.counts()["steps"]
        _ = process.kill()
    done = replayed(recording(tmp_path / "flights"))
    assert done.returncode == 0 and "its engine was killed" in done.stderr
    assert len(steps_in(done.stdout)) >= seen
    assert "decoding 1" in done.stdout.splitlines()[-2]


def test_a_crash_leaves_a_recording_that_it_names_and_that_breaks_at_the_same_step(tmp_path: Path) -> None:
    flights = tmp_path / "flights"
    broken = engine_that_breaks(tmp_path, BREAKS, OPTIONS | {"record": str(flights)})
    assert broken.status == 70
    path = recording(flights)
    assert isinstance(broken.last, wire.Failed) and broken.last.code == "internal"
    assert f"agentspeed replay {path}" in broken.last.remedy and f"agentspeed replay {path}" in broken.said
    again = replayed(path, before=BREAKS)
    assert again.returncode == 0 and steps_in(again.stdout) == list(range(20))
    assert "BrokenInvariant: a rule that step 20 breaks: the replayed core breaks at the same input" in again.stdout
    cured = replayed(path)
    assert cured.returncode == 0 and "which replays without it" in cured.stdout


def test_a_core_that_decides_otherwise_is_named_by_step_and_field_with_status_1(tmp_path: Path) -> None:
    with engine(tmp_path, **OPTIONS, record=str(tmp_path / "flights")) as process:
        _ = life(process.connect())
    changed = """
from agentspeed_engine.kv.pool import Pool
honest = Pool.take
Pool.take = lambda pool, count: honest(pool, count)[::-1]
"""
    done = replayed(recording(tmp_path / "flights"), before=changed)
    assert done.returncode == 1
    assert re.fullmatch(r"The replay differs at step \d+ in [a-z ]+: recorded \w+, replayed \w+\.\n", done.stderr)


# ---- what is in it -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [False, True])
def test_ids_and_names_are_in_a_recording_only_when_asked_for(tmp_path: Path, content: bool) -> None:
    with engine(tmp_path, **OPTIONS, record=str(tmp_path / "flights"), record_content=content) as process:
        _ = life(process.connect())
    data = content_of(recording(tmp_path / "flights"))
    words = (b"acme-corp", b"searching-the-web", pack_ids([SECRET, SECRET + 1]), pack_ids([SECRET + 99, SECRET + 100]))
    assert [word in data for word in words] == [content] * 3 + [False]
    drawn = range(SECRET + 100, SECRET + 105)
    assert all(pack_ids([token]) in data for token in drawn) == content
    shown = replayed(recording(tmp_path / "flights"), "--step", "8").stdout
    assert ("acme-corp" in shown) == content


def test_only_its_owner_can_read_a_recording(tmp_path: Path) -> None:
    with engine(tmp_path, **OPTIONS, record=str(tmp_path / "flights")) as process:
        _ = life(process.connect())
    path = recording(tmp_path / "flights")
    assert path.stat().st_mode & 0o077 == 0
    assert all(segment.stat().st_mode & 0o077 == 0 for segment in path.glob(f"*{SUFFIX}"))


def test_a_long_life_stays_within_record_bytes_and_its_end_is_replayed(tmp_path: Path) -> None:
    bound = 1 << 16
    options = OPTIONS | {"model": f"noop:{VOCABULARY}:0", "record": str(tmp_path / "flights"), "record_bytes": bound}
    sizes: list[int] = []
    with engine(tmp_path, **options) as process:
        front = process.connect()
        deadline = time.monotonic() + 40
        number = 0
        while not sizes or sizes[-1] * 2 < bound or len(list(tmp_path.glob("flights/*/000001*"))):
            assert time.monotonic() < deadline
            _ = front.end(life(front, SECRET + number % 1000))
            number += 1
            sizes.append(size_of(recording(tmp_path / "flights")))
        steps = front.counts()["steps"]
    assert max(sizes) <= bound
    done = replayed(recording(tmp_path / "flights"))
    assert done.returncode == 0, done.stderr
    kept = steps_in(done.stdout)
    assert kept[0] > 0 and kept == list(range(kept[0], steps))
    early = replayed(recording(tmp_path / "flights"), "--step", "0")
    assert early.returncode == 2 and f"It has steps {kept[0]} to {kept[-1]}." in early.stderr


# ---- what is no recording ------------------------------------------------------------------------------------------
@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The only segment of a recording."""
    with engine(tmp_path, **OPTIONS, record=str(tmp_path / "flights")) as process:
        front = process.connect()
        for number in range(10):
            _ = front.end(life(front, SECRET + 1000 * number))
    (segment,) = recording(tmp_path / "flights").glob(f"*{SUFFIX}")
    return segment


def test_what_is_no_recording_is_refused_by_name_with_what_to_give_instead(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(os.urandom(5000))
    (tmp_path / "nothing").touch()
    (tmp_path / "text.json").write_text("{}\n")
    for name, why in (
        ("garbage", "no recording"),
        ("nothing", "no recording"),
        ("text.json", "no recording"),
        ("missing", "no such file"),
        (".", "no segments"),
    ):
        done = replayed(tmp_path / name)
        assert done.returncode == 2 and done.stdout == ""
        assert why in done.stderr and "Give a folder that an engine wrote (option `record`)" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_folder_of_all_recordings_names_the_newest(whole: Path) -> None:
    done = replayed(whole.parent.parent)
    assert done.returncode == 2
    assert f"the newest is {whole.parent}" in done.stderr


def test_a_file_cut_off_anywhere_replays_up_to_there_or_says_that_nothing_is_whole(tmp_path: Path, whole: Path) -> None:
    data = whole.read_bytes()
    complete = steps_in(replayed(whole).stdout)
    cut = tmp_path / f"cut{FLIGHT}"
    cut.mkdir()
    ended = []
    for size in (40, len(data) // 8, len(data) // 2, len(data) - 1):
        (cut / whole.name).write_bytes(data[:size])
        done = replayed(cut)
        assert "Traceback" not in done.stderr
        if done.returncode == 0:
            steps = steps_in(done.stdout)
            assert steps == complete[: len(steps)]
            assert "breaks off in the middle of a record" in done.stderr or "without a last word" in done.stderr
            ended.append(len(steps))
        else:
            assert done.returncode == 2 and "breaks off inside of the state it begins with" in done.stderr
    assert len(ended) >= 2 and ended == sorted(ended)


def test_a_changed_byte_is_found_by_its_checksum_after_the_steps_before_it(tmp_path: Path, whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[-len(data) // 4] ^= 0xFF
    damaged = tmp_path / f"damaged{SUFFIX}"
    damaged.write_bytes(data)
    done = replayed(damaged)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is damaged at byte" in done.stderr and "can be replayed by itself" in done.stderr
    assert steps_in(done.stdout)


# ---- through the SDK -----------------------------------------------------------------------------------------------
@tool
def get_weather(city: str) -> str:
    """Get the weather for a city."""
    return f"{len(city) + 10} degrees"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("cache", ["dtype", "fp8"])
async def test_agents_with_tools_are_replayed_and_nothing_they_said_is_in_the_file(cache: Any, tmp_path: Path) -> None:
    async with Engine(record=str(tmp_path), pages=200, kv_cache_dtype=cache) as running:
        async with running.session(system="You are brief.", tools=[get_weather]) as s:
            _ = await s.run("What is the weather in Oslo?", max_tokens=64, max_turns=3)
            ids = s.ids
        stats = await running.stats()
    path = recording(tmp_path)
    done = replayed(path)
    assert done.returncode == 0, done.stderr
    assert steps_in(done.stdout) == list(range(stats.counts["steps"]))
    data = content_of(path)
    assert not any(pack_ids(pair) in data for pair in pairwise(ids))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_folder_that_cannot_be_written_is_refused_by_the_engine_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.InvalidRequest, match="Cannot record into") as refused:
        async with Engine(record=str(tmp_path / "file"), pages=200):
            pass
    assert "Give a folder of your own" in refused.value.remedy
