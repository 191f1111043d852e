"""The scheduler's state and the few ways to change it; verbs, planning and outcomes all go through here."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, final

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, LinkId, SessionId, StepSeq, TicketId
from agentspeed_engine.kv.branches import (
    AtRest,
    BranchState,
    Closed,
    Decoding,
    Held,
    Next,
    Prefilling,
    Promoting,
    Queued,
    Settling,
    Then,
)
from agentspeed_engine.kv.owners import Branch, Kv
from agentspeed_engine.kv.tree import Node
from agentspeed_engine.kv.turns import Turn
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.pauses import PauseLaw
from agentspeed_engine.sched.plan import HostCopy, StepPlan
from agentspeed_engine.wire import Done, Forked, Lease, LeaseChanged, Outgoing, Residence, TurnEnded, TurnUsage

if TYPE_CHECKING:
    from agentspeed_engine.sched.tickets import Ticket

Out: TypeAlias = list[tuple[LinkId, Outgoing]]


class Waiting(NamedTuple):
    """A reply that is due when a branch comes to rest."""

    link: LinkId
    request: int
    cut: int | None
    children: tuple[BranchId, ...]


@final
@dataclass(slots=True)
class Session:
    link: LinkId
    tenant: str
    branches: set[BranchId]
    orphaned: bool = False
    """Its front died: what is still to be born ends at once."""


@final
class World:
    """Everything one core knows. No method reads a clock."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.kv = Kv(pages=config.pages, page_tokens=config.page_tokens, slots=config.host_slots)
        self.states: dict[BranchId, BranchState] = {}
        self.sessions: dict[SessionId, Session] = {}
        self.queue: list[tuple[int, BranchId]] = []
        """Queued turns by age."""
        self.active: list[tuple[int, BranchId]] = []
        """Promoting, Prefilling and Decoding turns by age."""
        self.flights: dict[StepSeq, StepPlan] = {}
        self.waiting: dict[BranchId, list[Waiting]] = {}
        self.fill_of: dict[BranchId, tuple[BranchId, int]] = {}
        """A queued branch that waits for (a sibling, its turn) to fill the prefix both need."""
        self.leases: dict[BranchId, Lease] = {}
        self.firm: dict[BranchId, tuple[float, int]] = {}
        """Firm leases: until when, and the pages counted for them (shared ones count for each)."""
        self.law = PauseLaw()
        self.tool_laws: dict[str, PauseLaw] = {}
        self.tools: dict[BranchId, str] = {}
        """The tool that a branch at rest waits for, as its front told."""
        self.oracle: Callable[[BranchId, float], float] | None = None
        """The true seconds until a branch runs again, in offline runs that know them."""
        self.tickets: dict[TicketId, Ticket] = {}
        self.orders: list[HostCopy] = []
        """Tickets not yet handed out."""
        self.prefetch: list[tuple[float, BranchId, int]] = []
        """A heap of (when, branch, its turns begun): rows to be brought back then."""
        self.early_seen: tuple[int, ...] = ()
        self.ended: list[int] = []
        self.victim: Node | None = None
        self.ignored = 0
        self.evicted_pages = 0
        self.copied_pages = 0
        self.preemptions = 0
        self.saved_pages = 0
        self.loaded_pages = 0
        self.prefetched = 0
        self.late_tickets = 0
        self.next_branch = 0
        self.next_turn = 0
        self.next_age = 0
        self.next_seq = 0
        self.next_ticket = 0
        self.out: Out = []

    # ---- small facts ----------------------------------------------------------------------------------------------
    def tell(self, branch: Branch, message: Outgoing) -> None:
        self.out.append((branch.link, message))

    def residence(self, branch: Branch) -> Residence:
        """Where the rows of the known tokens are."""
        state = self.states.get(branch.id)
        if isinstance(state, Prefilling | Decoding | Settling):
            device = available = min(state.room.done, branch.known)
        else:
            device, available = self.kv.on_device(branch), branch.resident
        return Residence(device=device, host=available - device, lost=branch.known - available)

    def pressure(self) -> tuple[int, ...]:
        """Changes whenever a search for rows to save early could find something new."""
        return (self.evicted_pages, self.next_ticket, len(self.active), len(self.queue), len(self.kv.tree.tips))

    def fresh_branch(self) -> BranchId:
        self.next_branch += 1
        return BranchId(self.next_branch)

    def fresh_ticket(self) -> TicketId:
        self.next_ticket += 1
        return TicketId(self.next_ticket)

    # ---- moving branches ------------------------------------------------------------------------------------------
    def rest(self, state: Held) -> None:
        self.states[state.branch.id] = state

    def enqueue(self, state: Queued) -> None:
        number = state.branch.id
        self.states[number] = state
        insort(self.queue, (state.turn.age, number))

    def activate(self, state: Promoting | Prefilling | Decoding) -> None:
        self.states[state.branch.id] = state
        insort(self.active, (state.turn.age, state.branch.id))

    def unlist(self, listed: list[tuple[int, BranchId]], turn: Turn, number: BranchId) -> None:
        """Takes a turn off `queue` or `active`."""
        index = bisect_left(listed, (turn.age, number))
        if index == len(listed) or listed[index] != (turn.age, number):
            raise BrokenInvariant(f"branch {number} is not listed where its state says")
        del listed[index]
        _ = self.fill_of.pop(number, None)

    def leave(self, state: Promoting | Prefilling | Decoding, then: Then, now: float) -> None:
        """An active branch goes back to rest, at once or when its rows are acknowledged."""
        number = state.branch.id
        self.unlist(self.active, state.turn, number)
        match state.leave(self.kv, then, now):
            case Settling() as settling:
                self.states[number] = settling
            case AtRest() as landed:
                self.land(number, state.turn, landed, now)

    def land(self, number: BranchId, turn: Turn, landed: AtRest, now: float) -> None:
        """A branch came to rest: its children are born, its turn ends or waits again, replies go out."""
        for child in landed.children:
            self.adopt_child(child)
            if self.sessions[child.branch.session].orphaned:
                gone = child.branch
                _ = child.close(self.kv, now)
                self.forget(gone)
        waiting = self.waiting.pop(number, [])
        self._answer_forks(waiting, self.kv.branches[number].known)  # before anything is cut off the parent
        match landed.state:
            case Queued() as queued:
                self.enqueue(queued)
                self._answer(waiting, queued.branch.known)
            case Held() as held:
                cuts = [wait.cut for wait in waiting if wait.cut is not None]
                if cuts and min(cuts) < held.branch.known:
                    held = held.rewind(self.kv, min(cuts))
                self.rest(held)
                self.finish_turn(held.branch, turn, now)
                self._answer(waiting, held.branch.known)
            case Closed():
                branch = self.kv.branches[number]
                turn.end = turn.end or "closed"
                self.finish_turn(branch, turn, now)
                self.forget(branch)
                self._answer(waiting, branch.known)

    def adopt_child(self, child: Held) -> None:
        """Registers a newborn child with its session."""
        branch = child.branch
        self.sessions[branch.session].branches.add(branch.id)
        self.rest(child)

    def finish_turn(self, branch: Branch, turn: Turn, now: float) -> None:
        """The last event of a turn."""
        if turn.end is None:
            raise BrokenInvariant(f"branch {branch.id} came to rest without a reason")
        self.ended.append(turn.spec.turn)
        self.tell(branch, TurnEnded(branch=branch.id, reason=turn.end, known=branch.known,
                                    usage=usage(turn, now), message=turn.message))

    def forget(self, branch: Branch) -> None:
        """A closed branch leaves the tables; its session with the last of them."""
        _ = self.states.pop(branch.id, None)
        _ = self.kv.branches.pop(branch.id, None)
        self.end_lease(branch.id)
        _ = self.tools.pop(branch.id, None)
        session = self.sessions[branch.session]
        session.branches.discard(branch.id)
        if not session.branches:
            del self.sessions[branch.session]

    def end_lease(self, number: BranchId) -> None:
        _ = self.leases.pop(number, None)
        _ = self.firm.pop(number, None)

    def change_lease(self, branch: Branch, why: str) -> None:
        """Tells the holder of a lease that its rows moved."""
        lease = self.leases.get(branch.id)
        if lease is None:
            return
        changed = Lease(keep=lease.keep, until=lease.until, seconds=lease.seconds,
                        residence=self.residence(branch), why=why)
        self.leases[branch.id] = changed
        self.tell(branch, LeaseChanged(branch=branch.id, lease=changed))

    def _answer_forks(self, waiting: list[Waiting], known: int) -> None:
        for wait in waiting:
            if wait.children:
                self.out.append((wait.link, Forked(request=wait.request, branches=wait.children, known=known)))

    def _answer(self, waiting: list[Waiting], known: int) -> None:
        for wait in waiting:
            if not wait.children:
                self.out.append((wait.link, Done(request=wait.request, known=known)))


def usage(turn: Turn, now: float) -> TurnUsage:
    """What a turn cost until `now`."""
    filled = turn.filled_at if turn.filled_at is not None else now
    started = turn.started_at if turn.admitted else now
    return TurnUsage(
        new=turn.new, resumed_device=turn.resumed_device, resumed_host=turn.resumed_host, recomputed=turn.recomputed,
        shared=turn.shared, drawn=turn.drawn, preempted=turn.preempted, queue_seconds=started - turn.queued_at,
        prefill_seconds=max(0.0, filled - started), decode_seconds=max(0.0, now - filled), why=turn.why,
    )


__all__ = ["Next", "Out", "Session", "Waiting", "World", "usage"]
