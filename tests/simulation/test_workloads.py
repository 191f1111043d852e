"""Every shipped workload over a few seeds: nothing breaks, everybody comes to an end, nothing is left."""

from __future__ import annotations

import pytest

from tests.simulation.runner import run_seeds
from tests.simulation.workload import FAULT_KINDS, load, names
from tests.simulation.world import Simulation

SEEDS = 3
INCIDENTS = ("abort-while-finishing", "abort-while-copying", "freed-while-read", "closed-twice",
             "aborted-session-goes-on")


@pytest.mark.parametrize("name", names())
def test_whatever_goes_wrong_turns_end_tokens_are_right_and_no_page_leaks(name: str) -> None:
    report = run_seeds(load(name), range(SEEDS))
    assert not report.failures, str(report.failures[0])
    assert report.turns > 0
    assert report.compared > 0, "no turn was compared with an undisturbed one"


@pytest.mark.parametrize("name", names())
def test_an_agent_nothing_happened_to_comes_to_its_end(name: str) -> None:
    report = run_seeds(load(name), range(1))
    assert report.ends["running"] == 0
    assert report.ends["finished"] > 0


def test_the_same_seed_is_the_same_run_and_another_seed_is_not() -> None:
    workload = load("everything-goes-wrong")
    first, again, other = (Simulation(workload, seed).run() for seed in (5, 5, 6))
    assert first.trace == again.trace
    assert first.events == again.events
    assert first.trace != other.trace


def test_every_kind_of_fault_strikes() -> None:
    struck = run_seeds(load("everything-goes-wrong"), range(6)).faults
    assert set(struck) == set(FAULT_KINDS)


def test_the_five_incidents_are_among_the_workloads() -> None:
    assert set(INCIDENTS) <= set(names())
