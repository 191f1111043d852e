"""The core: commands and results in, replies and plans out. It does no I/O and reads no clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import final

from agentspeed_engine.errors import BrokenInvariant, EngineFault
from agentspeed_engine.ids import LinkId, TicketId
from agentspeed_engine.kv import ledger
from agentspeed_engine.kv.branch_states import Queued
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.messages import (
    Adopt,
    Append,
    Cancel,
    Close,
    Command,
    Expect,
    Failed,
    Fork,
    Generate,
    GetStats,
    Hello,
    Inspect,
    Look,
    Open,
    Picture,
    Rewind,
    SessionView,
    Stats,
)
from agentspeed_engine.sched import commands, inspection, outcome, search_snapshot, step, tickets
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.plan import HostCopy, StepPlan, StepResult
from agentspeed_engine.sched.state import Out, SchedulerState

_VERBS: dict[type, Callable[..., None]] = {
    Open: commands.open_session,
    Append: commands.append,
    Generate: commands.generate,
    Cancel: commands.cancel,
    Fork: commands.fork,
    Rewind: commands.rewind,
    Adopt: commands.adopt,
    Close: commands.close,
    Expect: commands.expect,
    Inspect: commands.inspect,
}


@final
class Core:
    """One engine's scheduler. `handle` never raises for what a front sent; `BrokenInvariant` is always our bug."""

    def __init__(self, config: CoreConfig) -> None:
        """Raises `EngineFault` (bad_config) when a turn could wait for ever (L1)."""
        config.check()
        self.config = config
        self.world = SchedulerState(config)

    def handle(self, link: LinkId, command: Command, now: float) -> Out:
        """Carries out one command. What it refuses, it refuses whole."""
        world = self.world
        verb = _VERBS.get(type(command))
        if verb is not None:
            world.lapse(now)
            try:
                verb(world, link, command, now)
            except EngineFault as fault:
                world.out.append(
                    (link, Failed(request=command.request, code=fault.code, message=fault.message, remedy=fault.remedy))
                )
            world.tell_leases()
        elif isinstance(command, GetStats):
            world.out.append((link, Stats(request=command.request, counts=self.counts(now), seconds={})))
        elif isinstance(command, Look):
            world.out.append((link, self.picture(command, now)))
        else:
            assert isinstance(command, Hello)
            world.out.append(
                (
                    link,
                    Failed(
                        request=command.request, code="bad_frame", message="Hello is the first frame of a link, once."
                    ),
                )
            )
        return self._taken()

    def drop_link(self, link: LinkId, now: float) -> Out:
        """The front of this link is gone: its branches close, nothing is sent to it any more."""
        self.world.lapse(now)
        commands.drop_link(self.world, link, now)
        self.world.tell_leases()
        return [(to, message) for to, message in self._taken() if to != link]

    def plan(self, now: float) -> StepPlan | None:
        """The next step; None when nothing can be computed now. Events it caused come with `events`."""
        self.world.lapse(now)
        planned = step.plan(self.world, now)
        self.world.tell_leases()
        return planned

    def apply(self, result: StepResult, now: float) -> Out:
        """The outcome of the oldest step in flight."""
        self.world.lapse(now)
        outcome.apply(self.world, result, now)
        self.world.tell_leases()
        return self._taken()

    def events(self) -> Out:
        """What `plan` had to say (turns started, leases changed)."""
        return self._taken()

    def host_copies(self) -> tuple[HostCopy, ...]:
        """Tickets to start now, each given out once."""
        orders, self.world.orders = tuple(self.world.orders), []
        return orders

    def preparations(self) -> tuple[TurnSpec, ...]:
        """Turns that the executor is to be made ready for, each given out once. `prepared` is due for each of them."""
        specs = tuple(spec for spec in self.world.unprepared if spec.turn in self.world.preparing)
        self.world.unprepared = []
        return specs

    def awaits(self, turn: int) -> bool:
        """Whether a turn still waits to be prepared: it may have been cancelled."""
        return turn in self.world.preparing

    def prepared(self, turn: int, refusal: str | None, now: float) -> Out:
        """The executor is ready for a turn. `refusal`: why it can never be; then the turn ends with this reason."""
        self.world.lapse(now)
        outcome.prepared(self.world, turn, refusal, now)
        self.world.tell_leases()
        return self._taken()

    def begun(self, ticket: TicketId) -> None:
        """A ticket is about to be carried out, and may begin: from now on it has no deadline. To be told before a
        `plan` whose `now` is past that moment."""
        tickets.begun(self.world, ticket)

    def copied(self, ticket: TicketId, ok: bool, now: float) -> Out:
        """A ticket was carried out, or failed."""
        self.world.lapse(now)
        tickets.copied(self.world, ticket, ok, now)
        self.world.tell_leases()
        return self._taken()

    def wake_at(self, now: float) -> float | None:
        """When `plan` must be called again though nothing happened: a ticket's deadline, the end of a firm lease, or
        rows to bring back."""
        times = [when for when in (tickets.deadline(self.world), self.world.firm_ends) if when < math.inf]
        if self.world.prefetch:
            times.append(self.world.prefetch[0][0])
        return max(now, min(times)) if times else None

    @property
    def idle(self) -> bool:
        """No session is open."""
        return not self.world.sessions

    def check(self) -> None:
        """The ledger: raises `BrokenInvariant` naming the rule that does not hold."""
        ledger.check(self.world.kv, self.world.states)
        ledger.check_flights(self.world.states, [row for plan in self.world.flights.values() for row in plan.rows])
        _check_tokens_in_flight(self.world)
        _check_queue(self.world)

    def snapshot(self) -> SchedulerState:
        """Everything the core knows, copied; give it to `restore` as often as you like."""
        return search_snapshot.copied(self.world)

    def restore(self, taken: SchedulerState) -> None:
        """Goes back to a snapshot, which stays as it is."""
        self.world = search_snapshot.copied(taken)

    def key(self) -> Hashable:
        """Equal for cores that behave alike."""
        return search_snapshot.key(self.world)

    def describe(self, now: float = 0.0) -> tuple[SessionView, ...]:
        """Sessions, their trees of branches, states, residence, leases, and why something waits."""
        return inspection.describe(self.world, now)

    def picture(self, command: Look, now: float) -> Picture:
        """A picture of the sessions, as many as `command` asks for, and of the owners of the pages. Its size is
        bounded, however many sessions are open."""
        return inspection.picture(self.world, command, now)

    def counts(self, now: float = 0.0) -> dict[str, int]:
        """How many pages each owner has, and how many branches are in each state. It walks the branches that run alone,
        neither the tree nor the branches at rest, so that asking cannot hold up the engine."""
        world, kv = self.world, self.world.kv
        in_tails = sum(len(room.tail) for room in kv.rooms.values())
        in_nodes = kv.pages.total - kv.pages.free - in_tails  # rule (1) of the ledger: there is no other owner
        return {f"branches_{name}": count for name, count in inspection.branches_by_state(world).items()} | {
            "pages_total": kv.pages.total,
            "pages_free": kv.pages.free,
            "pages_tail": in_tails,
            "pages_nodes": in_nodes,
            "nodes": len(kv.tree.nodes),
            "sessions": len(world.sessions),
            "branches": len(world.states),
            "waiting_turns": world.waiting_turns,
            "steps_in_flight": len(world.flights),
            "late_rows_ignored": world.ignored,
            "pages_evicted": world.evicted_pages,
            "pages_copied": world.copied_pages,
            "slots_total": kv.slots.total,
            "slots_free": kv.slots.free,
            "pages_saved": world.saved_pages,
            "pages_loaded": world.loaded_pages,
            "prefetches": world.prefetched,
            "tickets": len(world.tickets),
            "tickets_late": world.late_tickets,
            "preemptions": world.preemptions,
            "pages_firm": sum(pages for until, pages in world.firm.values() if until > now),
        }

    def _taken(self) -> Out:
        out, self.world.out = self.world.out, []
        return out


def _check_tokens_in_flight(world: SchedulerState) -> None:
    """(9): a row whose token is not known names the sample of its own branch right before it."""
    for plan in world.flights.values():
        for row in plan.rows:
            step = None if row.token_of is None else world.flights.get(row.token_of.step)
            if row.token_of is None or step is None:
                continue  # the step was acknowledged since
            samples = [other for other in step.rows if other.sample is not None]
            named = samples[row.token_of.place] if row.token_of.place < len(samples) else None
            if named is None or (named.branch, named.epoch, named.end) != (row.branch, row.epoch, row.position):
                raise BrokenInvariant(f"(9) branch {row.branch} is fed with a token that is not the one before")


def _check_queue(world: SchedulerState) -> None:
    """A turn that waits to be prepared is in no queue, every other queued one is in its place."""
    queued = [state for state in world.states.values() if isinstance(state, Queued)]
    listed = sorted((state.turn.age, state.branch.id) for state in queued if not state.turn.waits)
    waiting = {state.turn.spec.turn: state.branch.id for state in queued if state.turn.waits}
    if listed != world.queue or waiting != world.preparing:
        raise BrokenInvariant(f"queued turns are {listed} and {waiting}, listed {world.queue} and {world.preparing}")
