"""A picture of every session and branch, for people: what it is, where its rows are, why it waits.

Taken between two steps. It reads and never moves anything, and what it looks at is bounded: a picture of a full engine
costs the loop a few milliseconds, whatever is open or cached.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Final

from agentspeed_engine.ids import BranchId, NodeId, SessionId
from agentspeed_engine.kv.branch_states import BranchState, Decoding, Held, Prefilling, Promoting, Queued, Settling
from agentspeed_engine.kv.node_states import Both, Device, Host, Loading, Saving
from agentspeed_engine.kv.tree import Node, tenant_of, upward
from agentspeed_engine.protocol.messages import MAX_LOOK, BranchView, Look, Picture, Places, SessionView
from agentspeed_engine.sched.state import SchedulerState

MOST_WALKED = 2048
"""Nodes looked at to say who owns the pages; those of others are `unsorted`."""
_PLACES: Final[dict[type[object], str]] = {
    Device: "device",
    Saving: "device",
    Both: "both",
    Host: "host",
    Loading: "loading",
}
_PREPARATION = "its grammar or stop strings"
_NEXT_STEP = "the next step"
_BUDGET = "token budget"
_ROOM = "room"


def describe(world: SchedulerState, now: float) -> tuple[SessionView, ...]:
    """All sessions with all their branches, oldest first. Unbounded: for tests and records."""
    return _sessions(world, set(world.states), now)


def picture(world: SchedulerState, command: Look, now: float) -> Picture:
    """What `Look` is answered with."""
    sessions = _sessions(world, _chosen(world, max(0, min(command.branches, MAX_LOOK))), now)
    tenants = sorted({session.tenant for session in sessions})
    return Picture(
        request=command.request,
        clock=now,
        sessions=sessions,
        pages=pages_by_owner(world),
        slots={"total": world.kv.slots.total, "free": world.kv.slots.free},
        counts=_counts(world),
        tenants={tenant: world.kv.tree.owned.get(tenant, 0) for tenant in tenants},
        tenant_quota=world.config.tenant_pages,
    )


def waiting_for(world: SchedulerState, state: BranchState) -> str:
    """Why a branch does not move; empty when it does or has nothing to do."""
    match state:
        case Queued():
            return _why_queued(world, state)
        case Promoting():
            return "rows from the host"
        case Prefilling() | Decoding():
            return "" if state.room.flight else _why_not_in_the_step(world, state)
        case Settling():
            return "rows in flight"
        case _:
            return ""


def pages_by_owner(world: SchedulerState) -> dict[str, int]:
    """Who owns the device pages; the numbers add up to the pool.

    `tails`: active branches write there. Pages of nodes: `loading` from the host, `pinned` by active branches, `held`
    by branches at rest or waiting, `cached` (no branch has them: first victims). `unsorted`: beyond what is walked."""
    kv = world.kv
    tails = sum(len(room.tail) for room in kv.rooms.values())
    owners = {"free": kv.pages.free, "tails": tails, "loading": 0, "pinned": 0, "held": 0, "cached": 0}
    in_nodes = kv.pages.total - kv.pages.free - tails
    nodes = list(islice(kv.tree.nodes.values(), MOST_WALKED))
    wanted = _wanted(nodes)
    for node in nodes:
        owners[_owner(node, wanted)] += len(node.pages)
    seen = sum(owners[name] for name in ("loading", "pinned", "held", "cached"))
    return owners | {"unsorted": in_nodes - seen}


# ---- which branches -----------------------------------------------------------------------------------------------
def _chosen(world: SchedulerState, most: int) -> set[BranchId]:
    """Busy branches first, by age; then the oldest at rest."""
    chosen = {number for _, number in islice(world.active, most)}
    for listed in (
        (number for plan in world.flights.values() for number in (row.branch for row in plan.rows)),
        (number for _, number in world.queue),
        world.preparing.values(),
        (number for session in world.sessions.values() for number in sorted(session.branches)),
    ):
        for number in listed:
            if len(chosen) >= most:
                return chosen
            if number in world.states:
                chosen.add(number)
    return chosen


def _sessions(world: SchedulerState, chosen: set[BranchId], now: float) -> tuple[SessionView, ...]:
    by_session: dict[SessionId, list[BranchId]] = {}
    for number in sorted(chosen):
        by_session.setdefault(world.states[number].branch.session, []).append(number)
    views: list[SessionView] = []
    for opened, branches in sorted(by_session.items()):
        session = world.sessions[opened]
        views.append(
            SessionView(
                session=opened,
                tenant=session.tenant,
                label=session.label,
                branches_total=len(session.branches),
                branches=tuple(_branch(world, branch, now) for branch in branches),
            )
        )
    return tuple(views)


# ---- one branch ---------------------------------------------------------------------------------------------------
def _branch(world: SchedulerState, number: BranchId, now: float) -> BranchView:
    state = world.states[number]
    branch = state.branch
    parent = branch.trunk[0] if branch.trunk is not None and branch.trunk[0] in world.states else None
    room = None if isinstance(state, Held | Queued) else state.room
    turn = None if isinstance(state, Held) else state.turn
    return BranchView(
        branch=number,
        parent=parent,
        state=type(state).__name__,
        known=branch.known,
        places=_places(state),
        lease=world.leases.get(number),
        tool=world.tools.get(number, ""),
        tail_pages=0 if room is None else len(room.tail),
        age=None if turn is None else turn.age,
        drawn=0 if turn is None else turn.drawn,
        since=max(0.0, now - (branch.rested_at if turn is None else turn.queued_at)),
        waiting_for=waiting_for(world, state),
    )


def _places(state: BranchState) -> Places:
    branch = state.branch
    rows: dict[str, int] = {"device": 0, "both": 0, "host": 0, "loading": 0}
    for node in upward(branch.leaf):
        rows[_PLACES[type(node.state)]] += node.tokens
    if not isinstance(state, Held | Queued):
        rows["device"] += state.room.done - state.room.tail_start
    elif branch.seed is not None:
        rows[_PLACES[type(branch.seed.state)]] += branch.seed_rows
    return Places(**rows, lost=max(0, branch.known - sum(rows.values())))


def _why_not_in_the_step(world: SchedulerState, state: Prefilling | Decoding) -> str:
    lacking = _lacking(world, state)
    if lacking and world.kv.pages_to(state.room, state.room.issued + 1):
        return "room to grow" if lacking == _ROOM else lacking
    return _BUDGET if isinstance(state, Prefilling) and world.flights and state.turn.age <= world.spent else ""


def _why_queued(world: SchedulerState, state: Queued) -> str:
    branch = state.branch
    if state.turn.waits:
        return _PREPARATION
    filler = world.fill_of.get(branch.id)
    if filler is not None:
        return f"branch {filler[0]}'s prefix"
    if any(isinstance(node.state, Loading) for node in upward(branch.leaf)):
        return "rows from the host"
    lacking = _lacking(world, state)
    if lacking:
        return lacking
    return _BUDGET if state.turn.age <= world.spent else _NEXT_STEP


def _lacking(world: SchedulerState, state: Queued | Prefilling | Decoding) -> str:
    """Why the last pass refused this turn, or the refused turn after which no younger one entered or grew (L3)."""
    for number in world.over_quota:
        first = world.states.get(number)
        same = first is not None and tenant_of(first.branch.root) == tenant_of(state.branch.root)
        if same and isinstance(first, Queued | Prefilling | Decoding) and _order(first) <= _order(state):
            return "quota" if number == state.branch.id else f"quota after branch {number}"
    if world.refused is None:
        return ""
    number, why = world.refused
    stuck = world.states.get(number)
    if not isinstance(stuck, Queued | Prefilling | Decoding) or not _still(world, why):
        return ""
    if number == state.branch.id:
        return why
    return f"room after branch {number}" if _order(stuck) < _order(state) else ""


def _order(state: Queued | Prefilling | Decoding) -> tuple[int, BranchId]:
    return state.turn.age, state.branch.id


def _still(world: SchedulerState, why: str) -> bool:
    """Whether what it waits for has not ended since that pass."""
    direction = {"saves in flight": "save", "loads in flight": "load"}.get(why)
    return direction is None or any(ticket.direction == direction for ticket in world.tickets.values())


# ---- the whole ----------------------------------------------------------------------------------------------------
def _wanted(nodes: list[Node]) -> set[NodeId]:
    """The nodes on the path of some branch."""
    wanted: set[NodeId] = set()
    for end in nodes:
        if end.leaf_of or end.seed_of:
            for node in upward(end):
                if node.id in wanted:
                    break
                wanted.add(node.id)
    return wanted


def _owner(node: Node, wanted: set[NodeId]) -> str:
    if isinstance(node.state, Loading):
        return "loading"
    if node.pinned_by:
        return "pinned"
    return "held" if node.id in wanted else "cached"


def branches_by_state(world: SchedulerState) -> dict[str, int]:
    """Branches per state, counted without a look at those at rest."""
    active = Counter(type(world.states[number]).__name__.lower() for _, number in world.active)
    settling = sum(
        isinstance(world.states.get(number), Settling)
        for number in {row.branch for plan in world.flights.values() for row in plan.rows}
    )
    states = {name: active[name] for name in ("promoting", "prefilling", "decoding")} | {
        "queued": world.waiting_turns,
        "settling": settling,
    }
    return states | {"held": len(world.states) - sum(states.values())}


def _counts(world: SchedulerState) -> dict[str, int]:
    return branches_by_state(world) | {
        "sessions": len(world.sessions),
        "branches": len(world.states),
        "preemptions": world.preemptions,
        "tickets": len(world.tickets),
        "firm_pages": sum(pages for _, pages in world.firm.values()),
        "firm_budget": world.config.firm_budget(),
    }
