"""A digest of each part of the core's state, so that a replay can say where it differs.

It covers everything that moves (who owns which page, in which order lists stand, every counter) and no token: ids show
in it only through the shape of the tree, so it is the same over ids and over their stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final

import msgspec

from agentspeed_engine.kv.branch import Room
from agentspeed_engine.kv.branch_states import BranchState, Decoding, Held, Prefilling, Promoting, Queued, Settling
from agentspeed_engine.kv.node_states import Both, Device, Host, Loading, Saving
from agentspeed_engine.kv.tree import Node
from agentspeed_engine.kv.turn import Turn
from agentspeed_engine.sched.state import SchedulerState

_BYTES = 8
_STATES: Final[dict[type[Any], str]] = {
    Held: "Held",
    Queued: "Queued",
    Promoting: "Promoting",
    Prefilling: "Prefilling",
    Decoding: "Decoding",
    Settling: "Settling",
    Device: "Device",
    Saving: "Saving",
    Both: "Both",
    Host: "Host",
    Loading: "Loading",
    type(None): "NoneType",
}
"""What digests call a state. It stays when a class is renamed, or no recording would replay to its digests."""
_ENCODER = msgspec.msgpack.Encoder()
_COUNTERS = (
    "ignored",
    "evicted_pages",
    "copied_pages",
    "preemptions",
    "saved_pages",
    "loaded_pages",
    "prefetched",
    "late_tickets",
    "next_branch",
    "next_turn",
    "next_age",
    "next_seq",
    "next_ticket",
    "early_seen",
    "ended",
)


def digests(world: SchedulerState) -> tuple[bytes, ...]:
    """Of every part, in the order of `PARTS`."""
    return tuple(blake2b(_ENCODER.encode(part(world)), digest_size=_BYTES).digest() for part in PARTS.values())


def whole(world: SchedulerState) -> str:
    """One short text for the whole state."""
    return blake2b(b"".join(digests(world)), digest_size=_BYTES).hexdigest()


def _branches(world: SchedulerState) -> Any:
    return [_branch(world, world.states[number]) for number in sorted(world.states)]


def _branch(world: SchedulerState, state: BranchState) -> Any:
    branch = state.branch
    turn = None if isinstance(state, Held) else _turn(state.turn)
    room = None if isinstance(state, Held | Queued) else _room(state.room, world.kv.is_stale(branch.id, state.room))
    then = (int(state.then.next), state.then.children) if isinstance(state, Settling) else None
    return (
        branch.id,
        _STATES[type(state)],
        branch.session,
        branch.link,
        branch.private,
        branch.draw_seed,
        branch.known,
        branch.leaf.id,
        None if branch.seed is None else branch.seed.id,
        branch.seed_rows,
        branch.computed,
        branch.lost_why,
        branch.serial,
        branch.child_index,
        branch.forks,
        branch.epoch,
        branch.moves,
        branch.trunk,
        branch.rested_at,
        turn,
        room,
        then,
    )


def _turn(turn: Turn) -> Any:
    return (
        turn.spec.turn,
        turn.age,
        turn.max_tokens,
        turn.bound,
        turn.queued_at,
        turn.drawn,
        turn.end,
        turn.admitted,
        turn.new,
        turn.shared,
        turn.resumed_device,
        turn.resumed_host,
        turn.recomputed,
        turn.rows_new,
        turn.rows_again,
        turn.preempted,
        turn.why,
        turn.started_at,
        turn.filled_at,
        *(["enters"] if turn.enters else []),
        *(["spoilt"] if turn.spoilt else []),  # else nothing: digests of recordings that have no such turn stay theirs
    )


def _room(room: Room, stale: bool) -> Any:
    copy = None if room.copy is None else (room.copy.src, room.copy.dst, room.copy.rows)
    return room.tail_start, room.tail, room.issued, room.done, room.flight, stale, copy


def _nodes(world: SchedulerState) -> Any:
    return [_node(node) for node in world.kv.tree.nodes.values()]


def _node(node: Node) -> Any:
    slots = node.state.slots if isinstance(node.state, Saving | Both | Host | Loading) else ()
    return (
        node.id,
        node.start,
        node.end,
        None if node.parent is None else node.parent.id,
        _STATES[type(node.state)],
        node.pages,
        slots,
        sorted(node.leaf_of),
        sorted(node.seed_of),
        sorted(node.pinned_by),
        node.used,
        node.failures,
        node.pages_below,
        [child.id for child in node.children.values()],
        list(node.stubs),
        *(["disowned"] if node.disowned else []),  # else nothing, as of a turn that is not spoilt
    )


def _tips(world: SchedulerState) -> Any:
    tree = world.kv.tree
    return list(tree.tips), [list(tips) for tips in tree.tips_of.values()], list(tree.host_tips)


def _leases(world: SchedulerState) -> Any:
    return list(world.leases.items()), list(world.firm.items()), world.firm_ends, list(world.lease_news.items())


def _tickets(world: SchedulerState) -> Any:
    tickets = [(number, ticket.direction, ticket.deadline) for number, ticket in world.tickets.items()]
    copies = [(number, [node.id for node in waiting]) for number, waiting in world.kv.tree.in_copy.items()]
    return tickets, copies, [order.ticket for order in world.orders], world.prefetch, list(world.due.items())


def _flights(world: SchedulerState) -> Any:
    return [
        (seq, [(row.branch, row.epoch, row.position, row.tokens, row.tail_pages) for row in plan.rows])
        for seq, plan in world.flights.items()
    ]


def _sessions(world: SchedulerState) -> Any:
    sessions = [
        (number, session.link, session.orphaned, sorted(session.branches)) for number, session in world.sessions.items()
    ]
    return sessions, list(world.kv.private.items())


def _waits(world: SchedulerState) -> Any:
    return (list(world.waiting.items()), list(world.fill_of.items()), world.refused, world.over_quota, world.spent)


def _pauses(world: SchedulerState) -> Any:
    return world.law.snapshot(), [law.snapshot() for law in world.tool_laws.values()], list(world.tools)


def _places(world: SchedulerState) -> Any:
    sessions = [(one.place, one.turns_in_place, one.grown) for one in world.sessions.values()]
    return world.growth.snapshot(), list(world.rested), sessions


PARTS: Final[dict[str, Callable[[SchedulerState], Any]]] = {
    "branches": _branches,
    "nodes": _nodes,
    "tips": _tips,
    "pages by tenant": lambda world: list(world.kv.tree.owned.values()),
    "free pages": lambda world: world.kv.pages.free_numbers(),
    "free slots": lambda world: world.kv.slots.free_numbers(),
    "queue": lambda world: (world.queue, list(world.queues.values()), world.active, list(world.actives.values())),
    "flights": _flights,
    "leases": _leases,
    "tickets": _tickets,
    "sessions": _sessions,
    "waits": _waits,
    "pauses": _pauses,
    "counters": lambda world: [getattr(world, name) for name in _COUNTERS],
    "preparations": lambda world: (
        list(world.preparing.items()),
        [spec.turn for spec in world.unprepared],
        sorted(number for number, state in world.states.items() if not isinstance(state, Held) and state.turn.prepared),
    ),
    "places": _places,
}
"""New parts come last: a recording made before a part was known is compared in those that it has."""
