"""Faults put into the production machines: what the simulator must notice, or it proves nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from agentspeed_engine.kv import branch_states
from agentspeed_engine.kv.node_states import Both, Device
from agentspeed_engine.kv.pool import Pool
from agentspeed_engine.sched import reclaim, tickets
from agentspeed_engine.sched.state import SchedulerState


@contextmanager
def without_settling() -> Iterator[None]:
    """A branch lets go of its room at once, though a step still reads its path and writes its tail."""

    def rest_at_once(kv: Any, branch: Any, turn: Any, room: Any, then: Any, now: float) -> Any:
        return branch_states._come_to_rest(kv, branch, turn, room, then, now)

    with mock.patch.object(branch_states, "_leave", rest_at_once):
        yield


@contextmanager
def with_leases_that_are_never_broken() -> Iterator[None]:
    """What the engine answers to `expect` holds for as long as the branch rests: a hold without a bound."""
    evictable = reclaim._evictable

    def unless_leased(world: SchedulerState, tip: Any, now: float) -> bool:
        if any(number in world.leases for number in (*tip.leaf_of, *tip.seed_of)):
            return False
        return evictable(world, tip, now)

    with mock.patch.object(reclaim, "_evictable", unless_leased):
        yield


@contextmanager
def with_firm_leases_that_do_not_hold() -> Iterator[None]:
    """Eviction looks at no lease."""

    def unless_pinned(world: SchedulerState, tip: Any, now: float) -> bool:
        return not tip.pinned_by and isinstance(tip.state, Device | Both)

    with mock.patch.object(reclaim, "_evictable", unless_pinned):
        yield


@contextmanager
def with_a_page_lost_now_and_then() -> Iterator[None]:
    """Of several pages given back at once the last is forgotten."""
    give = Pool.give

    def forgetful(self: Any, numbers: Sequence[int]) -> None:
        give(self, numbers[:-1] if len(numbers) > 2 else numbers)

    with mock.patch.object(Pool, "give", forgetful):
        yield


@contextmanager
def with_copies_acknowledged_before_they_are_made() -> Iterator[None]:
    """A copy to the host counts as done when it is ordered, so what comes back was never there."""
    order = tickets._order

    def done_at_once(world: SchedulerState, number: Any, direction: Any, nodes: Any, now: float) -> None:
        order(world, number, direction, nodes, now)
        if direction == "save":
            tickets.copied(world, number, True, now)

    with mock.patch.object(tickets, "_order", done_at_once):
        yield
