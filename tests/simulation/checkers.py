"""What must hold after every event of a simulated run, and what must hold at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, final

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, NodeId
from agentspeed_engine.kv.branch_states import Held
from agentspeed_engine.kv.tree import upward
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.ranking import Rankings
from agentspeed_engine.sched.reclaim import reclaim
from agentspeed_engine.sched.state import SchedulerState
from tests.simulation.front import Handle

if TYPE_CHECKING:
    from tests.simulation.agents import Agent
    from tests.simulation.marks import Event


class Violation(AssertionError):
    """A rule does not hold. The rule's name comes first."""


class Sight(IntEnum):
    """How far the rules look into the engine and its device; each level has those before it."""

    USER = 0
    """Not at all: tokens, turns that end, agents that come to their end, pages that can be had when all is over."""
    INSIDE = 1
    """The rows of every page against the history they must carry; limits, leases and ages in the core's tables."""
    LEDGER = 2
    """The owners of all pages and slots, recounted."""


@final
@dataclass(frozen=True, slots=True)
class Promise:
    """A firm lease as its holder heard it."""

    until: float
    device: int


@final
@dataclass(slots=True)
class Checkers:
    """The rules, and what they remember from one event to the next."""

    sight: Sight = Sight.LEDGER
    promises: dict[int, Promise] = field(default_factory=dict[int, Promise])
    granted: int = 0
    broken: int = 0
    leaked_pages: int = 0
    """Pages that nobody can have after all sessions closed."""
    oldest: tuple[int, int] | None = None

    # ---- after every event ----------------------------------------------------------------------------------------
    def after(self, core: Core, event: Event) -> None:
        if self.sight is Sight.USER:
            return
        if self.sight is Sight.LEDGER:
            try:
                core.check()
            except BrokenInvariant as broken:
                raise Violation(f"ledger: {broken}") from broken
        _bounds(core)
        self._firm_leases(core, event.now)
        self._oldest(core)

    def told(self, core: Core, handle: Handle, command: wire.Command) -> None:
        """What an agent itself does to a branch ends or narrows what it was promised."""
        number = handle.number
        match command:
            case wire.Rewind(tokens=tokens) if number in self.promises:
                promise = self.promises[number]
                self.promises[number] = Promise(promise.until, min(promise.device, tokens))
            case wire.Generate() | wire.Close() | wire.Expect() | wire.Adopt():
                _ = self.promises.pop(number or 0, None)
            case _:
                pass

    def leased(self, branch: int, lease: wire.Lease) -> None:
        """An answer to `Expect`."""
        if lease.keep == "firm":
            self.granted += 1
            self.promises[branch] = Promise(lease.until, lease.residence.device)

    def forget(self) -> None:
        """The engine died, and what it promised with it."""
        self.promises.clear()
        self.oldest = None

    def _firm_leases(self, core: Core, now: float) -> None:
        for number, promise in list(self.promises.items()):
            state = core.world.states.get(BranchId(number))
            if now >= promise.until or not isinstance(state, Held):
                del self.promises[number]
                continue
            device = core.world.residence(state.branch).device
            if device < promise.device:
                self.broken += 1
                raise Violation(
                    f"firm lease broken: branch {number} was promised {promise.device} tokens on the "
                    f"device until {promise.until:.3f} and has {device}"
                )

    def _oldest(self, core: Core) -> None:
        """The heart of liveness: nobody takes room from the oldest unfinished turn."""
        turns = [state.turn for state in core.world.states.values() if not isinstance(state, Held)]
        if self.oldest is not None:
            for turn in turns:
                if turn.age == self.oldest[0] and turn.preempted > self.oldest[1]:
                    raise Violation("(L4) the oldest turn was preempted")
        self.oldest = min(((turn.age, turn.preempted) for turn in turns), default=None)


def _bounds(core: Core) -> None:
    """Every table is within its limit, and firm leases hold no more than F."""
    world, config = core.world, core.config
    for name, count, limit in (
        ("sessions", len(world.sessions), config.max_sessions),
        ("waiting turns", len(world.queue), config.max_waiting),
        ("steps in flight", len(world.flights), config.depth + 1),
        (
            "branches of a session",
            max((len(one.branches) for one in world.sessions.values()), default=0),
            config.max_branches,
        ),
    ):
        # A live fork may put a turn back into a full queue: it was admitted once and keeps its place.
        spare = len(world.states) if name == "waiting turns" else 0
        if count > limit + spare:
            raise Violation(f"bound passed: {count} {name}, at most {limit}")
    held = firm_pages(core)
    if held > config.firm_budget():
        raise Violation(f"(L1) firm leases hold {held} pages, more than the {config.firm_budget()} they may")


def firm_pages(core: Core) -> int:
    """Device pages that cannot go because of firm leases, counted once each."""
    world = core.world
    seen: set[NodeId] = set()
    pages = 0
    for number in world.firm:
        branch = world.states[number].branch
        for end in (branch.leaf, branch.seed):
            if end is None:
                continue
            for node in upward(end):
                if node.id not in seen:
                    seen.add(node.id)
                    pages += len(node.pages)
    return pages


# ---- at the end ---------------------------------------------------------------------------------------------------
def everybody_came_to_an_end(agents: list[Agent], handles: list[Handle]) -> None:
    """Every agent finished or knows by name why not; no turn is left."""
    for agent in agents:
        if agent.state == "running":
            raise Violation(f"wedged: {agent.label} never came to its end; it waits on {agent.on}")
    for handle in handles:
        if handle.running and handle.number is not None:
            raise Violation(f"wedged: the turn of branch {handle.number} never ended")


def nothing_is_left(core: Core, now: float) -> None:
    """All sessions are closed: nobody owns or awaits anything, and no node is referred to."""
    counts = core.counts()
    for name in ("branches", "sessions", "pages_tail", "tickets", "steps_in_flight", "waiting_turns", "pages_firm"):
        if counts[name]:
            raise Violation(f"leak: {counts[name]} {name} after all sessions closed")
    for node in core.world.kv.tree.nodes.values():
        if node.leaf_of or node.seed_of or node.pinned_by:
            raise Violation(f"leak: {node!r} is still referred to after all sessions closed")
        if node.root[2].partition("\0")[2]:
            raise Violation(f"leak: {node!r} of a private session outlives it")


def pages_nobody_can_have(core: Core, now: float) -> int:
    """Evicts everything that is cached and returns the pages that are not free then."""
    world = core.world
    while not everything_goes(world, now) and world.tickets:
        for ticket in list(world.tickets):
            _ = core.copied(ticket, True, now)
    return world.kv.pages.total - world.kv.pages.free


def everything_goes(world: SchedulerState, now: float) -> bool:
    world.rankings = Rankings()  # a plan's, and what copies changed since the last one is not in it
    return reclaim(world, world.kv.pages.total, now)


def tokens_are_undisturbed(agents: dict[str, Agent], peaceful: dict[str, Agent]) -> int:
    """Whoever came to its end heard what it hears when nothing goes wrong. Returns the turns compared."""
    compared = 0
    for label, agent in agents.items():
        twin = peaceful.get(label)
        if twin is None:
            continue  # an arrival that peace had no time for
        for turn, ids in agent.transcript.items():
            if turn in twin.transcript and twin.transcript[turn] != ids:
                raise Violation(f"tokens differ: {turn} has {len(ids)} ids that are not those of an undisturbed run")
            compared += turn in twin.transcript
        missing = twin.transcript.keys() - agent.transcript.keys()
        if agent.state == "finished" and missing:
            raise Violation(f"turns missing: {label} came to its end without {', '.join(sorted(missing))}")
    return compared
