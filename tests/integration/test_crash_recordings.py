"""What an engine leaves that nobody told to record: nothing after an orderly end, a recording after a bad one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentspeed import Engine
from agentspeed.transport.engine_process import EngineSlot
from agentspeed_engine.serve.crashes import KEPT
from agentspeed_engine.serve.options import LEAST_BYTES
from tests.support.broken_engine import BREAKS, engine_that_breaks
from tests.support.engine_client import EngineProcess, engine, environment

CLI = "from agentspeed.cli import main; main()"
OPTIONS: dict[str, Any] = {"model": "noop:512:1", "pages": 60}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's state folder."""
    monkeypatch.setenv("AGENTSPEED_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def recordings(state: Path) -> list[Path]:
    return sorted((state / "crashes").glob("*.flight"))


def worked(process: EngineProcess) -> None:
    front = process.connect()
    _ = front.generate(front.open(range(40)), max_tokens=5)


def replay(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + CLI, "replay", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment(),
    )


def test_a_killed_engine_leaves_a_recording_and_replay_lists_it(tmp_path: Path, state: Path) -> None:
    with engine(tmp_path, **OPTIONS) as process:
        worked(process)
        (path,) = recordings(state)
        assert replay().stdout == "No engine of yours has left a recording: none ended badly.\n", "it still lives"
        _ = process.kill()
    assert process.errors == "", "who did not ask for it is not told of it"
    (line,) = replay().stdout.splitlines()
    assert line.startswith(f"{path}  {OPTIONS['model']}, process {process.pid}, agentspeed ")
    done = replay(str(path))
    assert done.returncode == 0 and "steps replayed" in done.stdout


def test_an_engine_that_a_bug_of_its_own_stopped_leaves_the_recording_it_names(tmp_path: Path, state: Path) -> None:
    broken = engine_that_breaks(tmp_path, BREAKS, OPTIONS)
    assert broken.status == 70
    (path,) = recordings(state)
    assert f"agentspeed replay {path}" in broken.said
    (line,) = replay().stdout.splitlines()
    assert line.startswith(f"{path}  ")
    again = replay(str(path), before=BREAKS)
    assert again.returncode == 0
    assert "BrokenInvariant: a rule that step 20 breaks: the replayed core breaks at the same input" in again.stdout


def test_an_engine_that_ends_in_order_leaves_nothing(tmp_path: Path, state: Path) -> None:
    with engine(tmp_path, **OPTIONS) as process:
        worked(process)
        assert len(recordings(state)) == 1
        assert process.close() == 0
    assert recordings(state) == []


def test_only_the_newest_recordings_of_dead_engines_stay_and_those_of_the_living(tmp_path: Path, state: Path) -> None:
    with engine(tmp_path, **OPTIONS) as living:
        worked(living)
        (own,) = recordings(state)
        dead: list[Path] = []
        for _ in range(KEPT + 2):
            (tmp_path / "other").mkdir(exist_ok=True)
            with engine(tmp_path / "other", **OPTIONS) as process:
                (new,) = set(recordings(state)) - {own, *dead}
                _ = process.kill()
            dead.append(new)
        assert set(recordings(state)) == {own, *dead[-KEPT - 1 :]}, "the last of them has not been cleared up for"


def test_nothing_is_recorded_when_that_is_asked_for(tmp_path: Path, state: Path) -> None:
    with engine(tmp_path, **OPTIONS, record="off") as process:
        worked(process)
        _ = process.kill()
    assert not state.exists()


@pytest.mark.parametrize("wrong", ["a file where the folder should be", "a bound too small for the pool"])
def test_an_engine_that_cannot_record_serves_all_the_same_and_says_so(tmp_path: Path, state: Path, wrong: str) -> None:
    options = OPTIONS
    if wrong.startswith("a file"):
        state.touch()
    else:
        options = OPTIONS | {"pages": 60_000, "record_bytes": LEAST_BYTES}
    with engine(tmp_path, **options) as process:
        worked(process)
        assert process.close() == 0
    assert "a crash of this engine will leave no recording: " in process.errors
    assert not state.is_dir() or recordings(state) == []


def test_a_step_without_a_recording_is_refused_with_the_command_that_lists_them(state: Path) -> None:
    done = replay("--step", "3")
    assert done.returncode == 2 and "`agentspeed replay` lists them" in done.stderr


@pytest.mark.anyio
async def test_who_goes_on_after_a_death_is_told_how_the_engine_died_and_where_to_look(
    state: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Engine.over(EngineSlot({"model": "noop:512:1", "pages": 256}), checkpoint) as e, e.session() as s:
        _ = await s.generate("One.", max_tokens=3)
        assert e.pid is not None
        killed = e.pid
        os.kill(killed, signal.SIGKILL)
        with caplog.at_level(logging.WARNING, logger="agentspeed.engine"):
            _ = await s.generate("Two.", max_tokens=3)
        (path, _) = recordings(state)
    assert [record.getMessage() for record in caplog.records if record.name == "agentspeed.engine"] == [
        f"The engine process {killed} was killed by signal 9; sessions go on in a new one. "
        f"What its scheduler did until then: agentspeed replay {path}"
    ]
