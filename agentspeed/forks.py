"""Children of a session: born together, closed together, unless one is adopted."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, final

import anyio

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
                await child.close()


async def fork(parent: Session, n: int, at: int | None) -> tuple[Session, ...]:
    """`n` open children of an open session, at its end or at a token position."""
    from agentspeed.session import Session

    parent._must_be_open()
    if at is not None:
        parent._must_be_idle()
    defaults, opening, moves = parent.defaults, parent.opening, parent._moves
    children: list[Session] = []
    for branch in await parent._branch.fork(n, at):
        number = len(parent._children) + 1
        child = Session(
            parent.engine, system=parent.system, tools=defaults.tools, sampling=defaults.sampling,
            private=opening.private, tenant=opening.tenant, seed=branch.opening.seed, timeout=defaults.timeout,
            record_logprobs=defaults.record_logprobs, reasoning=defaults.reasoning,
            close_timeout=opening.close_timeout, name=f"{parent.id}.{number}",
        )
        child.parent, child._label = parent, f"{parent._label}→b{number}"
        child._branch, child._state, child._forked_at = branch, "open", moves
        child._results = dict(parent._results)
        child._rested_at = parent._rested_at
        parent._children.append(child)
        children.append(child)
    return tuple(children)
