"""The simulator notices what it is there for: each incident comes back when `Settling` is taken out."""

from __future__ import annotations

import dataclasses

import pytest

from tests.simulation.checkers import Sight
from tests.simulation.mutants import (
    with_a_page_lost_now_and_then,
    with_copies_acknowledged_before_they_are_made,
    with_firm_leases_that_do_not_hold,
    with_leases_that_are_never_broken,
    without_settling,
)
from tests.simulation.runner import run_seeds
from tests.simulation.test_workloads import INCIDENTS
from tests.simulation.workload import DeviceSpec, FaultSpec, Span, load


@pytest.mark.parametrize("name", INCIDENTS)
def test_without_settling_the_incident_happens(name: str) -> None:
    with without_settling():
        report = run_seeds(load(name), range(20))
    assert report.failures, f"{report.events} events and nobody noticed"
    assert "(4) rows of branch" in str(report.failures[0].violation)


@pytest.mark.parametrize("name", INCIDENTS)
def test_without_settling_and_without_the_ledger_the_incident_is_met_by_who_reads_the_rows(name: str) -> None:
    with without_settling():
        report = run_seeds(load(name), range(24), sight=Sight.INSIDE)
    assert report.failures, f"{report.events} events and nobody read what was not his"
    assert "finds rows of another history" in str(report.failures[0].violation)


def test_without_settling_a_reader_meets_rows_of_somebody_else() -> None:
    """Copies are quick and steps slow: rows come back from the host into a page that a step in flight still writes."""
    incident = load("abort-while-finishing")
    crowded = dataclasses.replace(
        incident,
        engine=dataclasses.replace(incident.engine, pages=18, host_slots=60, firm_pages=0, depth=2),
        device=DeviceSpec(step=Span(0.02, 0.05), copy=Span(0.0005, 0.002)),
        faults=(FaultSpec(kind="abort", rate=0.05),),
    )
    assert not run_seeds(crowded, range(4), sight=Sight.INSIDE).failures
    with without_settling():
        report = run_seeds(crowded, range(15), sight=Sight.INSIDE)
    assert report.failures, "no step read a page that had been given away"
    assert "finds rows of another history" in str(report.failures[0].violation)


@pytest.mark.parametrize("name", ["sub-agents", "waiting-parents"])
def test_a_hold_without_a_bound_wedges_the_pool(name: str) -> None:
    with with_leases_that_are_never_broken():
        report = run_seeds(load(name), range(6))
    assert report.failures
    assert report.failures[0].wedged, report.failures[0].violation


def test_a_firm_lease_that_is_broken_is_seen() -> None:
    with with_firm_leases_that_do_not_hold():
        report = run_seeds(load("sub-agents"), range(6))
    assert report.failures
    assert "firm lease broken" in str(report.failures[0].violation)
    assert report.failures[0].broken_firm_leases == 1


def test_a_page_that_is_lost_is_seen_at_once_by_the_ledger() -> None:
    with with_a_page_lost_now_and_then():
        report = run_seeds(load("chat"), range(3))
    assert report.failures and "(1) device pages are not conserved" in str(report.failures[0].violation)


def test_a_page_that_is_lost_is_counted_at_the_end_without_the_ledger() -> None:
    workload = load("chat")
    roomy = dataclasses.replace(workload, engine=dataclasses.replace(workload.engine, pages=200, host_slots=0))
    with with_a_page_lost_now_and_then():
        report = run_seeds(roomy, range(3), sight=Sight.INSIDE)
    assert report.failures and report.failures[0].leaked_pages > 0, report.failures


def test_rows_that_come_back_from_a_copy_that_was_not_made_yet_are_seen_by_their_reader() -> None:
    with with_copies_acknowledged_before_they_are_made():
        report = run_seeds(load("abort-while-copying"), range(6), sight=Sight.INSIDE)
    assert report.failures
    assert "finds rows of another history" in str(report.failures[0].violation)


def test_a_turn_that_waits_longer_than_it_may_is_called_starved() -> None:
    workload = load("younger-arrivals")
    strict = dataclasses.replace(workload, expect=dataclasses.replace(workload.expect, longest_turn=0.3))
    report = run_seeds(strict, range(1))
    assert report.failures and str(report.failures[0].violation).startswith("starved: ")
