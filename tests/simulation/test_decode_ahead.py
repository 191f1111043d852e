"""Rows that are issued for tokens in flight change nothing that anybody hears, whatever goes wrong meanwhile."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest

from agentspeed_engine.kv import branch_states
from agentspeed_engine.sched import step
from tests.simulation.checkers import Sight
from tests.simulation.runner import run_seeds
from tests.simulation.workload import Workload, load, names


def ahead(name: str, depth: int) -> Workload:
    workload = load(name)
    return dataclasses.replace(workload, engine=dataclasses.replace(workload.engine, depth=depth, decode_ahead=True))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", [name for name in names() if name != "decode-ahead"])
def test_every_workload_hears_the_tokens_of_an_undisturbed_run(name: str, depth: int) -> None:
    found = run_seeds(ahead(name, depth), range(3, 4))
    assert not found.failures, str(found.failures[0])
    assert found.compared > 0 and found.marks["ran-ahead"] > 0


def test_a_dead_row_that_counts_as_done_is_seen_by_the_ledger() -> None:
    with mock.patch.object(branch_states, "_without_dead_row", lambda branch, room: room.done):
        report = run_seeds(ahead("decode-ahead", 1), range(6))
    assert report.failures


def test_a_row_that_is_fed_with_anothers_token_is_heard() -> None:
    honest = step._sampled

    def first(world: object) -> object:
        found = honest(world)  # type: ignore[arg-type]
        return {number: dataclasses.replace(token, place=0) for number, token in found.items()}

    with mock.patch.object(step, "_sampled", first):
        report = run_seeds(ahead("decode-ahead", 1), range(4), sight=Sight.USER)
    assert report.failures
    assert str(report.failures[0].violation).startswith("wrong token")
