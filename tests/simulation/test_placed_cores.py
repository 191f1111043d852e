"""Several cores, one pool each: sessions placed by load and prefix, steps in lock-step, nobody's rows mixed up."""

from __future__ import annotations

import pytest

from tests.simulation import checkers
from tests.simulation.placed_cores import PlacedCores
from tests.simulation.runner import in_peace
from tests.simulation.workload import load
from tests.simulation.world import Simulation


@pytest.mark.parametrize("name", ["search", "sub-agents", "decode-ahead", "everything-goes-wrong"])
def test_sessions_on_several_ranks_hear_what_they_hear_on_one(name: str) -> None:
    """Under the faults of the workload; every rank's ledger is recounted after every event."""
    simulation = Simulation(load(name), 0, ranks=3)
    outcome = simulation.run()
    assert outcome.violation is None, str(outcome)
    assert checkers.tokens_are_undisturbed(outcome.agents, in_peace(load(name), 0).agents) > 0
    cores = simulation.core
    assert isinstance(cores, PlacedCores)
    assert len(cores.placed) > 1, "no rank had all the sessions"
    assert cores.empty > 0, "a rank without rows takes part in a step of the others"
