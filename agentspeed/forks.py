"""Children of a session: born together, closed together, unless one is adopted."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, final

import anyio
from agentspeed_engine import wire

from agentspeed import errors

if TYPE_CHECKING:
    from agentspeed.session import Session


@final
class Forks:
    """Made by `Session.fork`; entering it forks."""

    def __init__(self, parent: Session, n: int, at: int | None) -> None:
        self._parent = parent
        self._n = n
        self._at = at
        self._children: tuple[Session, ...] = ()

    async def __aenter__(self) -> tuple[Session, ...]:
        self._children = await fork(self._parent, self._n, self._at)
        return self._children

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        with anyio.CancelScope(shield=True):
            for child in self._children:
                await child._leave()


async def fork(parent: Session, n: int, at: int | None) -> tuple[Session, ...]:
    """`n` open children of an open session, at its end or at a token position."""
    from agentspeed.session import Session

    parent._must_be_open()
    if at is not None:
        parent._must_be_idle()
    moves = parent._moves
    link, branch = await parent._ensure_branch()
    reply = await link.call(lambda number: wire.Fork(request=number, branch=branch, n=n, at=at))
    if not isinstance(reply, wire.Forked):
        raise errors.InternalError(f"The engine answered Fork with {type(reply).__name__}.")
    children: list[Session] = []
    for number in reply.branches:
        child = Session(
            parent.engine, system=parent.system, tools=parent.tools, sampling=parent.sampling,
            private=parent._private, tenant=parent._tenant, seed=parent._seed, timeout=parent._timeout,
            record_logprobs=parent._record_logprobs, reasoning=parent._reasoning,
            close_timeout=parent._close_timeout,
            name=f"{parent.id}.{next(parent._children)}",
        )
        child.parent = parent
        child._label = f"{parent._label}→{child.id.rsplit('.', 1)[-1]}"
        child._mirror = parent._mirror.copy(reply.known)
        child._link, child._branch, child._state = link, number, "open"
        child._forked_at = moves
        child._residence = parent._residence
        children.append(child)
    return tuple(children)
