"""`bench/deadlock_race.py` reports what happens, also when it is bad."""

from __future__ import annotations

import pytest

from bench.deadlock_race import SHAPES, race
from tests.simulation.mutants import with_leases_that_are_never_broken


@pytest.mark.parametrize("shape", SHAPES)
def test_parents_that_wait_wedge_nothing_leak_nothing_and_break_no_promise(shape: str) -> None:
    found = race(shape, range(3))
    assert (found.wedges, found.leaked_pages, found.broken_firm_leases, found.other_violations) == (0, 0, 0, 0)
    assert found.resumed_after_eviction > 0, "the pool was never short: the race did not take place"


def test_firm_leases_are_granted_in_the_race() -> None:
    assert race("sub-agents", range(3)).firm_leases_granted > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_holds_without_a_bound_show_as_wedges(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with with_leases_that_are_never_broken():
        assert race(shape, range(6)).wedges > 0
    assert "again: python -m tests.simulation" in capsys.readouterr().err
