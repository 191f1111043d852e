"""Whether there is room for the whole of a turn's prompt beside what must stay: pages are counted, none is taken."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from agentspeed_engine.ids import BranchId, NodeId, pages_for
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import Decoding, Prefilling, Promoting, Queued
from agentspeed_engine.kv.tree import Node, tenant_of, upward
from agentspeed_engine.kv.turn import Turn
from agentspeed_engine.sched import places, tickets
from agentspeed_engine.sched.state import SchedulerState


def target(turn: Turn, branch: Branch) -> int:
    """Rows a turn must compute before it draws; a prefill-only turn leaves one token to feed."""
    return branch.known if turn.max_tokens else branch.known - 1


def lacks(world: SchedulerState, state: Queued, now: float) -> str:
    """What the whole prompt of a turn lacks beside the older turns and those soon to come, empty when it fits (L3).
    Beside them it would be let in to be preempted half way, and what it computed would be lost. The oldest is always
    let in (L1)."""
    turn, branch = state.turn, state.branch
    older = world.active[: bisect_left(world.active, (turn.age, branch.id))]
    resting = places.resting_before(world, (turn.age, branch.id), now) if older else []
    return _lacking(world, state, [number for _, number in older], world.config.pages, world.firm, now, resting)


def lacks_quota(world: SchedulerState, state: Queued, now: float) -> bool:
    """The same within what its tenant may have, beside the tenant's older turns and firm leases."""
    quota, turn, branch = world.config.tenant_pages, state.turn, state.branch
    if quota is None:
        return False
    tenant = tenant_of(branch.root)
    active = world.actives.get(tenant, [])
    older = [number for _, number in active[: bisect_left(active, (turn.age, branch.id))]]
    firm = (number for number in world.firm if tenant_of(world.kv.branches[number].root) == tenant)
    return bool(_lacking(world, state, older, quota, firm, now))


def _lacking(
    world: SchedulerState,
    state: Queued,
    older: list[BranchId],
    pages: int,
    firm: Iterable[BranchId],
    now: float,
    resting: Sequence[Branch] = (),
) -> str:
    if not older:
        return ""
    turn, branch = state.turn, state.branch
    seen: set[NodeId] = set()
    spare = pages - to_come(world, older)
    for number in older:
        held = _running(world, number)
        spare -= _path_pages(held.branch.leaf, seen) + len(held.room.tail)
    if turn.enters:
        spare -= places.reserve(world, older, resting, branch)
    for other in resting:  # each will want a page to go on in
        spare -= 1 + _path_pages(other.leaf if other.seed is None else other.seed, seen)
    chain = world.kv.unreadable(branch)
    spare -= _path_pages(branch.leaf, seen) + tickets.pages_of(chain)
    spare -= pages_for(target(turn, branch) - branch.leaf.end, world.config.page_tokens)
    if spare < 0:
        return "room"
    return "" if spare >= _firm_pages(world, firm, seen, now) else "firm leases"


def to_come(world: SchedulerState, turns: Iterable[BranchId]) -> int:
    """Pages that active turns still take: for the rest of their prompts, and one each to draw into."""
    pages = 0
    for number in turns:
        state = _running(world, number)
        pages += 1 + world.kv.pages_to(state.room, target(state.turn, state.branch))
    return pages


def held_by_firm(world: SchedulerState, now: float) -> int:
    """Pages that firm leases keep from running turns now: those no active turn reads."""
    seen: set[NodeId] = set()
    for number in world.kv.rooms:
        _ = _path_pages(world.kv.branches[number].leaf, seen)
    return _firm_pages(world, world.firm, seen, now)


def _firm_pages(world: SchedulerState, holders: Iterable[BranchId], seen: set[NodeId], now: float) -> int:
    """Device pages under these firm leases that have not ended, those already `seen` left out. The leases count a page
    once for each of them, because they may part; here a page counts once, however many leases share it."""
    pages = 0
    for number in holders:
        if world.firm[number][0] > now:
            branch = world.kv.branches[number]
            pages += _path_pages(branch.leaf if branch.seed is None else branch.seed, seen)
    return pages


def _path_pages(end: Node, seen: set[NodeId]) -> int:
    """Device pages on a path, those already `seen` left out."""
    pages = 0
    for node in upward(end):
        if node.id in seen:
            break
        seen.add(node.id)
        pages += len(node.pages)
    return pages


def _running(world: SchedulerState, number: BranchId) -> Promoting | Prefilling | Decoding:
    state = world.states[number]
    assert isinstance(state, Promoting | Prefilling | Decoding)
    return state
