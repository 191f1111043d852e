"""The simulator notices what it is there for: each incident comes back when `Settling` is taken out."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import with_leases_that_are_never_broken, without_settling
from tests.simulation.runner import run_seeds
from tests.simulation.test_workloads import INCIDENTS
from tests.simulation.workload import load


@pytest.mark.parametrize("name", INCIDENTS)
def test_without_settling_the_incident_happens(name: str) -> None:
    with without_settling():
        report = run_seeds(load(name), range(20))
    assert report.failures, f"{report.events} events and nobody noticed"
    assert "(4) rows of branch" in str(report.failures[0].violation)


def test_without_settling_a_reader_meets_rows_of_somebody_else() -> None:
    with without_settling():
        report = run_seeds(load("abort-while-finishing"), range(60), ledger=False)
    assert report.failures, "no step read a page that had been given away"
    assert "finds rows of another history" in str(report.failures[0].violation)


@pytest.mark.parametrize("name", ["sub-agents", "waiting-parents"])
def test_a_hold_without_a_bound_wedges_the_pool(name: str) -> None:
    with with_leases_that_are_never_broken():
        report = run_seeds(load(name), range(6))
    assert report.failures
    assert report.failures[0].wedged, report.failures[0].violation
