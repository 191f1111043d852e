"""Rows of a paused branch come back from the host before its tool is due, in pages no branch has or needs sooner."""

from __future__ import annotations

from functools import partial
from heapq import heapify, heappop, heappush

from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import Decoding, Held, Prefilling, Queued
from agentspeed_engine.kv.node_states import Host
from agentspeed_engine.kv.tree import Node, tenant_of
from agentspeed_engine.sched import quotas, tickets
from agentspeed_engine.sched.admission import to_come
from agentspeed_engine.sched.reclaim import make_way
from agentspeed_engine.sched.state import SchedulerState

_EARLY_SHARE = 0.25
"""Of the pauses seen with a tool: rows should be back before this share of them has ended."""
_ENOUGH = 8.0
"""Pauses of one tool that its learnt law needs before it is believed more than the hint."""
_STALE = 16
"""Entries that may be out of date however few are not."""
_SHARE_LEFT = 16
"""One part in so many of a pool is left to be had."""
_MARGIN = 0.05
"""Seconds before the moment it is due that are spent waiting for nothing."""
_AGAIN = 0.02
"""Seconds, at least, until what could not be brought is tried again."""
_TRIES = 8
"""One part in so many of the rest of a pause goes by between two tries."""


def expect(world: SchedulerState, branch: Branch, seconds: float | None, now: float) -> None:
    """Notes when a branch should be back on the device, if that was announced or learnt of its tool."""
    if not world.config.host_slots:
        return
    law = world.tool_laws.get(world.tools.get(branch.id, ""))
    due = seconds
    if law is not None and law.observations >= _ENOUGH:
        due = law.quantile(_EARLY_SHARE) or seconds
    if due is None:
        return
    due -= branch.known * world.config.copy_seconds_per_token + _MARGIN
    world.due[branch.id] = now + max(0.0, due)
    heappush(world.prefetch, (world.due[branch.id], branch.id))
    if len(world.prefetch) > 2 * len(world.due) + _STALE:
        world.prefetch = [(when, number) for number, when in world.due.items()]
        heapify(world.prefetch)


def due(world: SchedulerState, now: float, *, everybody_chose: bool) -> None:
    """Begins the loads that are due, once all turns that run or wait had their choice of room. A prediction takes no
    room of theirs, and no rows that are needed sooner or are nowhere else; it waits for both, as long as the pause is
    expected to last."""
    while world.prefetch and world.prefetch[0][0] <= now:
        when, number = heappop(world.prefetch)
        if world.due.get(number) != when:
            continue
        del world.due[number]
        state = world.states[number]
        if isinstance(state, Held) and (chain := world.kv.unreadable(state.branch)):
            if (everybody_chose or not world.queue) and _may_come(world, state.branch, chain, now):
                tickets.load(world, chain, now)
                world.prefetched += 1
            else:
                _try_again(world, state.branch, now)


def _try_again(world: SchedulerState, branch: Branch, now: float) -> None:
    """Shortly, unless the branch is expected to run by then."""
    lease = world.leases[branch.id]
    end = branch.rested_at + lease.seconds if lease.until is None else lease.until
    again = now + max(_AGAIN, (end - now) / _TRIES)
    if again < end:
        world.due[branch.id] = again
        heappush(world.prefetch, (again, branch.id))


def _may_come(world: SchedulerState, branch: Branch, chain: list[Node], now: float) -> bool:
    """Whether the pages for these rows are free now; rows that can go without loss have gone for them."""
    tenant = tenant_of(branch.root)
    if _room_is_wanted(world, tenant) or not all(isinstance(node.state, Host) for node in chain):
        return False
    pages = tickets.pages_of(chain)
    if world.config.tenant_pages is not None:
        own = (active for _, active in world.actives.get(tenant, []))
        reserve = to_come(world, own) + world.config.tenant_pages // _SHARE_LEFT
        if not make_way(world, tenant, partial(quotas.left, world, tenant), pages, reserve, chain[0], now):
            return False
    reserve = to_come(world, (active for _, active in world.active)) + world.config.pages // _SHARE_LEFT
    return make_way(world, None, lambda: world.kv.pages.free, pages, reserve, chain[0], now)


def _room_is_wanted(world: SchedulerState, tenant: str) -> bool:
    """Whether a turn waits to which the pass refused what these rows would take: room in the pool, or pages of this
    tenant's quota. Others that wait find these pages again: once the rows are here, the host has them too."""
    if world.refused is not None and isinstance(world.states.get(world.refused[0]), Queued | Prefilling | Decoding):
        return True
    waiting = (world.states.get(number) for number in world.over_quota)
    return any(
        isinstance(state, Queued | Prefilling | Decoding) and tenant_of(state.branch.root) == tenant
        for state in waiting
    )
