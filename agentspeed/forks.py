"""Children of a session: born together, closed together, unless one is adopted."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, final

from agentspeed import errors
from agentspeed.whole import whole

if TYPE_CHECKING:
    from agentspeed.session import Session


@final
class Forks:
    """Made by `Session.fork`; entering it forks."""

    def __init__(self, parent: Session, n: int, at: int | None) -> None:
        self._parent = parent
        self._n = n
        self._at = at
        self._entered = False
        self._children: tuple[Session, ...] = ()

    async def __aenter__(self) -> tuple[Session, ...]:
        if self._entered:
            raise errors.SessionError("A fork is entered once.", remedy="Call fork() again.")
        self._entered = True
        self._children = await fork(self._parent, self._n, self._at)
        return self._children

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await whole(self._close)

    async def _close(self) -> None:
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
        parent._births += 1
        number = parent._births
        child = Session(
            parent.engine, system=parent.system, tools=defaults.tools, sampling=defaults.sampling,
            private=opening.private, tenant=opening.tenant, seed=branch.opening.seed, timeout=defaults.timeout,
            record_logprobs=defaults.record_logprobs, reasoning=defaults.reasoning,
            close_timeout=opening.close_timeout, name=f"{parent.id}.{number}",
        )
        branch.opening = child.opening  # the same, but by the child's own name
        child.parent, child._label = parent, f"{parent._label}→b{number}"
        # A turn that runs goes on after the fork: what it had said by then is what the children begin with.
        length = len(branch.mirror) if at is None else parent.tokens
        child._branch, child._state, child._forked_at = branch, "open", (moves, length)
        child._pausing = parent._pausing.forked()
        child._rested_at = parent._rested_at
        parent._children.append(child)
        children.append(child)
    return tuple(children)
