"""Breadth-first search over every interleaving of user verbs, plans and acknowledgements, on production code.

Safety: the ledger is recounted in every state. Liveness: from every state, when users fall silent, the machine alone
(plan when it can, else acknowledge) must come to a state in which no turn runs. That walk is deterministic, so it is a
graph with one edge a state, and one pass over it proves or refutes liveness for all states at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from sys import intern
from typing import Any, NamedTuple, TypeAlias

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId, LinkId, StepSeq
from agentspeed_engine.kv.branch_states import Held
from agentspeed_engine.kv.transitions import BRANCHES
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import Drawn, StepResult
from agentspeed_engine.sched.state import SchedulerState
from tests.modelcheck.spoilt import SPOILT, check_suspects, first_sampled, suspects

LINK = LinkId(1)
STOP = 3


class _ClientDies:
    """All sessions of the link end at once."""

    def __repr__(self) -> str:
        return "the client dies"


GONE = _ClientDies()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What is explored."""

    pages: int = 4
    page_tokens: int = 2
    context_limit: int = 6
    depth: int = 0
    decode_ahead: bool = False
    """Rows are issued for tokens in flight. Then a step may also draw the token that ends a turn, or refuse one; and a
    turn of those that a user begins has a stop string, so nothing runs ahead of its tokens."""
    spoils: bool = False
    """The first sample of a step may be no finite numbers, and what its turn read and wrote is then to be found by
    nobody (`spoilt`)."""
    prepares: bool = False
    """Turns with stop strings wait to be prepared, which ends well or not, at any moment."""
    turns_in_place: int = 1
    """With more, branches keep their places: pauses take no time here, so they always do while they may."""
    firm_pages: int = 0
    host_slots: int = 0
    """With any, every copy may end well or fail, at any moment."""
    tenant_pages: int | None = None
    """With a quota, sessions are of two tenants: those opened before the search in turn, others of either."""
    branches: int = 2
    """Branches that may exist at once."""
    verbs: int = 5
    """User verbs in a history."""
    most: int = 3
    """Tokens that the longest turns ask for."""
    setup: tuple[tuple[int, ...], ...] = ()
    """Sessions opened before the search begins, by their ids."""
    turns: tuple[int, ...] = ()
    """Branches that had a turn before the search begins, one after the other, with nobody interfering."""
    max_states: int = 10_000_000

    def config(self) -> CoreConfig:
        return CoreConfig(
            pages=self.pages,
            page_tokens=self.page_tokens,
            context_limit=self.context_limit,
            vocab_size=4,
            prefill_chunk=3,
            extend_tokens=2,
            depth=self.depth,
            decode_ahead=self.decode_ahead,
            prepares=self.prepares,
            turns_in_place=self.turns_in_place,
            firm_pages=self.firm_pages,
            host_slots=self.host_slots,
            tenant_pages=self.tenant_pages,
            max_branches=self.branches,
            max_sessions=self.branches,
        )


@dataclass(slots=True)
class Finding:
    """A rule that does not hold, and the shortest history that shows it."""

    rule: str
    trace: list[str]

    def __str__(self) -> str:
        return f"{self.rule}\n" + "\n".join(f"  {number:2}. {action}" for number, action in enumerate(self.trace, 1))


@dataclass(slots=True)
class Explored:
    states: int = 0
    transitions: int = 0
    complete: bool = True
    finding: Finding | None = None
    reached: set[str] = field(default_factory=set[str])
    """States of both machines that some branch or node was in, and commands by the state that they met."""


@dataclass(slots=True)
class _State:
    parent: int
    action: str
    verbs: int
    silent: int = -1
    """Where the machine alone goes from here; -1: nowhere, it is quiet."""
    busy: bool = False


class Found(NamedTuple):
    """A state that was not known when it was come to."""

    verbs: int
    busy: bool
    world: Any
    """As the search keeps it: a `SchedulerState`, or one packed."""


class Move(NamedTuple):
    """One transition."""

    action: str
    machine: bool
    """No user did anything."""
    key: bytes
    found: Found | None


class Expanded(NamedTuple):
    """All that can happen in one state."""

    moves: list[Move]
    reached: set[str]
    broken: tuple[str, str] | None
    """A rule that does not hold, and the action after which it does not. No further action was tried."""


Expand: TypeAlias = Callable[[Container[bytes], deque[tuple[Any, int]]], Iterable[Expanded]]
"""Takes worlds, each with the verbs in its history, and expands them in their order. Of states whose key is known it
tells the key alone."""


def in_turn(bounds: Bounds) -> Expand:
    """One state after the other, as they are asked for."""
    core = begin(bounds)

    def expanding(known: Container[bytes], level: deque[tuple[Any, int]]) -> Iterator[Expanded]:
        while level:
            yield expand(core, bounds, lambda key: key not in known, *level.popleft())

    return expanding


def explore(
    bounds: Bounds,
    progress: Callable[[int, int], None] = lambda states, waiting: None,
    expanding: Expand | None = None,
    kept: Callable[[SchedulerState], Any] = lambda world: world,
) -> Explored:
    """Every state within the bounds, or the first finding. `progress` hears of states found and not yet explored.
    `expanding` (`in_turn` when left out) gets worlds in the form that `kept` gives the first. Which one it is changes
    nothing that is found, for its answers are taken in the order of the states."""
    core = begin(bounds)
    found = Explored()
    states: list[_State] = [_State(-1, "", 0)]
    index: dict[bytes, int] = {digest(core.key(), 0): 0}
    level: deque[tuple[Any, int]] = deque([(kept(core.world), 0)])
    cursor, expanding = 0, expanding or in_turn(bounds)
    while level:
        following: deque[tuple[Any, int]] = deque()
        for expanded in expanding(index, level):
            here = states[cursor]
            found.reached |= expanded.reached
            for move in expanded.moves:
                found.transitions += 1
                number = index.get(move.key)
                if number is None:
                    if len(states) >= bounds.max_states or move.found is None:
                        found.complete = False
                        continue
                    number = index[move.key] = len(states)
                    states.append(_State(cursor, move.action, move.found.verbs, busy=move.found.busy))
                    following.append((move.found.world, move.found.verbs))
                if move.machine and here.silent < 0 and number != cursor:
                    here.silent = number
            if expanded.broken is not None:
                rule, action = expanded.broken
                found.finding = Finding(rule, [*_trace(states, cursor), action])
                found.states = len(states)
                return found
            cursor += 1
            if cursor % 1000 == 0:
                progress(len(states), len(states) - cursor)
        level = following
    found.states = len(states)
    if found.complete:
        found.finding = _not_live(states)
    return found


def expand(core: Core, bounds: Bounds, is_new: Callable[[bytes], bool], world: SchedulerState, verbs: int) -> Expanded:
    """Does each action in `world`, which is used up. The worlds it finds are not copied."""
    moves, reached = list[Move](), set[str]()
    following = list(actions(world, bounds, verbs))
    for place, action in enumerate(following, 1):
        machine = isinstance(action, str)
        if not machine:
            reached.add(_met(world, action))
        if place < len(following):
            core.restore(world)
        else:
            core.world = world
        try:
            oldest = _oldest(core.world)
            suspected = suspects(core.world, action) if bounds.spoils else []
            carry_out(core, action)
            core.check()
            _check_oldest(core.world, oldest)
            check_suspects(core, suspected)
        except (BrokenInvariant, LookupError, ValueError) as broken:
            rule = str(broken) if isinstance(broken, BrokenInvariant) else f"crash: {broken!r}"
            return Expanded(moves, reached, (rule, _name(action)))
        spent = verbs if machine else verbs + 1
        key = digest(core.key(), spent)
        found = None
        if is_new(key):
            reached |= _kinds(core.world)
            found = Found(spent, _busy(core.world), core.world)
        moves.append(Move(_name(action), machine, key, found))
    return Expanded(moves, reached, None)


def begin(bounds: Bounds) -> Core:
    """What every history begins with."""
    core = Core(bounds.config())
    tenants = _tenants(bounds)
    for number, ids in enumerate(bounds.setup):
        tenant = tenants[number % len(tenants)]
        _ = core.handle(LINK, wire.Open(request=1, ids=pack_ids(ids), tenant=tenant), 0.0)
    for branch in bounds.turns:
        _play(core, branch)
    return core


def _tenants(bounds: Bounds) -> tuple[str, ...]:
    return ("",) if bounds.tenant_pages is None else ("a", "b")


def digest(key: Hashable, verbs: int) -> bytes:
    """128 bits instead of a key of kilobytes: among ten million states two that differ meet with a chance of 1e-25."""
    return blake2b(repr((key, verbs)).encode(), digest_size=16).digest()


def actions(world: SchedulerState, bounds: Bounds, verbs: int) -> Iterator[Any]:
    """The machine's moves first, in the order in which it takes them when nobody interferes."""
    if len(world.flights) <= bounds.depth:
        yield "plan"
    if world.flights:
        yield "acknowledge"
        sampled = first_sampled(world) is not None
        if bounds.decode_ahead and sampled:
            yield "acknowledge stop"
            yield "acknowledge refused"
        if bounds.spoils and sampled:
            yield SPOILT
    for index in range(len(world.tickets)):
        yield f"copied {index}"
    for index in range(len(world.tickets)):
        yield f"failed {index}"
    for index in range(len(world.preparing)):
        yield f"prepared {index}"
        yield f"unprepared {index}"
    if verbs >= bounds.verbs:
        return
    if len(world.states) < bounds.branches:
        for tenant in _tenants(bounds):
            for ids in ((1,), (1, 1, 1)):
                yield wire.Open(request=1, ids=pack_ids(ids), tenant=tenant)
    if world.states:
        yield GONE
    for number in sorted(world.states):
        yield from _verbs(world, number, len(world.states) < bounds.branches, bounds)


def _verbs(world: SchedulerState, number: Any, room: bool, bounds: Bounds) -> Iterator[Any]:
    state = world.states[number]
    if isinstance(state, Held):
        known = state.branch.known
        for ids, most in (((), 1), ((1, 2), bounds.most), ((2,), 0)):
            if known + len(ids):
                yield wire.Generate(request=1, branch=number, ids=pack_ids(ids), max_tokens=most, stop_ids=(STOP,))
        if bounds.decode_ahead or bounds.prepares:
            yield wire.Generate(request=1, branch=number, ids=pack_ids((2,)), max_tokens=3, stop_strings=(b"x",))
        for cut in {0, known // 2, known - 1} - {known, -1}:
            yield wire.Rewind(request=1, branch=number, tokens=cut)
        for other in sorted(world.states):
            if other != number:
                yield wire.Adopt(request=1, branch=number, child=other)
        if bounds.firm_pages:
            yield wire.Expect(request=1, branch=number, seconds=9.0, keep="firm")
    else:
        yield wire.Cancel(request=1, branch=number)
        yield wire.Cancel(request=1, branch=number, cut=0)
    if room:
        yield wire.Fork(request=1, branch=number, n=1)
    yield wire.Close(request=1, branch=number)


def carry_out(core: Core, action: Any) -> None:
    if action == "plan":
        _ = core.plan(0.0)
        _ = core.events()
        _ = core.host_copies()
        _ = core.preparations()
    elif isinstance(action, str) and action.startswith("acknowledge"):
        _ = core.apply(_result(core.world, action.removeprefix("acknowledge").strip()), 0.0)
    elif isinstance(action, str) and "prepared" in action:
        how, index = action.split()
        turn = list(core.world.preparing)[int(index)]
        _ = core.prepared(turn, None if how == "prepared" else "refused", 0.0)
    elif isinstance(action, str):
        how, index = action.split()
        _ = core.copied(list(core.world.tickets)[int(index)], how == "copied", 0.0)
    elif action is GONE:
        _ = core.drop_link(LINK, 0.0)
    else:
        _ = core.handle(LINK, action, 0.0)


def _result(world: SchedulerState, first: str) -> StepResult:
    """Of the oldest step. `first`: what the first of its samples came to, a `stop`, `refused` or `spoilt`; the others
    go on."""
    seq = StepSeq(min(world.flights))
    rows = [row for row in world.flights[seq].rows if row.sample is not None]
    refused = [(row.branch, row.epoch, first) for row in rows[:1]] if first in ("refused", "spoilt") else []
    drawn = [
        Drawn(row.branch, row.epoch, STOP if first == "stop" and not place else 1)
        for place, row in enumerate(rows)
        if place or not refused
    ]
    spoilt = frozenset((branch, epoch) for branch, epoch, reason in refused if reason == "spoilt")
    return StepResult(seq, tuple(drawn), tuple(refused), spoilt=spoilt)


def _play(core: Core, number: int) -> None:
    """A turn to its end, every copy ending well."""
    carry_out(core, wire.Generate(request=1, branch=number, ids=pack_ids((1,)), max_tokens=1, stop_ids=(STOP,)))
    for _ in range(100):
        if not _busy(core.world) and not core.world.tickets:
            return
        carry_out(core, "plan")
        if core.world.flights:
            carry_out(core, "acknowledge")
        elif core.world.tickets:
            carry_out(core, "copied 0")
        core.check()
    raise BrokenInvariant(f"the turn of branch {number} before the search does not end")


def _oldest(world: SchedulerState) -> tuple[int, BranchId, int] | None:
    """(age, branch, times preempted) of the oldest unfinished turn; at one place the branch decides."""
    return min(
        (
            (state.turn.age, number, state.turn.preempted)
            for number, state in world.states.items()
            if not isinstance(state, Held)
        ),
        default=None,
    )


def _check_oldest(world: SchedulerState, before: tuple[int, BranchId, int] | None) -> None:
    """The heart of the theorem: nobody takes room from the oldest unfinished turn."""
    state = None if before is None else world.states.get(before[1])
    if before is None or state is None or isinstance(state, Held) or state.turn.age != before[0]:
        return
    if state.turn.preempted > before[2]:
        raise BrokenInvariant("(L4) the oldest turn was preempted")


def _kinds(world: SchedulerState) -> set[str]:
    return {type(one).__name__ for one in world.states.values()} | {
        type(node.state).__name__ for node in world.kv.tree.nodes.values()
    }


def _met(world: SchedulerState, command: Any) -> str:
    """Such as "Fork of a Queued branch"."""
    number = getattr(command, "branch", None)
    of = f" of a {type(world.states[number]).__name__} branch" if number is not None else ""
    return f"{type(command).__name__}{of}"


def pairs() -> set[str]:
    """Every command that users can give a branch, by the state it may meet: the search must come to each."""
    at_rest = {f"{verb} of a Held branch" for verb in ("Generate", "Rewind", "Adopt", "Expect", "Fork", "Close")}
    return at_rest | {
        f"{verb} of a {state} branch"
        for state in set(BRANCHES) - {"Held", "Closed"}
        for verb in ("Cancel", "Fork", "Close")
    }


def _busy(world: SchedulerState) -> bool:
    return any(not isinstance(state, Held) for state in world.states.values())


def _not_live(states: list[_State]) -> Finding | None:
    """The first state from which the machine alone never comes to rest."""
    settled = bytearray(len(states))
    for start in range(len(states)):
        path: list[int] = []
        number = start
        while not settled[number]:
            settled[number] = 2
            path.append(number)
            following = states[number].silent
            if following < 0:
                if states[number].busy:
                    return Finding("a turn never ends: the machine is stuck", _trace(states, number))
                break
            if settled[following] == 2 and following in path:
                return Finding(
                    "a turn never ends: the machine goes in circles",
                    [*_trace(states, number), f"and back to step {len(_trace(states, following))}"],
                )
            number = following
        for passed in path:
            settled[passed] = 1
    return None


def _trace(states: list[_State], number: int) -> list[str]:
    actions: list[str] = []
    while number > 0:
        actions.append(states[number].action)
        number = states[number].parent
    return actions[::-1]


def _name(action: Any) -> str:
    return intern(action if isinstance(action, str) else repr(action).replace("request=1, ", ""))
