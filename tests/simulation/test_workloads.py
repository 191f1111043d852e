"""Every shipped workload over a few seeds: nothing breaks, everybody comes to an end, nothing is left."""

from __future__ import annotations

from functools import cache

import pytest

from tests.simulation.runner import Report, at_every_point, run_seeds
from tests.simulation.workload import FAULT_KINDS, load, names
from tests.simulation.world import Simulation

INCIDENTS = (
    "abort-while-finishing",
    "abort-while-copying",
    "freed-while-read",
    "closed-twice",
    "aborted-session-goes-on",
)


@cache
def report(name: str) -> Report:
    return run_seeds(load(name), range(2))


@pytest.mark.parametrize("name", names())
def test_whatever_goes_wrong_turns_end_tokens_are_right_and_no_page_leaks(name: str) -> None:
    found = report(name)
    assert not found.failures, str(found.failures[0])
    assert found.compared > 0, "no turn was compared with an undisturbed one"
    assert found.ends["running"] == 0 and found.ends["finished"] > 0


@pytest.mark.parametrize("name", [name for name in names() if load(name).faults])
def test_the_faults_of_a_workload_strike(name: str) -> None:
    often = {fault.kind for fault in load(name).faults if fault.rate >= 0.02 and fault.kind != "tool_never_returns"}
    assert often <= set(report(name).faults)


@pytest.mark.parametrize(
    ("kind", "stride"),
    [
        ("abort", 1),
        ("client_gone", 3),
        ("famine", 8),
        ("clock_jumps", 8),
        ("engine_killed", 8),
        ("rank_dies", 1),
        ("copy_fails", 1),
        ("copy_late", 1),
        ("turn_refused", 1),
        ("turn_spoilt", 1),
        ("tool_never_returns", 1),
    ],
)
def test_one_thing_may_go_wrong_at_every_point(kind: str, stride: int) -> None:
    runs = 0
    for outcome in at_every_point(load("tiny"), 0, kind, stride):
        assert outcome.violation is None, str(outcome)
        assert outcome.faults[kind] == 1
        runs += 1
    assert runs > 2


def test_every_kind_of_fault_has_its_points() -> None:
    assert {fault.kind for fault in load("everything-goes-wrong").faults} == set(FAULT_KINDS)


def test_the_same_seed_is_the_same_run_and_another_seed_is_not() -> None:
    workload = load("everything-goes-wrong")
    first, again, other = (Simulation(workload, seed).run() for seed in (5, 5, 6))
    assert (first.trace, first.events, first.marks) == (again.trace, again.events, again.marks)
    assert first.trace != other.trace


def test_the_five_incidents_are_among_the_workloads() -> None:
    assert set(INCIDENTS) <= set(names())
