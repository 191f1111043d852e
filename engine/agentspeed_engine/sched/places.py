"""Places in the order of age that sessions keep, so that those that have begun go on with their rows (decision 0074).

A turn's age is when it arrived (L5). Where more turns wait than there is room for, a session whose tool has answered
would go to the end of the queue each time, and its rows would go to make room for those before it: all of them pay for
their whole context in every turn. With `turns_in_place` above 1 a session's turns are as old as its first one: that is
its place, and its turns there are a visit. Then three things hold so many sessions back that those which have begun
keep their rows:

- Who begins a visit is let in beside the older ones if there is room for what they will yet add as well (`reserve`).
- Nobody younger is let in on the rows of a branch that has just come to rest (`resting_before`), where no quota bounds
  them; a turn that runs may still grow over them. Who announced a longer pause (`Expect`) gives them up at once.
- Who was away longer finds its place, not its rows.

Nobody starves: a session has so many turns at an age and no more, so before any turn there are finitely many, and who
is the oldest of those that run or wait is let in whatever rests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agentspeed_engine.ids import BranchId, SessionId
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import Held, Queued
from agentspeed_engine.sched.state import SchedulerState, Session

SECONDS: Final = 0.5
"""For so long after a turn nobody younger is let in on its rows. Longer, and too much of the pool lies idle where
pauses are those of people and of long tools (decision 0074)."""


def taken(world: SchedulerState, session: Session) -> tuple[int, bool]:
    """The age of a session's next turn, and whether it begins a visit: then it is the newest."""
    if world.config.turns_in_place == 1:
        return world.next_age, False
    if _stays(world, session):
        session.turns_in_place += 1
        return session.place, False
    world.end_visit(session)
    session.place, session.turns_in_place = world.next_age, 1
    return session.place, True


def resting_before(world: SchedulerState, order: tuple[int, BranchId], now: float) -> list[Branch]:
    """Branches at rest whose next turns would go before one of this age and branch, and whose rows wait for them."""
    found: list[Branch] = []
    if world.config.turns_in_place == 1:
        return found
    for number in world.preparing.values():  # it is in no queue yet, and will be in its place in a moment
        state = world.states[number]
        assert isinstance(state, Queued)
        if not state.turn.enters and (state.turn.age, number) < order:
            found.append(state.branch)
    for number in reversed(world.rested):
        state = world.states[number]
        assert isinstance(state, Held)
        branch = state.branch
        if now - branch.rested_at > SECONDS:
            break
        session = world.sessions[branch.session]
        if _stays(world, session) and (session.place, number) < order and not _away(world, number, now):
            found.append(branch)
    return found


def reserve(world: SchedulerState, older: Iterable[BranchId], resting: Iterable[Branch], entering: Branch) -> int:
    """Pages that sessions which run or rest before a turn are expected to take yet, those of its own left out."""
    grown: dict[SessionId, int] = {}
    for number in older:
        branch = world.kv.branches[number]
        state = world.states[number]
        assert not isinstance(state, Held | Queued)
        known = grown.get(branch.session)
        if known is None:
            known = world.sessions[branch.session].grown
        grown[branch.session] = known + state.turn.added
    for branch in resting:
        _ = grown.setdefault(branch.session, world.sessions[branch.session].grown)
    _ = grown.pop(entering.session, None)
    return int(sum(map(world.growth.to_come, grown.values()))) // world.config.page_tokens


def _stays(world: SchedulerState, session: Session) -> bool:
    """Whether the session's next turn is at its place."""
    return 0 < session.turns_in_place < world.config.turns_in_place


def _away(world: SchedulerState, number: BranchId, now: float) -> bool:
    """Whether its client has announced a longer pause."""
    lease = world.leases.get(number)
    return lease is not None and lease.until is not None and lease.until - now > SECONDS
