"""Faults put into the production machines: what the simulator must notice, or it proves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from agentspeed_engine.kv import branches
from agentspeed_engine.sched import reclaim
from agentspeed_engine.sched.world import World


@contextmanager
def without_settling() -> Iterator[None]:
    """A branch lets go of its room at once, though a step still reads its path and writes its tail."""

    def rest_at_once(kv: Any, branch: Any, turn: Any, room: Any, then: Any, now: float) -> Any:
        return branches._come_to_rest(kv, branch, turn, room, then, now)

    with mock.patch.object(branches, "_leave", rest_at_once):
        yield


@contextmanager
def with_leases_that_are_never_broken() -> Iterator[None]:
    """What the engine answers to `expect` holds for as long as the branch rests: a hold without a bound."""
    evictable = reclaim._evictable

    def unless_leased(world: World, tip: Any, now: float) -> bool:
        if any(number in world.leases for number in (*tip.leaf_of, *tip.seed_of)):
            return False
        return evictable(world, tip, now)

    with mock.patch.object(reclaim, "_evictable", unless_leased):
        yield
