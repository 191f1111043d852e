"""The smallest search, on every run: no violation within the bounds, and every mutant caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agentspeed_engine.kv.transitions import BRANCHES, NODES
from tests.modelcheck import named_bounds
from tests.modelcheck.__main__ import main
from tests.modelcheck.explorer import Bounds, explore, pairs
from tests.modelcheck.mutants import MUTANTS, Mutant
from tests.modelcheck.packing import packed
from tests.modelcheck.split import split
from tests.modelcheck.successors import unlike


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(verbs=3),
        Bounds(verbs=3, depth=1),
        Bounds(verbs=3, firm_pages=1, pages=5),
        Bounds(verbs=2, setup=((1,), (2, 1, 1)), depth=1),
        Bounds(verbs=2, host_slots=4, setup=((1, 1, 1), (2, 1, 1, 1))),
        Bounds(verbs=3, turns_in_place=2),
        named_bounds.PLACES_OF_FORKS,
        named_bounds.QUOTA,
        named_bounds.AHEAD,
        named_bounds.AHEAD_FAR,
        replace(named_bounds.PREPARED, verbs=3),
        named_bounds.SPOILT,
        named_bounds.SPOILT_LOADED,
        named_bounds.SPOILT_SAVED,
        named_bounds.SPOILT_SHARED,
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
        named_bounds.AHEAD,
        Bounds(verbs=3, turns_in_place=2),
        replace(named_bounds.PREPARED, verbs=3),
        named_bounds.SPOILT,
        named_bounds.SPOILT_SAVED,
    ],
)
def test_worlds_that_the_search_takes_for_one_go_on_alike(bounds: Bounds) -> None:
    merged, found = unlike(bounds)
    assert merged > 100
    assert found == []


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(verbs=3, depth=1),
        named_bounds.HOST,
        named_bounds.AHEAD,
        replace(named_bounds.PREPARED, verbs=3),
        named_bounds.SPOILT,
    ],
)
def test_a_search_that_is_split_over_processes_finds_the_same(bounds: Bounds) -> None:
    assert explore(bounds, expanding=split(bounds, 2, few=64), kept=packed) == explore(bounds)


def test_a_search_that_is_split_finds_a_fault_by_the_same_history() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "preempt-anyone")
    with mutant.applied():
        beside = explore(mutant.bounds, expanding=split(mutant.bounds, 2, few=16), kept=packed)
        assert beside == explore(mutant.bounds)
    assert beside.finding is not None


def test_what_a_run_wrote_down_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ended.json"
    asked = ["--only", "branches=3 verbs=3;held-with-rows", "--json", str(file)]
    assert main(asked) == 0
    first = capsys.readouterr().out
    assert "476 states        996 transitions  complete" in first
    assert "1 of 1 mutants caught" in first
    assert main([*asked, "--skip-done", str(file)]) == 0
    again = capsys.readouterr().out
    assert "complete" not in again  # nothing ended, for nothing was begun
    assert "476 states (1 of 8 searches)" in again
    assert "1 of 1 mutants caught" in again


def test_the_search_comes_to_every_state_of_both_machines() -> None:
    leases = Bounds(verbs=1, firm_pages=1, pages=5, setup=((1,),))
    reached = set[str]().union(
        *(explore(one).reached for one in (named_bounds.HOST, named_bounds.LOADED, Bounds(verbs=3, depth=1), leases))
    )
    assert (set(BRANCHES) | set(NODES)) - {"Closed"} <= reached
    assert pairs() == {one for one in reached if " of a " in one}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_search_finds_the_mutant(mutant: Mutant) -> None:
    with mutant.applied():
        found = explore(mutant.bounds)
    assert found.finding is not None, f"{mutant.why}: not found in {found.states} states"
    assert found.finding.trace
