"""What a session at rest is promised: soft leases, which may be revoked, and firm ones, within a budget."""

from __future__ import annotations

import math

from agentspeed_engine.ids import pages_for
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.protocol.messages import Expect, Lease
from agentspeed_engine.sched import prefetch, quotas
from agentspeed_engine.sched.state import SchedulerState


def grant(world: SchedulerState, branch: Branch, command: Expect, now: float) -> Lease:
    """The lease of a branch at rest whose client said when it comes back, instead of the one it had. A firm one that
    the budget or the quota has no room for is granted as a soft one, which says so."""
    limit, asked = world.config.max_lease_seconds, command.seconds
    world.end_lease(branch.id)
    _ = world.tools.pop(branch.id, None)
    if command.tool:
        world.tools[branch.id] = command.tool
    seconds = min(asked if asked is not None else world.law_of(branch).residual(0.0), limit)
    why = [] if asked is None or seconds == asked else [f"clipped to the longest lease, {limit:g} s"]
    pages = _pages_kept(world, branch)
    keep = command.keep
    if keep == "firm":
        refusal = _no_firm(world, branch, pages)
        if refusal:
            keep = "soft"
            why.append(refusal)
        else:
            world.hold_firm(branch.id, now + seconds, pages)
            why.append(f"{pages} pages of the firm budget are yours until then")
    if keep == "soft":
        why.append("kept as long as no running turn needs the pages")
    if asked is None:
        why.append("nobody announced how long: the engine goes by the pauses it has seen")
    lease = Lease(
        keep=keep,
        until=None if asked is None else now + seconds,
        seconds=seconds,
        residence=world.residence(branch),
        why="; ".join(why),
    )
    world.leases[branch.id] = lease
    prefetch.expect(world, branch, None if asked is None else seconds, now)
    return lease


def _pages_kept(world: SchedulerState, branch: Branch) -> int:
    """Pages that stay on the device with a branch: all up to the end of its leaf, or of the node its seed is in."""
    end = branch.leaf.end if branch.seed is None else branch.seed.end
    return pages_for(end, world.config.page_tokens)


def take_over_firm(world: SchedulerState, branch: Branch, given: Lease | None) -> None:
    """A firm lease of the trunk or of the child it adopted, the one that ends later, goes on over the rows that it
    took over, if the budget has room for them."""
    firm = world.firm.pop(branch.id, None)
    until = -math.inf if firm is None else firm[0]
    if given is not None and given.until is not None and given.until > until:
        until = given.until
        world.leases[branch.id] = given
        world.lease_news[branch.id] = "it took over the firm lease of the child it adopted"
    elif firm is None:
        return
    pages = _pages_kept(world, branch)
    refusal = _no_firm(world, branch, pages)
    if refusal:
        world.soften(branch.id, f"soft since it took over a child's rows; {refusal}")
    else:
        world.hold_firm(branch.id, until, pages)


def _no_firm(world: SchedulerState, branch: Branch, pages: int) -> str:
    """Why a firm lease cannot be granted; empty when it can."""
    if world.kv.on_device(branch) < max(branch.resident, min(branch.computed, branch.known)):
        return "firm refused: not all rows are on the device"
    used = sum(counted for _, counted in world.firm.values())
    budget = world.config.firm_budget()
    if used + pages > budget:
        return f"firm refused: {pages} pages asked, {max(0, budget - used)} of {budget} left in the firm budget"
    return quotas.no_firm(world, branch, pages)
