"""Rows of a paused branch come back from the host before its tool is due, in pages nobody has or needs sooner."""

from __future__ import annotations

from functools import partial
from heapq import heapify, heappop, heappush

from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.branches import Held
from agentspeed_engine.kv.nodes import Host
from agentspeed_engine.kv.owners import Branch
from agentspeed_engine.kv.tree import tenant_of
from agentspeed_engine.sched import quotas, tickets
from agentspeed_engine.sched.admission import to_come
from agentspeed_engine.sched.reclaim import make_way
from agentspeed_engine.sched.world import World

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


def expect(world: World, branch: Branch, seconds: float | None, now: float) -> None:
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


def due(world: World, now: float) -> None:
    """Begins the loads that are due. A prediction takes no running turn's room, and no rows that are needed sooner or
    are nowhere else."""
    while world.prefetch and world.prefetch[0][0] <= now:
        when, number = heappop(world.prefetch)
        if world.due.get(number) == when:
            del world.due[number]
            _bring(world, number, now)


def _bring(world: World, number: BranchId, now: float) -> None:
    state = world.states[number]
    if not isinstance(state, Held):
        return
    chain = world.kv.unreadable(state.branch)
    if not chain or world.queue or not all(isinstance(node.state, Host) for node in chain):
        return
    pages, tenant = tickets.pages_of(chain), tenant_of(state.branch.root)
    if world.config.tenant_pages is not None:
        own = (active for _, active in world.actives.get(tenant, []))
        reserve = to_come(world, own) + world.config.tenant_pages // _SHARE_LEFT
        if not make_way(world, tenant, partial(quotas.left, world, tenant), pages, reserve, chain[0], now):
            return
    reserve = to_come(world, (active for _, active in world.active)) + world.config.pages // _SHARE_LEFT
    if make_way(world, None, lambda: world.kv.pages.free, pages, reserve, chain[0], now):
        tickets.load(world, chain, now)
        world.prefetched += 1
