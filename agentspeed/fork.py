"""Children of a session: born together, closed together, unless one is adopted."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Generic, TypeVar, final

from agentspeed import errors
from agentspeed._base.completion import run_to_completion
from agentspeed._base.validate import shown
from agentspeed._core.session_core import TOO_OLD, SessionCore
from agentspeed.chat.token_log import Checkpoint

S = TypeVar("S")


@final
class Forks(Generic[S]):
    """Made by `Session.fork`; entering it forks."""

    def __init__(self, parent: SessionCore, n: int, at: Checkpoint | None, face: Callable[[SessionCore], S]) -> None:
        """`face` makes a session of a child's core."""
        self._parent = parent
        self._n = n
        self._at = at
        self._face = face
        self._entered = False
        self._children: tuple[SessionCore, ...] = ()

    async def __aenter__(self) -> tuple[S, ...]:
        if self._entered:
            raise errors.SessionError("A fork is entered once.", remedy="Call fork() again.")
        self._entered = True
        self._children = await fork(self._parent, self._n, self._at)
        return tuple(map(self._face, self._children))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await run_to_completion(self._close)

    async def _close(self) -> None:
        for child in self._children:
            await child.close()


async def fork(parent: SessionCore, n: int, at: Checkpoint | None) -> tuple[SessionCore, ...]:
    """`n` open children of an open session, at its end or at a place before it."""
    parent.must_be_open()
    if at is not None:
        parent.must_be_idle()
    moves = parent.moves
    children: list[SessionCore] = []
    for branch in await parent.branch.fork(n, at):
        parent.births += 1
        number = parent.births
        branch.opening = replace(branch.opening, label=f"{parent.id}.{number}")
        child = SessionCore(
            engine=parent.engine,
            owns_engine=False,
            system=parent.system,
            defaults=parent.defaults,
            opening=branch.opening,
            branch=branch,
        )
        child.described, child.tokenizer = parent.described, parent.tokenizer
        child.parent, child.path = parent, f"{parent.path}→b{number}"
        # A turn that runs goes on after the fork: what it had said by then is what the children begin with.
        child.forked_at = (moves, child.tokens if at is None else parent.tokens)
        parent.record_unread(child.log)
        child.pending = parent.pending.forked(child.open_calls())
        child.rested_at = parent.rested_at
        parent.children.append(child)
        children.append(child)
    return tuple(children)


def copy(core: SessionCore, point: Checkpoint) -> SessionCore:
    """A session of its own, not entered yet, over another's log up to `point`, with its options."""
    opening = replace(core.branch.opening, label=secrets.token_hex(4), seed=secrets.randbits(62))
    other = SessionCore(
        engine=core.engine, owns_engine=False, system=core.system, defaults=core.defaults, opening=opening
    )
    other.branch.mirror = core.log.copy(point.tokens, point)
    other.described, other.tokenizer, other.idle_timeout = core.described, core.tokenizer, core.idle_timeout
    other.pending = core.pending.forked(other.open_calls())
    other.pending.leave(other.log)
    return other


async def adopt(trunk: SessionCore, child: object) -> None:
    """The child's context becomes the trunk's; the child is closed. Raises what `Session.adopt` says."""
    if not isinstance(child, SessionCore) or child.parent is not trunk:
        other = child.id if isinstance(child, SessionCore) else shown(child)
        raise errors.ChildUnrelated(
            f"{other} is not a child of {trunk.id}.", remedy="Adopt a child of this very session."
        )
    with trunk.doing("adopt"), child.doing("adopt"):
        if child.forked_at != (trunk.moves, trunk.tokens):
            raise errors.TrunkMoved(
                f"Session {trunk.id} went on after {child.id} was forked.",
                remedy="Adopt before it goes on, or go on with the child instead.",
            )
        for branch in (trunk.branch, child.branch):
            _ = await branch.attach()  # an engine that has to be started first is no part of the step
        await run_to_completion(lambda: _adopt(trunk, child))


async def _adopt(trunk: SessionCore, child: SessionCore) -> None:
    before, told = trunk.log, (child.moves, child.tokens)
    await trunk.branch.adopt(child.branch)
    trunk.log.marks = before.marks_in(trunk.log) | trunk.log.marks  # a child may have gone back to before some of them
    child.state = "closed"
    trunk.children.remove(child)
    trunk.usage = trunk.usage + child.usage
    trunk.pending.adopt(child.pending)
    trunk.moves += 1
    for grandchild in child.children:  # they hang below what is the trunk's now, and know how old they are
        grandchild.parent = trunk
        grandchild.forked_at = (trunk.moves, trunk.tokens) if grandchild.forked_at == told else TOO_OLD
    trunk.children += child.children
    child.children = []
    trunk.pending.leave(trunk.log)
