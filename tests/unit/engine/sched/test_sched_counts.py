"""What `GetStats` answers: the counts that a walk over everything would find, without the walk."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from agentspeed_engine.protocol import messages as wire
from tests.support.any_command import any_command
from tests.support.scheduled import Scheduled


def walked(world: Scheduled) -> dict[str, int]:
    """The same counts from every branch and every node."""
    inner = world.core.world
    states = Counter(type(state).__name__.lower() for state in inner.states.values())
    names = ("held", "queued", "promoting", "prefilling", "decoding", "settling")
    return {f"branches_{name}": states[name] for name in names} | {
        "branches": len(inner.states),
        "pages_nodes": sum(len(node.pages) for node in inner.kv.tree.nodes.values()),
    }


@pytest.mark.parametrize("seed", range(8))
def test_the_counts_are_those_of_a_walk_over_everything(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    world = Scheduled(pages=12, host_slots=seed % 3 * 8, max_sessions=6, max_branches=8)
    ledger, seen = world.core.check, Counter[str]()

    def compared() -> None:
        """Wherever the ledger is checked: at rest and with a step in flight."""
        ledger()
        expected, counts = walked(world), world.core.counts(world.now)
        assert {name: counts[name] for name in expected} == expected
        seen.update(name for name, count in expected.items() if count)

    monkeypatch.setattr(world.core, "check", compared)
    for _ in range(120):
        any_command(world, chance)
        if chance.random() < 0.7:
            world.now += 0.25
            _ = world.step()
            world.settle_copies()
    assert seen["pages_nodes"] and seen["branches_held"] and seen["branches_queued"] and seen["branches_decoding"]


class Unwalked(dict):  # type: ignore[type-arg]
    """A mapping that may be asked for its length and single items, and not walked over."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        raise AssertionError("walked over")

    keys = values = items = __iter__


def test_neither_the_tree_nor_the_branches_at_rest_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Scheduled(pages=24)
    for first in (1, 30, 60):
        _ = world.turn(world.open([first] * 6), [first + 1])
    expected = walked(world)
    monkeypatch.setattr(world.core.world, "states", Unwalked(world.core.world.states))
    monkeypatch.setattr(world.core.world.kv.tree, "nodes", Unwalked(world.core.world.kv.tree.nodes))
    stats = world.send(wire.GetStats(request=1))
    assert isinstance(stats, wire.Stats)
    assert {name: stats.counts[name] for name in expected} == expected
