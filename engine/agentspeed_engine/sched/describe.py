"""A frozen view of every session and branch, for people: what it is, where its rows are, why it waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from agentspeed_engine.ids import BranchId, SessionId
from agentspeed_engine.kv.branches import BranchState, Held, Promoting, Queued, Settling
from agentspeed_engine.sched.world import World
from agentspeed_engine.wire import Lease, Residence


@final
@dataclass(frozen=True, slots=True)
class BranchView:
    """One branch."""

    branch: BranchId
    parent: BranchId | None
    """The branch it was forked from, while that exists."""
    state: str
    known: int
    residence: Residence
    lease: Lease | None
    drawn: int
    """Tokens drawn in the running turn."""
    waiting_for: str


@final
@dataclass(frozen=True, slots=True)
class SessionView:
    """One session and its branches, oldest first."""

    session: SessionId
    tenant: str
    branches: tuple[BranchView, ...]


def describe(world: World) -> tuple[SessionView, ...]:
    """All sessions, oldest first."""
    return tuple(
        SessionView(number, session.tenant, tuple(_branch(world, branch) for branch in sorted(session.branches)))
        for number, session in sorted(world.sessions.items())
    )


def waiting_for(world: World, state: BranchState) -> str:
    """Why a branch does not move; empty when it does or has nothing to do."""
    match state:
        case Queued():
            filler = world.fill_of.get(state.branch.id)
            return f"branch {filler[0]} to compute the prefix both need" if filler else "room"
        case Promoting():
            return "rows from the host"
        case Settling():
            return "rows in flight"
        case _:
            return ""


def _branch(world: World, number: BranchId) -> BranchView:
    state = world.states[number]
    branch = state.branch
    parent = branch.trunk[0] if branch.trunk is not None and branch.trunk[0] in world.states else None
    return BranchView(
        number, parent, type(state).__name__, branch.known, world.residence(branch), world.leases.get(number),
        0 if isinstance(state, Held) else state.turn.drawn, waiting_for(world, state),
    )
