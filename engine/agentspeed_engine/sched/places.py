"""Places in the order of age that a branch keeps over short pauses, so that its rows are still there (decision 0071).

A turn's age is when it arrived (L5). Where more turns wait than there is room for, an agent whose tool answers at once
would go to the end of the queue each time, and its rows would go to make room for those before it: all of them pay for
their whole context in every turn. With `turns_in_place` above 1 a turn that follows its branch's last one soon is as
old as that one, and rows at rest whose branch would go first make no room for whoever enters.

Nobody starves: a branch has so many turns of an age and no more, so before any turn there are finitely many.
"""

from __future__ import annotations

from typing import Final

from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import Held
from agentspeed_engine.sched.state import SchedulerState

SECONDS: Final = 0.5
"""The longest pause over which a place is kept. Its rows lie idle meanwhile, and who waits for them waits on."""


def taken(world: SchedulerState, branch: Branch, now: float) -> int:
    """The age of the branch's next turn: its last one's, or the newest."""
    if world.config.turns_in_place == 1:
        return world.next_age
    if _kept(world, branch, now):
        branch.turns_in_place += 1
    else:
        branch.place, branch.turns_in_place = world.next_age, 1
    return branch.place


def before(world: SchedulerState, age: int, now: float) -> list[Branch]:
    """Branches at rest whose next turn would be older than a turn of `age`."""
    if world.config.turns_in_place == 1:
        return []
    resting = (state.branch for state in world.states.values() if isinstance(state, Held))
    return [branch for branch in resting if branch.place < age and _kept(world, branch, now)]


def _kept(world: SchedulerState, branch: Branch, now: float) -> bool:
    return 0 < branch.turns_in_place < world.config.turns_in_place and now - branch.rested_at <= SECONDS
