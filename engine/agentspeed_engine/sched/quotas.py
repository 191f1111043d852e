"""What one tenant may have: sessions, refused by name past it, and device pages, a pool of its own within the pool.

A tenant's pages are those of its tails and of all its rows, shared ones once and those that nobody refers to any more
included. At its quota its own rows at rest make room, then its strictly younger turns, and else a turn waits; turns of
others do not. Its oldest turn therefore finds all but its own pages reclaimable (L1-L4 hold in the small pool too).
"""

from __future__ import annotations

import math

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import BranchId, pages_for
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import Decoding, Prefilling, Promoting
from agentspeed_engine.kv.tree import tenant_of
from agentspeed_engine.sched import reclaim, tickets
from agentspeed_engine.sched.state import SchedulerState


def check_session(world: SchedulerState, tenant: str) -> None:
    """Raises `EngineFault` (quota_exceeded) when the tenant has all the sessions it may have."""
    quota = world.config.tenant_sessions
    if quota is not None and has_all_sessions(world, tenant):
        many = _many(quota, "session")
        which = f"Tenant {tenant!r} has {many} open" if tenant else f"{many} without a tenant {_are(quota)} open"
        raise EngineFault("quota_exceeded", f"{which}, as many as may be.", "Close one first.")


def has_all_sessions(world: SchedulerState, tenant: str) -> bool:
    """Whether the tenant may open no further one."""
    quota = world.config.tenant_sessions
    return quota is not None and sum(session.tenant == tenant for session in world.sessions.values()) >= quota


def check_turn(world: SchedulerState, branch: Branch, known: int, least: int) -> int:
    """Tokens a turn over `known` may draw before its rows fill all pages its tenant may have. Raises `EngineFault`
    (context_overflow) when those are fewer than `least`: to a tenant its quota is a context limit, and no other turn's
    end changes that."""
    quota = world.config.tenant_pages
    if quota is None:
        return world.config.context_limit
    left = quota * world.config.page_tokens - known
    if left < least:
        needed, tenant = pages_for(known + least, world.config.page_tokens), tenant_of(branch.root)
        who = f"Tenant {tenant!r} may have" if tenant else "All sessions without a tenant together may have"
        raise EngineFault(
            "context_overflow",
            f"{who} {_many(quota, 'page')}; this turn needs {needed}.",
            "Rewind, start a new session, or ask for a larger quota.",
        )
    return left


def no_firm(world: SchedulerState, branch: Branch, pages: int) -> str:
    """Why so many pages more under firm leases would leave the tenant's turns too few; empty when they do not."""
    config, tenant = world.config, tenant_of(branch.root)
    if config.tenant_pages is None:
        return ""
    budget = config.tenant_pages - pages_for(config.context_limit, config.page_tokens) - 1
    used = sum(
        counted for number, (_, counted) in world.firm.items() if tenant_of(world.kv.branches[number].root) == tenant
    )
    if used + pages <= budget:
        return ""
    return f"firm refused: {pages} pages asked, {max(0, budget - used)} left beside a whole turn of the tenant's quota"


def left(world: SchedulerState, tenant: str) -> float:
    """Pages that a tenant may take more."""
    quota = world.config.tenant_pages
    return math.inf if quota is None else quota - world.kv.tree.owned.get(tenant, 0)


def allowed(world: SchedulerState, tenant: str, pages: int, now: float) -> int:
    """How many of `pages` more a tenant may take when only its rows at rest make room."""
    _ = _shed(world, tenant, pages, now)
    return int(min(pages, max(0, left(world, tenant))))


def make_room(world: SchedulerState, tenant: str, pages: int, order: tuple[int, BranchId], now: float) -> bool:
    """Whether a tenant may take `pages` more for its turn of this age and branch; what is in the way goes if it may.
    False: the turn waits for older ones of the tenant, or for pages of it that come back by themselves."""
    while not _shed(world, tenant, pages, now):
        if _coming(world, tenant):
            return False
        active = world.actives.get(tenant, [])
        if not active or active[-1] <= order:
            return False
        state = world.states[active[-1][1]]
        assert isinstance(state, Promoting | Prefilling | Decoding)
        reclaim.preempt(world, state, "preempted: an older turn of the tenant needed its pages", now)
    return True


def _shed(world: SchedulerState, tenant: str, pages: int, now: float) -> bool:
    """Drops rows of a tenant until `pages` more fit, as far as no turn runs on them."""
    while (missing := pages - left(world, tenant)) > 0:
        missing = int(missing)
        coming = _coming(world, tenant)
        victim = None if coming >= missing else reclaim.next_victim(world, tenant, now)
        if victim is None:
            return False
        _ = reclaim.let_go(world, victim, missing, missing - coming, now)
    return True


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _coming(world: SchedulerState, tenant: str) -> int:
    """Pages that leave the device once they are copied."""
    return tickets.saving(world, tenant) if world.tickets else 0
