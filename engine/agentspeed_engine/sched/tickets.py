"""Host copies in flight: begun, carried out elsewhere, and acknowledged or failed by a deadline (L6).

They are carried out in their order, one after the other. One that has not begun is given up `ticket_deadline` seconds
after it was ordered or after another one ended, whichever is later. So to queue is no failure, and behind a copier that
hangs nothing waits for more than one deadline, however many queue.
"""

from __future__ import annotations

import math
from typing import Literal

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import PageId, SlotId, TicketId
from agentspeed_engine.kv.branch_states import Promoting
from agentspeed_engine.kv.node_states import Device, Host, Loading, Saving
from agentspeed_engine.kv.tree import Node, session_of, tenant_of
from agentspeed_engine.sched.plan import HostCopy
from agentspeed_engine.sched.state import SchedulerState, Ticket

MOST_FAILURES = 2
"""Loads of a node that may fail before its rows count as lost."""


def save(world: SchedulerState, node: Node, now: float) -> int:
    """Begins to copy a node to the host, whose slots are free. Returns its pages."""
    if not isinstance(node.state, Device):
        raise BrokenInvariant(f"{node!r} cannot be saved")
    count = len(node.pages)
    ticket = _begin(world, "save", [node], now)
    world.kv.tree.change(node, node.state.save(world.kv.slots.take(count), ticket))
    _order(world, ticket, "save", [node], now)
    return count


def load(world: SchedulerState, chain: list[Node], now: float) -> None:
    """Begins to bring a chain of nodes back, whose pages are free; the one above them is readable."""
    if not chain or chain[0].parent is None or not chain[0].parent.readable:
        raise BrokenInvariant("a load begins below what is readable")
    ticket = _begin(world, "load", chain, now)
    for node in chain:
        if not isinstance(node.state, Host):
            raise BrokenInvariant(f"{node!r} cannot be loaded")
        world.kv.tree.change(node, node.state.load(world.kv.pages.take(len(node.state.slots)), ticket))
    _order(world, ticket, "load", chain, now)


def pages_of(chain: list[Node]) -> int:
    """Device pages that loading takes."""
    return sum(len(node.state.slots) for node in chain if isinstance(node.state, Host))


def copied(world: SchedulerState, number: TicketId, ok: bool, now: float) -> None:
    """A copy was carried out, or failed. One that comes after its deadline is over already."""
    if number not in world.tickets:
        world.ignored += 1
        return
    _end(world, number, ok, now)
    for waiting, ticket in list(world.tickets.items()):  # the copier lives: those that queue are not late
        if ticket.deadline < math.inf:
            world.tickets[waiting] = Ticket(ticket.direction, now + world.config.ticket_deadline)


def _end(world: SchedulerState, number: TicketId, ok: bool, now: float) -> None:
    ticket = world.tickets.pop(number)
    nodes = world.kv.tree.in_copy.pop(number)
    if ticket.direction == "save":
        for node in nodes:
            _saved(world, node, ok)
    else:
        _loaded(world, nodes, ok, now)
    for node in reversed(nodes):
        world.kv.copy_ended(node)
        _drop_if_ownerless(world, node)


def begun(world: SchedulerState, number: TicketId) -> None:
    """The copy has begun to touch its pages and slots: until it ends they get no other owner, however late."""
    ticket = world.tickets.get(number)
    if ticket is not None:
        world.tickets[number] = Ticket(ticket.direction, math.inf)


def expire(world: SchedulerState, now: float) -> None:
    """Tickets past their deadline fail: nothing waits for ever for a copy that does not begin."""
    for number in [number for number, ticket in world.tickets.items() if ticket.deadline <= now]:
        world.late_tickets += 1
        _end(world, number, False, now)


def deadline(world: SchedulerState) -> float:
    """When the next ticket is given up, if none begins or ends before."""
    return min((ticket.deadline for ticket in world.tickets.values()), default=math.inf)


def saving(world: SchedulerState, tenant: str | None = None) -> int:
    """Pages whose eviction waits for a copy to end; those of one tenant, or all."""
    return sum(
        len(node.pages)
        for number, ticket in world.tickets.items()
        if ticket.direction == "save"
        for node in world.kv.tree.in_copy[number]
        if not node.pinned_by and not node.pages_below and tenant in (None, tenant_of(node.root))
    )


def _begin(world: SchedulerState, direction: Literal["save", "load"], nodes: list[Node], now: float) -> TicketId:
    number = world.fresh_ticket()
    world.tickets[number] = Ticket(direction, now + world.config.ticket_deadline)
    world.kv.tree.in_copy[number] = list(nodes)
    return number


def _order(
    world: SchedulerState, number: TicketId, direction: Literal["save", "load"], nodes: list[Node], now: float
) -> None:
    pages: list[PageId] = []
    slots: list[SlotId] = []
    for node in nodes:
        if not isinstance(node.state, Saving | Loading):
            raise BrokenInvariant(f"{node!r} waits for no copy")
        pages += node.state.pages
        slots += node.state.slots
    world.orders.append(
        HostCopy(
            number,
            direction,
            tuple(pages),
            tuple(slots),
            begin_by=now + world.config.ticket_deadline / 2,
            patience=world.config.ticket_deadline / 2,
        )
    )


def _saved(world: SchedulerState, node: Node, ok: bool) -> None:
    if not isinstance(node.state, Saving):
        raise BrokenInvariant(f"{node!r} was not being saved")
    if ok:
        world.saved_pages += len(node.pages)
        world.kv.tree.change(node, node.state.acked())
        return
    device, slots = node.state.failed()
    world.kv.tree.change(node, device)
    world.kv.slots.give(slots)
    node.failures += 1  # not tried again: when its pages are needed it is dropped


def _loaded(world: SchedulerState, nodes: list[Node], ok: bool, now: float) -> None:
    waiting = {number for node in nodes for number in node.pinned_by}
    for node in nodes:
        if not isinstance(node.state, Loading):
            raise BrokenInvariant(f"{node!r} was not being loaded")
        if ok:
            world.loaded_pages += len(node.pages)
            node.failures = 0
            world.kv.tree.change(node, node.state.acked())
            continue
        node.failures += 1
        host, pages = node.state.failed()
        world.kv.tree.change(node, host)
        world.kv.pages.give(pages)
    for number in sorted(waiting):
        state = world.states[number]
        if not isinstance(state, Promoting):
            raise BrokenInvariant(f"branch {number} pins rows that were being loaded and does not wait for them")
        if ok:
            if not world.kv.unreadable(state.branch):
                world.states[number] = state.landed()
            continue
        world.deactivate(state.turn, state.branch)
        state.turn.why = "a copy from the host failed, or did not begin in time"
        world.enqueue(state.lost(world.kv, now))
    if not ok and nodes[0].failures >= MOST_FAILURES:
        _ = world.kv.drop_with_all_below(nodes[0], "its rows could not be brought back from the host twice")


def _drop_if_ownerless(world: SchedulerState, node: Node) -> None:
    """Rows of a private session that closed meanwhile do not outlive it."""
    if session_of(node.root) is None:
        return
    if node.id in world.kv.tree.nodes and not node.referenced and not node.pinned_by:
        _ = world.kv.drop(node)
    world.kv.drop_private(node.root)
