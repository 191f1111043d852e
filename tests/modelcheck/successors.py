"""What the search rests on: worlds that it takes for one, because their keys are equal, must go on alike."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.state import SchedulerState
from tests.modelcheck.explorer import Bounds, actions, begin, carry_out, digest


def unlike(bounds: Bounds) -> tuple[int, list[str]]:
    """How many worlds were taken for an earlier one, and the actions after which one of them has another key than the
    earlier one has after the same action."""
    core = begin(bounds)
    known: dict[bytes, dict[str, bytes]] = {}
    waiting: deque[tuple[SchedulerState, int, bytes]] = deque([(core.snapshot(), 0, digest(core.key(), 0))])
    merged, found = 0, list[str]()
    while waiting:
        world, verbs, key = waiting.popleft()
        following = _following(core, world, bounds, verbs)
        keys = {action: key for action, (_, _, key) in following.items()}
        if key in known:
            merged += 1
            before = known[key]
            found += [action for action in keys.keys() | before.keys() if keys.get(action) != before.get(action)]
            continue
        known[key] = keys
        waiting += following.values()
    return merged, found


def _following(
    core: Core, world: SchedulerState, bounds: Bounds, verbs: int
) -> dict[str, tuple[SchedulerState, int, bytes]]:
    """By action, whose branches are named by their places, the world after it, the verbs in its history, its key."""
    following: dict[str, tuple[SchedulerState, int, bytes]] = {}
    for action in actions(world, bounds, verbs):
        core.restore(world)
        carry_out(core, action)
        spent = verbs + (0 if isinstance(action, str) else 1)
        following[_placed(world, action)] = core.world, spent, digest(core.key(), spent)
    return following


def _placed(world: SchedulerState, action: Any) -> str:
    places = {int(number): place for place, number in enumerate(sorted(world.states))}
    named = {name: places[getattr(action, name)] for name in ("branch", "child") if hasattr(action, name)}
    return repr(msgspec.structs.replace(action, **named) if named else action)
