"""The smallest search, on every run: no violation within the bounds, and every mutant caught."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentspeed_engine.kv.transitions import BRANCHES, NODES
from tests.modelcheck.explorer import Bounds, explore, pairs
from tests.modelcheck.mutants import AHEAD, AHEAD_FAR, HOST, LOADED, MUTANTS, PREPARED, QUOTA, Mutant
from tests.modelcheck.successors import unlike


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(verbs=3),
        Bounds(verbs=3, depth=1),
        Bounds(verbs=3, firm_pages=1, pages=5),
        Bounds(verbs=2, setup=((1,), (2, 1, 1)), depth=1),
        Bounds(verbs=2, host_slots=4, setup=((1, 1, 1), (2, 1, 1, 1))),
        QUOTA,
        AHEAD,
        AHEAD_FAR,
        replace(PREPARED, verbs=3),
    ],
)
def test_every_state_is_sound_and_every_turn_ends(bounds: Bounds) -> None:
    found = explore(bounds)
    assert found.complete
    assert found.finding is None, str(found.finding)
    assert found.states > 100


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(verbs=3),
        Bounds(verbs=3, depth=1),
        Bounds(verbs=2, host_slots=4, setup=((1, 1, 1), (2, 1, 1, 1))),
        Bounds(
            verbs=2, pages=6, page_tokens=1, context_limit=4, tenant_pages=5, branches=3, setup=((1,), (1, 2), (2, 1))
        ),
        AHEAD,
        replace(PREPARED, verbs=3),
    ],
)
def test_worlds_that_the_search_takes_for_one_go_on_alike(bounds: Bounds) -> None:
    merged, found = unlike(bounds)
    assert merged > 100
    assert found == []


def test_the_search_comes_to_every_state_of_both_machines() -> None:
    leases = Bounds(verbs=1, firm_pages=1, pages=5, setup=((1,),))
    reached = set[str]().union(*(explore(one).reached for one in (HOST, LOADED, Bounds(verbs=3, depth=1), leases)))
    assert (set(BRANCHES) | set(NODES)) - {"Closed"} <= reached
    assert pairs() == {one for one in reached if " of a " in one}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_search_finds_the_mutant(mutant: Mutant) -> None:
    with mutant.applied():
        found = explore(mutant.bounds)
    assert found.finding is not None, f"{mutant.why}: not found in {found.states} states"
    assert found.finding.trace
