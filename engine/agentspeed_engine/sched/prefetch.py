"""Rows of a paused branch come back from the host before its tool is due, into pages that nobody needs."""

from __future__ import annotations

from heapq import heappop, heappush

from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.branches import Held
from agentspeed_engine.kv.nodes import Host
from agentspeed_engine.kv.owners import Branch
from agentspeed_engine.sched import tickets
from agentspeed_engine.sched.world import World

_EARLY_SHARE = 0.25
"""Of the pauses seen with a tool: rows should be back before this share of them has ended."""
_ENOUGH = 8.0
"""Pauses of one tool that its learnt law needs before it is believed more than the hint."""
_MARGIN = 0.05
"""Seconds before the moment it is due that are spent waiting for nothing."""


def expect(world: World, branch: Branch, seconds: float, now: float) -> None:
    """Notes when a branch should be back on the device."""
    if not world.config.host_slots:
        return
    law = world.tool_laws.get(world.tools.get(branch.id, ""))
    due = seconds
    if law is not None and law.observations >= _ENOUGH:
        due = law.quantile(_EARLY_SHARE) or seconds
    due -= branch.known * world.config.copy_seconds_per_token + _MARGIN
    heappush(world.prefetch, (now + max(0.0, due), branch.id, branch.serial))


def due(world: World, now: float) -> None:
    """Begins the loads that are due. No room is made for them: a prediction takes nothing from anybody."""
    while world.prefetch and world.prefetch[0][0] <= now:
        _, number, serial = heappop(world.prefetch)
        state = world.states.get(number)
        if isinstance(state, Held) and state.branch.serial == serial:
            _bring(world, number, now)


def _bring(world: World, number: BranchId, now: float) -> None:
    state = world.states[number]
    chain = world.kv.unreadable(state.branch)
    if not chain or world.queue or not all(isinstance(node.state, Host) for node in chain):
        return
    if world.kv.pages.free >= tickets.pages_of(chain) + world.config.pages // 16:
        tickets.load(world, chain, now)
        world.prefetched += 1
