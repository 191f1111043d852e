"""The scheduler's state and the few ways to change it; verbs, planning and outcomes all go through here."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, final

import msgspec

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, LinkId, SessionId, StepSeq, TicketId
from agentspeed_engine.kv.branch import Branch
from agentspeed_engine.kv.branch_states import (
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
from agentspeed_engine.kv.kv_cache import KvCache
from agentspeed_engine.kv.tree import tenant_of
from agentspeed_engine.kv.turn import Turn
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import (
    Done,
    Forked,
    Lease,
    LeaseChanged,
    Outgoing,
    Residence,
    TurnEnded,
    TurnUsage,
)
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.growth import Growth
from agentspeed_engine.sched.pause_model import PauseModel
from agentspeed_engine.sched.plan import HostCopy, StepPlan

if TYPE_CHECKING:
    from agentspeed_engine.sched.ranking import Rankings

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
    label: str = ""
    """What its front calls it; nothing is decided by it."""
    orphaned: bool = False
    """Its front died: what is still to be born ends at once."""
    place: int = 0
    """The age of its turns, where sessions keep their places (`sched.places`)."""
    turns_in_place: int = 0
    """Turns that it has had at that age; 0: it has had none, or places are not kept."""
    grown: int = 0
    """Tokens that these turns have added."""


@final
@dataclass(frozen=True, slots=True)
class Ticket:
    """A host copy in flight (`tickets`). Its nodes stand in `Tree.in_copy`, because a split must find them."""

    direction: Literal["save", "load"]
    deadline: float
    """It moves on whenever another copy ends; infinite once this one has begun."""


@final
class SchedulerState:
    """The state of one scheduler, and the moves that several of its parts share.

    Commands (`commands`), planning (`step`) and results (`outcome`) are functions over it; each begins and ends with a
    sound world, and none runs inside another. A caller that moves a branch puts its new state object into `states` in
    the same call, through the methods here, which also keep the lists by age (`queue`, `active`) and by tenant.

    What leaves the core is put into `out`, and taken by `Core` at the end of each call. Time comes in as an argument:
    `now` never goes back, and no method reads a clock, draws a random number or does I/O. So the same calls make the
    same world, which recordings (`digest` names every field), snapshots and the model search rest on: a field that is
    added here is added to the digest and, if behaviour depends on it, to the key of the search (`snapshot.key`).
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.kv = KvCache(pages=config.pages, page_tokens=config.page_tokens, slots=config.host_slots)
        self.states: dict[BranchId, BranchState] = {}
        self.sessions: dict[SessionId, Session] = {}
        self.queue: list[tuple[int, BranchId]] = []
        """Queued turns by age."""
        self.queues: dict[str, list[tuple[int, BranchId]]] = {}
        """The same by tenant, so that all turns of one can be passed over at once; no tenant without any."""
        self.preparing: dict[int, BranchId] = {}
        """Queued turns that are in no queue yet, because the executor is not ready for them, with their branches."""
        self.unprepared: list[TurnSpec] = []
        """Those of them that the executor was not asked to prepare yet."""
        self.active: list[tuple[int, BranchId]] = []
        """Promoting, Prefilling and Decoding turns by age."""
        self.actives: dict[str, list[tuple[int, BranchId]]] = {}
        """The same by tenant."""
        self.flights: dict[StepSeq, StepPlan] = {}
        self.waiting: dict[BranchId, list[Waiting]] = {}
        self.fill_of: dict[BranchId, tuple[BranchId, int]] = {}
        """A queued branch that waits for (a sibling, its turn) to fill the prefix both need."""
        self.leases: dict[BranchId, Lease] = {}
        self.firm: dict[BranchId, tuple[float, int]] = {}
        """Firm leases: until when, and the pages counted for them (shared ones count for each)."""
        self.firm_ends = math.inf
        """No firm lease ends before."""
        self.lease_news: dict[BranchId, str] = {}
        """Why a lease says something else since this event; told with the moves of its rows."""
        self.law = PauseModel()
        self.tool_laws: dict[str, PauseModel] = {}
        self.tools: dict[BranchId, str] = {}
        """The tool that a branch at rest waits for, as its front told."""
        self.growth = Growth()
        """Learnt, where sessions keep their places."""
        self.rested: dict[BranchId, None] = {}
        """Branches at rest in the order in which they came to rest, where sessions keep their places."""
        self.oracle: Callable[[BranchId, float], float] | None = None
        """The true seconds until a branch runs again, in offline runs that know them."""
        self.tickets: dict[TicketId, Ticket] = {}
        self.orders: list[HostCopy] = []
        """Tickets not yet handed out."""
        self.due: dict[BranchId, float] = {}
        """When the rows of a branch under a lease are to be brought back."""
        self.prefetch: list[tuple[float, BranchId]] = []
        """A heap of (when, branch); what `due` does not say is out of date."""
        self.early_seen: tuple[int, ...] = ()
        self.ended: list[int] = []
        """Turns that ended since the last step, for the executor to forget. Only those that it was made ready for or
        that some step computed rows of: it knows no others, and between two steps no more can end than had begun."""
        self.refused: tuple[BranchId, str] | None = None
        """The branch whose turn the last pass refused, and why: no younger turn entered or grew (L3)."""
        self.over_quota: list[BranchId] = []
        """The branches that the last pass refused pages of their tenant's quota: no younger turn of it entered."""
        self.spent = 0
        """Turns up to this age found no token budget left in the last pass; 0: some was left."""
        self.rankings: Rankings | None = None
        """The order in which nodes lose their rows, while one plan is made; None between plans."""
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

    @property
    def waiting_turns(self) -> int:
        """Turns that are not admitted."""
        return len(self.queue) + len(self.preparing)

    # ---- small facts ----------------------------------------------------------------------------------------------
    def tell(self, branch: Branch, message: Outgoing) -> None:
        """Puts a message into `out` for the client of the branch; it leaves at the end of the call of `Core`."""
        self.out.append((branch.link, message))

    def residence(self, branch: Branch) -> Residence:
        """Where the rows of the known tokens are."""
        state = self.states.get(branch.id)
        if isinstance(state, Prefilling | Decoding | Settling):
            device = available = min(state.room.done, branch.known)
        else:
            device, available = self.kv.on_device(branch), branch.resident
        return Residence(device=device, host=available - device, lost=branch.known - available)

    def law_of(self, branch: Branch) -> PauseModel:
        """The pauses of the tool that a branch waits for, as far as any were seen; else of all."""
        return self.tool_laws.get(self.tools.get(branch.id, ""), self.law)

    def pressure(self) -> tuple[int, ...]:
        """Changes whenever a search for rows to save early could find something new."""
        return (self.evicted_pages, self.next_ticket, len(self.active), len(self.queue), len(self.kv.tree.tips))

    def fresh_branch(self) -> BranchId:
        """No other scheduler of the engine gives the same number."""
        self.next_branch += 1
        return BranchId(self.next_branch * self.config.dp + self.config.dp_index)

    def fresh_ticket(self) -> TicketId:
        self.next_ticket += 1
        return TicketId(self.next_ticket)

    # ---- moving branches ------------------------------------------------------------------------------------------
    def rest(self, state: Held) -> None:
        """Files a branch at rest. Its turn, if it had one, is off the lists."""
        self.states[state.branch.id] = state
        self.kv.moved.add(state.branch.id)

    def enqueue(self, state: Queued) -> None:
        """Files a turn that waits, at its age; one that waits for its preparation is in no queue."""
        number = state.branch.id
        self.states[number] = state
        if state.turn.waits:
            self.preparing[state.turn.spec.turn] = number
            return
        insort(self.queue, (state.turn.age, number))
        insort(self.queues.setdefault(tenant_of(state.branch.root), []), (state.turn.age, number))

    def activate(self, state: Promoting | Prefilling | Decoding) -> None:
        """Files a turn that was admitted, at its age. It has left the queue."""
        self.states[state.branch.id] = state
        insort(self.active, (state.turn.age, state.branch.id))
        insort(self.actives.setdefault(tenant_of(state.branch.root), []), (state.turn.age, state.branch.id))

    def dequeue(self, turn: Turn, branch: Branch) -> None:
        """Takes a turn off the queue."""
        if turn.waits:
            del self.preparing[turn.spec.turn]
            return
        _unlist(self.queue, self.queues, turn, branch)
        _ = self.fill_of.pop(branch.id, None)

    def deactivate(self, turn: Turn, branch: Branch) -> None:
        """Takes a turn off the active ones."""
        _unlist(self.active, self.actives, turn, branch)

    def leave(self, state: Promoting | Prefilling | Decoding, then: Then, now: float) -> None:
        """An active branch goes back to rest, at once or when its rows are acknowledged."""
        number = state.branch.id
        self.deactivate(state.turn, self.kv.branches[number])
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
        branch.rested_at = now  # also of a turn that ended in the queue: waiting there was no pause of its session
        if self.rankings is not None:
            self.rankings.moved(branch.leaf, branch.seed)
        if self.config.turns_in_place > 1:
            self._learn_growth(branch, turn)
        if turn.admitted and turn.filled_at is None:
            turn.new, turn.recomputed = turn.shared + turn.rows_new, turn.rows_again
        if turn.rows_new or turn.rows_again or turn.prepared:
            self.ended.append(turn.spec.turn)
        message = turn.bound if turn.end == "max_tokens" else turn.message
        self.tell(
            branch,
            TurnEnded(branch=branch.id, reason=turn.end, known=branch.known, usage=usage(turn, now), message=message),
        )

    def _learn_growth(self, branch: Branch, turn: Turn) -> None:
        self.rested[branch.id] = None
        session = self.sessions[branch.session]
        if turn.enters:
            if not turn.admitted and session.turns_in_place == 1 and session.place == turn.age:
                session.turns_in_place = 0  # it was not let in: the next turn is to enter
        elif turn.admitted:
            session.grown += turn.added
            self.growth.turn_ended(turn.added)

    def end_visit(self, session: Session) -> None:
        """A session leaves its place, if it has one. Of visits of one turn, and those left before their turns ended,
        nothing is learnt."""
        if session.grown:
            self.growth.visit_ended(session.grown)
        session.turns_in_place = session.grown = 0

    def forget(self, branch: Branch) -> None:
        """A closed branch leaves the tables; its session with the last of them."""
        _ = self.rested.pop(branch.id, None)
        _ = self.states.pop(branch.id, None)
        _ = self.kv.branches.pop(branch.id, None)
        self.end_lease(branch.id)
        _ = self.tools.pop(branch.id, None)
        session = self.sessions[branch.session]
        session.branches.discard(branch.id)
        if not session.branches:
            self.end_visit(session)
            del self.sessions[branch.session]

    def end_lease(self, number: BranchId) -> None:
        """Takes a branch's lease away, and its prefetch with it; nothing is told. Without a lease it does nothing."""
        _ = self.leases.pop(number, None)
        _ = self.firm.pop(number, None)
        _ = self.due.pop(number, None)
        _ = self.lease_news.pop(number, None)  # of the lease that has ended

    def hold_firm(self, number: BranchId, until: float, pages: int) -> None:
        """Counts `pages` for a firm lease until then. The caller has checked the budget (`sched.leases`)."""
        self.firm[number] = (until, pages)
        self.firm_ends = min(self.firm_ends, until)

    def soften(self, number: BranchId, why: str) -> None:
        """A firm lease goes on as a soft one; its holder hears it with the end of this event."""
        _ = self.firm.pop(number, None)
        self.leases[number] = msgspec.structs.replace(self.leases[number], keep="soft")
        self.lease_news[number] = why

    def lapse(self, now: float) -> None:
        """Firm leases that have ended become soft: their pages hold back no turn any more."""
        if now < self.firm_ends:
            return
        for number in [number for number, (until, _) in self.firm.items() if until <= now]:
            self.soften(number, "its firm lease has ended: kept as long as no running turn needs the pages")
        self.firm_ends = min((until for until, _ in self.firm.values()), default=math.inf)

    def tell_leases(self) -> None:
        """Every holder of a lease hears once an event where its rows are now, if that is not what it heard last."""
        moved = self.kv.taken_moves()
        news, self.lease_news = self.lease_news, {}
        for number in sorted((moved | news.keys()) & self.leases.keys()):
            branch, lease = self.kv.branches[number], self.leases[number]
            residence = self.residence(branch)
            reasons = [news[number]] if number in news else []
            if residence != lease.residence:
                reasons.append(_moved_why(branch, lease.residence, residence))
            if reasons:
                changed = msgspec.structs.replace(lease, residence=residence, why="; ".join(reasons))
                self.leases[number] = changed
                self.tell(branch, LeaseChanged(branch=number, lease=changed))

    def _answer_forks(self, waiting: list[Waiting], known: int) -> None:
        for wait in waiting:
            if wait.children:
                self.out.append((wait.link, Forked(request=wait.request, branches=wait.children, known=known)))

    def _answer(self, waiting: list[Waiting], known: int) -> None:
        for wait in waiting:
            if not wait.children:
                self.out.append((wait.link, Done(request=wait.request, known=known)))


def _unlist(
    listed: list[tuple[int, BranchId]], of: dict[str, list[tuple[int, BranchId]]], turn: Turn, branch: Branch
) -> None:
    tenant = tenant_of(branch.root)
    for turns in (listed, of[tenant]):
        index = bisect_left(turns, (turn.age, branch.id))
        if index == len(turns) or turns[index] != (turn.age, branch.id):
            raise BrokenInvariant(f"branch {branch.id} is not listed where its state says")
        del turns[index]
    if not of[tenant]:
        del of[tenant]


def _moved_why(branch: Branch, was: Residence, now: Residence) -> str:
    if was.device + was.host + was.lost != branch.known:
        return "its log has changed"
    if now.lost > was.lost:
        return branch.lost_why or "its log has changed"
    if now.device < was.device:
        return "its rows moved to the host: a running turn needed their device pages"
    return "its rows came back to the device"


def usage(turn: Turn, now: float) -> TurnUsage:
    """What a turn cost until `now`."""
    filled = turn.filled_at if turn.filled_at is not None else now
    started = turn.started_at if turn.admitted else now
    return TurnUsage(
        new=turn.new,
        resumed_device=turn.resumed_device,
        resumed_host=turn.resumed_host,
        recomputed=turn.recomputed,
        shared=turn.shared,
        drawn=turn.drawn,
        preempted=turn.preempted,
        queue_seconds=started - turn.queued_at,
        prefill_seconds=max(0.0, filled - started),
        decode_seconds=max(0.0, now - filled),
        why=turn.why,
    )


__all__ = ["Next", "Out", "SchedulerState", "Session", "Ticket", "Waiting", "usage"]
