"""The recorded runs of the repository replay to the digests they were recorded with: no refactor changes a decision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentspeed_engine.kv.pool import Pool
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.digest import digests
from agentspeed_engine.sched.redaction import Clear
from agentspeed_engine.sched.state_codec import packed, unpacked
from agentspeed_engine.serve.replay import ReplayDiffers
from tests.support.recorded_corpus import DIGESTS, FOLDER, KIND, replayed
from tests.support.recorded_run import RecordedRun

RECORDED: dict[str, dict[str, Any]] = json.loads(DIGESTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_run_replays_to_the_digests_it_was_recorded_with(name: str) -> None:
    found = replayed(FOLDER / f"{name}{KIND}")
    recorded = RECORDED[name]
    assert (found.steps, found.compared) == (recorded["steps"], recorded["compared"])
    ended = {part: found.end.get(part) for part in recorded["end"]}  # there may be parts that were not known then
    assert len(ended) >= 14 and ended == recorded["end"]
    assert found.compared == found.steps > 0


def test_the_corpus_is_small_and_complete() -> None:
    files = sorted(FOLDER.glob(f"*{KIND}"))
    assert {path.name.removesuffix(KIND) for path in files} == set(RECORDED)
    assert sum(path.stat().st_size for path in files) <= 1 << 20
    assert sum(run["steps"] for run in RECORDED.values()) > 4000


def test_a_scheduler_that_decides_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Pool.take
    monkeypatch.setattr(Pool, "take", lambda pool, count: honest(pool, count)[::-1])
    with pytest.raises(ReplayDiffers):
        _ = replayed(FOLDER / f"scripted{KIND}")


def test_classes_may_be_renamed_and_recordings_stay_readable(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path, host_slots=30)
    run.life(4)
    run.tape.close()
    before, state = digests(run.inner.world), packed(run.inner.world, Clear())
    kinds = {type(one): type(one).__name__ for one in _everything(run.inner)}
    try:
        for number, kind in enumerate(kinds):
            kind.__name__ = f"Renamed{number}"
        assert digests(run.inner.world) == before
        assert packed(run.inner.world, Clear()) == state
        assert digests(unpacked(state, run.inner.config)) == before
    finally:
        for kind, name in kinds.items():
            kind.__name__ = name
    assert len(kinds) > 9 and digests(Core(run.inner.config).world) != before


def _everything(core: Core) -> list[Any]:
    """The objects of a state that a recording has a tag for."""
    world = core.world
    tree = world.kv.tree
    nodes = list(tree.nodes.values())
    found = [
        world,
        world.kv,
        tree,
        world.kv.pages,
        *world.states.values(),
        *world.kv.branches.values(),
        *nodes,
        *(node.state for node in nodes),
        *world.sessions.values(),
        world.law,
        *world.leases.values(),
        *(branch.log for branch in world.kv.branches.values()),
    ]
    return [one for one in found if type(one).__module__.startswith("agentspeed_engine.")]
