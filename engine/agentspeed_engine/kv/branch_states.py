"""Who may compute: one final class per state of a branch, and the class body is its row of the table.

Theory of operation
===================

A branch is one path through the tree of computed rows that can be extended by a turn. Its rows live in the tree
(`nodes`) and may be moved or dropped while it rests; this file decides only who may compute, and when room is given
back.

The life of a turn. A branch rests as `Held` and owns no page. `enqueue` makes it `Queued`: the turn has an age, and
nothing else; everything that it would resume from may still be lost. When the scheduler has found pages for the whole
entry, `admit` gives the branch a `Room`: pins on the nodes of its path, and a tail of pages that it alone writes. While
nodes of the path still come from the host the branch is `Promoting`; then it is `Prefilling` until every token of the
prompt has been computed, and `Decoding` from then on. Within these two states the scheduler issues rows into steps and
commits them when the steps come back; the object stays the same, for this happens in every step.

Why there is `Settling`. A step that was launched reads the pages of the path and writes those of the tail until its
result comes back, and nothing can call it off. A branch that is stopped, forked, preempted or closed meanwhile
therefore cannot give its room back yet. `leave` takes the order (`Then`) and returns `Settling` exactly when rows are
in flight. In this state nothing is released, whatever is asked: further orders are added to the first one
(`strengthen`), the later ones may only be stronger, and `ack` of the last row carries them out. So "aborted while a
step still writes" is a type, and the verbs that would release something are not attributes of it.

Three numbers of a room. `known` counts the ids in the log, `issued` the rows that went into steps, `done` the rows
that came back. `done <= known - 1` while a branch is scheduled, so there is a token to feed. `issued <= known`, except
that a decoding branch may have one row issued for the token that a step in flight is about to sample. If the log never
takes that token, because the turn was left first, the row is dead: it is acknowledged and does not count as done.

Who may write. The object of a state owns its `Branch` (`linear.Linear`) and is its only writer. A verb takes the
branch out of the object it is called on and hands it to the successor, so a reference to the old object raises
`UseAfterMove`. A verb checks before it takes; after that it cannot fail. Which verbs a state has is static: mypy and
pyright reject the others, and a test holds what they accept against the tables (`tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias, final

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.ids import BranchId
from agentspeed_engine.kv.branch import Branch, Room
from agentspeed_engine.kv.kv_cache import KvCache
from agentspeed_engine.kv.linear import HELD, Linear
from agentspeed_engine.kv.turn import Turn


class Next(IntEnum):
    """Where a branch that leaves its room goes; a later order may only be stronger."""

    REQUEUE = 0
    HOLD = 1
    CLOSE = 2


@final
@dataclass(frozen=True, slots=True)
class Then:
    """What follows `leave`: children to be born at rest, and the branch's own next state."""

    next: Next
    children: tuple[BranchId, ...] = ()

    def strengthened(self, other: Then) -> Then:
        """Both orders at once: all the children, and the stronger of the two next states."""
        return Then(max(self.next, other.next), self.children + other.children)


@final
@dataclass(frozen=True, slots=True)
class AtRest:
    """A branch without room, and the children that were waiting for it to come to rest."""

    state: Held | Queued | Closed
    children: tuple[Held, ...]


class _OfBranch(Linear[Branch]):
    """Owns a branch: the one object that may change it."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def branch(self) -> Branch: ...

    else:
        branch = HELD


class _WithTurn(_OfBranch):
    """Carries a turn that has not ended."""

    __slots__ = ("turn",)

    def __init__(self, branch: Branch, turn: Turn) -> None:
        super().__init__(branch)
        self.turn = turn


class _Active(_WithTurn):
    """Has room: pins on its path, and a tail of pages."""

    __slots__ = ("room",)

    def __init__(self, branch: Branch, turn: Turn, room: Room) -> None:
        super().__init__(branch, turn)
        self.room = room


@final
class Held(_OfBranch):
    """At rest: it owns no page. Its rows may be kept, moved or lost without asking it."""

    __slots__ = ()

    def append(self, ids: Sequence[int]) -> Held:
        branch = self._take()
        branch.log.append(ids)
        branch.moves += 1
        return Held(branch)

    def enqueue(self, turn: Turn) -> Queued:
        branch = self._take()
        branch.serial += 1
        branch.moves += 1
        return Queued(branch, turn)

    def fork(self, kv: KvCache, children: tuple[BranchId, ...]) -> tuple[Held, tuple[Held, ...]]:
        """Two references a child, whatever the context."""
        branch = self._take()
        return Held(branch), _born(kv, branch, children)

    def rewind(self, kv: KvCache, cut: int) -> Held:
        """The log goes back to its first `cut` ids; nothing is allocated or copied."""
        branch = self._take()
        branch.log.cut(cut)
        branch.moves += 1
        branch.computed = min(branch.computed, cut)
        kv.position(branch, cut)
        return Held(branch)

    def adopt(self, kv: KvCache, child: Held, now: float) -> tuple[Held, Closed]:
        """Takes the child's log and leaf; the child ends."""
        branch, other = self._take(), child._take()
        branch.log = other.log
        branch.computed, branch.lost_why = other.computed, other.lost_why
        branch.serial = max(branch.serial, other.serial)
        branch.rested_at = max(branch.rested_at, other.rested_at)
        branch.moves += 1
        kv.settle_on(branch, other.leaf, other.seed, other.seed_rows)
        kv.release(other, now)
        return Held(branch), Closed(other.id)

    def close(self, kv: KvCache, now: float) -> Closed:
        branch = self._take()
        kv.release(branch, now)
        return Closed(branch.id)


@final
class Queued(_WithTurn):
    """A turn waits for room, at its age. No room, no pin: everything it resumes from may still be lost."""

    __slots__ = ()

    def admit(self, kv: KvCache, room: Room) -> Promoting | Prefilling:
        """The room was made by `KvCache.enter`, all or nothing (L2). Promoting while rows are still on their way."""
        branch = self._take()
        if kv.unreadable(branch):
            return Promoting(branch, self.turn, room)
        return Prefilling(branch, self.turn, room)

    def fork(self, kv: KvCache, children: tuple[BranchId, ...]) -> tuple[Queued, tuple[Held, ...]]:
        branch = self._take()
        return Queued(branch, self.turn), _born(kv, branch, children)

    def abort(self) -> Held:
        return Held(self._take())

    def close(self, kv: KvCache, now: float) -> Closed:
        branch = self._take()
        kv.release(branch, now)
        return Closed(branch.id)


@final
class Promoting(_Active):
    """Active: it has its pins and its tail, and waits for nodes of its path to be loaded. No row is in flight."""

    __slots__ = ()

    def landed(self) -> Prefilling:
        """Every node of the path is readable."""
        self.room.stale = True
        return Prefilling(self._take(), self.turn, self.room)

    def lost(self, kv: KvCache, now: float) -> Queued:
        """A node of the path did not come: the room goes back, the turn waits at its age and enters with less."""
        branch = self._take()
        kv.freeze(branch, self.room, now)
        return Queued(branch, self.turn)

    def leave(self, kv: KvCache, then: Then, now: float) -> AtRest:
        """Loads in flight are the nodes' own and go on."""
        return _come_to_rest(kv, self._take(), self.turn, self.room, then, now)


@final
class Prefilling(_Active):
    """Active: rows of known ids are being computed. Others that need the same rows wait for them (`fill`)."""

    __slots__ = ()

    def issue(self, tokens: int) -> None:
        _issue(self.branch, self.room, tokens)

    def commit(self, kv: KvCache, tokens: int) -> None:
        _commit(kv, self.branch, self.room, tokens)

    def seal(self, kv: KvCache, now: float) -> None:
        kv.seal(self.branch, self.room, now)

    def filled(self) -> Decoding:
        return Decoding(self._take(), self.turn, self.room)

    def leave(self, kv: KvCache, then: Then, now: float) -> Settling | AtRest:
        return _leave(kv, self._take(), self.turn, self.room, then, now)


@final
class Decoding(_Active):
    """Active: one drawn token after the other."""

    __slots__ = ()

    def issue(self, tokens: int) -> None:
        """While the newest token is in flight, one row more may be issued than ids are known: the one it is fed to."""
        room = self.room
        _issue(self.branch, room, tokens, 1 if room.flight else 0)

    def commit(self, kv: KvCache, tokens: int) -> None:
        _commit(kv, self.branch, self.room, tokens)

    def seal(self, kv: KvCache, now: float) -> None:
        kv.seal(self.branch, self.room, now)

    def leave(self, kv: KvCache, then: Then, now: float) -> Settling | AtRest:
        return _leave(kv, self._take(), self.turn, self.room, then, now)


@final
class Settling(_Active):
    """Left while rows were in flight: pins and tail stay until the last of them is acknowledged."""

    __slots__ = ("then",)

    def __init__(self, branch: Branch, turn: Turn, room: Room, then: Then) -> None:
        super().__init__(branch, turn, room)
        self.then = then

    def ack(self, kv: KvCache, tokens: int, now: float) -> Settling | AtRest:
        """One step's rows came back; the last one lets go of the room. A row that was fed with a token which the log
        never took is dead: it is acknowledged and does not count as done."""
        branch, room = self._take(), self.room
        _commit(kv, branch, room, tokens)
        if room.flight:
            return Settling(branch, self.turn, room, self.then)
        return _come_to_rest(kv, branch, self.turn, room, self.then, now)

    def strengthen(self, then: Then) -> Settling:
        return Settling(self._take(), self.turn, self.room, self.then.strengthened(then))


@final
class Closed:
    """Owns nothing."""

    __slots__ = ("id",)

    def __init__(self, branch: BranchId) -> None:
        self.id = branch


BranchState: TypeAlias = Held | Queued | Promoting | Prefilling | Decoding | Settling
"""What a branch that exists is; `Closed` ones are forgotten."""


def _issue(branch: Branch, room: Room, tokens: int, unknown: int = 0) -> None:
    if room.issued + tokens > branch.known + unknown:
        raise BrokenInvariant(f"branch {branch.id} issued rows of ids it does not know")
    room.issued += tokens
    room.flight += 1


def _commit(kv: KvCache, branch: Branch, room: Room, tokens: int) -> None:
    if room.flight == 0 or room.done + tokens > room.issued:
        raise BrokenInvariant(f"branch {branch.id} acknowledged rows that were not in flight")
    room.flight -= 1
    room.done += tokens
    if room.done > branch.known:
        room.done = _without_dead_row(branch, room)
    if room.copy is not None:
        kv.copied(branch, room)


def _without_dead_row(branch: Branch, room: Room) -> int:
    """The rows that came back, but for the one of a token that the log never took."""
    return branch.known


def _leave(kv: KvCache, branch: Branch, turn: Turn, room: Room, then: Then, now: float) -> Settling | AtRest:
    if room.flight:
        return Settling(branch, turn, room, then)
    return _come_to_rest(kv, branch, turn, room, then, now)


def _come_to_rest(kv: KvCache, branch: Branch, turn: Turn, room: Room, then: Then, now: float) -> AtRest:
    if turn.spoilt:
        kv.disown(branch, room, now, "a turn on them computed no finite numbers")
        turn.spoilt = False  # one that waits again computes them anew
    else:
        kv.freeze(branch, room, now)
    children = _born(kv, branch, then.children)
    match then.next:
        case Next.REQUEUE:
            return AtRest(Queued(branch, turn), children)
        case Next.HOLD:
            branch.moves += 1
            return AtRest(Held(branch), children)
        case Next.CLOSE:
            kv.release(branch, now)
            return AtRest(Closed(branch.id), children)


def _born(kv: KvCache, parent: Branch, children: tuple[BranchId, ...]) -> tuple[Held, ...]:
    born: list[Held] = []
    for number in children:
        parent.forks += 1
        child = Branch(
            id=number,
            session=parent.session,
            link=parent.link,
            root=parent.root,
            private=parent.private,
            draw_seed=parent.draw_seed,
            log=parent.log.fork(),
            leaf=parent.leaf,
            computed=parent.computed,
            lost_why=parent.lost_why,
            serial=parent.serial,
            child_index=_child_index(parent.child_index, parent.forks),
            trunk=(parent.id, parent.moves),
            rested_at=parent.rested_at,
        )
        kv.join(child)
        kv.settle_on(child, parent.leaf, parent.seed, parent.seed_rows)
        born.append(Held(child))
    return tuple(born)


def _child_index(parent: int, fork: int) -> int:
    """Distinct for every child of a tree with overwhelming likelihood; a number of 62 bits (splitmix64's mixer)."""
    mixed = (parent * 0x9E3779B97F4A7C15 + fork * 0xBF58476D1CE4E5B9 + 1) & 0xFFFFFFFFFFFFFFFF
    mixed ^= mixed >> 31
    mixed = mixed * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 29) >> 2
