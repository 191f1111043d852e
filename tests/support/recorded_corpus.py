"""Recorded runs that are kept in the repository, and the digests they replay to: the gate of every refactor.

`python -m tests.support.recorded_corpus` records the runs that are not there yet. To record one anew its file is
deleted first, which is right only after a change that is meant to change what the scheduler decides.

A run is an xz file of the frames of a recording (`sched.recorder`) without the state it begins with, for that is an
empty scheduler: so it names no class and no field of the scheduler's state, and outlives their renaming. What it names
are the tags of records and wire commands and the fields of `CoreConfig`.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.digest import PARTS, digests
from agentspeed_engine.sched.recorder import (
    FRAME_HEAD,
    SUFFIX,
    Ended,
    Header,
    RecordedCore,
    decode_header,
    frame,
    opening,
)
from agentspeed_engine.sched.redaction import Clear, Veil
from agentspeed_engine.sched.state import SchedulerState
from agentspeed_engine.sched.state_codec import packed
from agentspeed_engine.serve.replay import Replay
from agentspeed_engine.serve.stand_ins import Opaque
from tests.simulation.checkers import Sight
from tests.simulation.workload import load, names
from tests.simulation.world import Simulation
from tests.support.recorded_run import RecordedRun

FOLDER: Final = Path(__file__).parents[1] / "data" / "recorded"
DIGESTS: Final = FOLDER / "digests.json"
KIND: Final = ".xz"


@final
@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of one run."""

    steps: int
    compared: int
    """Digests that were recorded and found equal."""
    end: dict[str, str]
    """Digests of the parts of the state at the end, by their names."""


def replayed(path: Path) -> Replayed:
    """Runs one file through the scheduler. Raises `ReplayDiffers` at the first step whose digest is another."""
    with tempfile.TemporaryDirectory(prefix="agentspeed-corpus-") as folder:
        segment = Path(folder) / f"000001{SUFFIX}"
        _ = segment.write_bytes(_with_state(lzma.decompress(path.read_bytes())))
        replay = Replay(segment)
        steps = sum(1 for _ in replay.steps())
    assert (replay.notes, replay.broke) == ([], "")
    replay.core.check()
    parts = zip(PARTS, digests(replay.core.world), strict=True)
    return Replayed(steps, replay.compared, {name: part.hex() for name, part in parts})


def _with_state(data: bytes) -> bytes:
    """The segment: the state of an empty scheduler goes between the header and the records."""
    end = FRAME_HEAD + int.from_bytes(data[:4], "little")
    header = decode_header(data[FRAME_HEAD:end])
    return opening(header) + frame(packed(SchedulerState(header.config), Clear())) + data[end:]


# ---- recording ------------------------------------------------------------------------------------------------------
def runs() -> Iterator[tuple[str, bytes]]:
    """Every workload of the simulator at the depth it asks for and at depth 0, and scripted lives."""
    for name in names():
        workload = load(name)
        for depth in sorted({0, workload.engine.depth}):
            engine = dataclasses.replace(
                workload.engine, depth=depth, decode_ahead=workload.engine.decode_ahead and depth > 0
            )
            lives = _Lives(Clear())
            outcome = Simulation(
                dataclasses.replace(workload, engine=engine), 0, sight=Sight.USER, recorded=lives.begin
            ).run()
            if outcome.violation is not None:
                raise AssertionError(str(outcome))
            for number, life in enumerate(lives.cores):
                yield f"{name}-depth{depth}{f'-life{number}' if number else ''}", _recording(life)
    limits: tuple[tuple[str, dict[str, Any]], ...] = (
        ("scripted", {}),
        ("scripted-host", {"host_slots": 30}),
        ("scripted-stand-ins", {"host_slots": 30}),
    )
    for name, config in limits:
        with tempfile.TemporaryDirectory(prefix="agentspeed-corpus-") as folder:
            run = RecordedRun(Path(folder), **config)
            run.tape.close()
        core = RecordedCore(run.inner, Opaque() if "stand-ins" in name else Clear(), every=1)
        run.core = core
        run.life(6)
        yield name, _recording(core)


@final
class _Lives:
    """The recorded cores of one simulated run: a new one for every engine that was started."""

    def __init__(self, veil: Veil) -> None:
        self.cores: list[RecordedCore] = []
        self._veil = veil

    def begin(self, core: Core) -> RecordedCore:
        self.cores.append(RecordedCore(core, self._veil, every=1))
        return self.cores[-1]


def _recording(core: RecordedCore) -> bytes:
    header = Header(
        engine="corpus", model="", pid=0, started=0.0, began=0.0, segment=1, content=True, config=core.replayed_config()
    )
    return frame(header) + frame([*core.taken(), Ended()])  # the simulator empties the scheduler when all is over


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    recorded: dict[str, Any] = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    for name, data in runs():
        path = FOLDER / f"{name}{KIND}"
        if path.exists():
            continue
        _ = path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        recorded[name] = dataclasses.asdict(replayed(path))
        print(f"{name:40} {path.stat().st_size:7} bytes  {recorded[name]}", flush=True)
    _ = DIGESTS.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
