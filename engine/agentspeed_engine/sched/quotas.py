"""What one tenant may have: refused at once, by name, never waited for (L7)."""

from __future__ import annotations

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.ids import NodeId, pages_for
from agentspeed_engine.kv.owners import Branch
from agentspeed_engine.kv.tree import upward
from agentspeed_engine.sched.world import World


def check_session(world: World, tenant: str) -> None:
    """Raises `EngineFault` (quota_exceeded) when the tenant has all the sessions it may have."""
    quota = world.config.tenant_sessions
    if quota is not None and sum(session.tenant == tenant for session in world.sessions.values()) >= quota:
        raise EngineFault("quota_exceeded", f"Tenant {tenant!r} has {quota} sessions open.", "Close one first.")


def check_pages(world: World, branch: Branch, known: int) -> None:
    """Raises `EngineFault` (quota_exceeded) when a turn over `known` tokens would go past the tenant's pages."""
    quota = world.config.tenant_pages
    if quota is None:
        return
    tenant = world.sessions[branch.session].tenant
    seen: set[NodeId] = set()
    pages = 0
    for session in world.sessions.values():
        if session.tenant != tenant:
            continue
        for number in session.branches:
            room = world.kv.rooms.get(number)
            pages += 0 if room is None else len(room.tail)
            for node in upward(world.states[number].branch.leaf):
                if node.id in seen:
                    break
                seen.add(node.id)
                pages += len(node.pages)
    fresh = pages_for(known + 1, world.config.page_tokens) - world.kv.readable_end(branch) // world.config.page_tokens
    if pages + fresh > quota:
        raise EngineFault(
            "quota_exceeded",
            f"Tenant {tenant!r} holds {pages} of its {quota} pages; this turn needs {fresh} more.",
            "Close or rewind branches, or ask for a larger quota.")
