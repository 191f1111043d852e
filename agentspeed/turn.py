"""One call to generate while it runs: an async context manager that iterates over typed events."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, final

import anyio

from agentspeed import errors, events
from agentspeed._core.options import TurnRequest
from agentspeed._core.session_core import SessionCore
from agentspeed._core.turn_record import TurnRecord
from agentspeed.replies import Reply as Reply
from agentspeed.transport.base import wire
from agentspeed.usage import Usage

T = TypeVar("T")
_TO_BE_TAKEN: Final = "the engine to take it"


@final
class Turn(Generic[T]):
    """Made by `Session.stream`. Leaving the block before the end cancels the turn; the session stays usable."""

    def __init__(self, core: SessionCore, request: TurnRequest) -> None:
        self._core = core
        self._record = TurnRecord(request, core.codec)
        self._ready: deque[events.AnyEvent] = deque()
        self._wake = anyio.Event()
        self._timeout = request.timeout
        self._deadline = float("inf")
        self._state = "new"
        self._finished = False

    # ---- entering and leaving -------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise errors.SessionError("A turn is entered once.", remedy="Call stream() again.")
        self._state = "entered"
        if self._timeout is None:
            await self._core.begin_turn(self._record, self._heard)
            return self
        self._deadline = anyio.current_time() + self._timeout
        with anyio.move_on_after(self._timeout):
            await self._core.begin_turn(self._record, self._heard)
            return self
        # Too late before it was queued: by then nothing is cancelled any more.
        self._finished = True
        raise self._too_late(_TO_BE_TAKEN)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "left"
        if not self._finished:
            await self._core.abort_turn(self._record)
            self._finished = True

    # ---- reading --------------------------------------------------------------------------------------------------
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> events.AnyEvent:
        if self._state != "entered":
            raise errors.SessionError(
                "A turn is read inside its own block.",
                remedy="async with session.stream(...) as turn: async for event in turn: ...",
            )
        while not self._ready:
            if self._finished:
                raise StopAsyncIteration
            if self._record.inbox:
                self._take(self._record.inbox.popleft())
                continue
            await self._more()
        return self._ready.popleft()

    async def reply(self) -> Reply[T]:
        """Reads to the end. Raises `OutputError` when `output=` was asked for and the text is not that."""
        async for _ in self:
            pass
        return self._record.reply()

    def result(self) -> Reply[T]:
        """The reply of a turn that was read to its end. Raises `SessionError` before its end, and `OutputError` as
        `reply` does."""
        if self._record.ended is None or not self._finished:
            raise errors.SessionError("The turn has not ended.", remedy="Read its events to the end first.")
        return self._record.reply()

    def cut(self) -> errors.OutputError | None:
        """Why a turn that has ended came to neither an answer nor calls; None when it came to one of them."""
        return self._record.cut()

    @property
    def text(self) -> str:
        """The message's text so far: also what earlier turns wrote of it, when this one goes on with an open message,
        up to where a text of `stop` may have begun."""
        return self._record.text

    @property
    def new_text(self) -> str:
        """What this turn has written of it: its `TextDelta` events together."""
        return self._record.new_text

    @property
    def usage(self) -> Usage:
        """What the turn has cost, as far as the engine has said."""
        return self._record.usage

    # ---- events from the engine -----------------------------------------------------------------------------------
    def _heard(self, event: wire.Event | None) -> None:
        """On the event loop. The session's log has the ids already."""
        self._record.inbox.append(event)
        self._wake.set()

    def _take(self, event: wire.Event | None) -> None:
        if event is None:
            self._finished = True
            raise self._core.turn_died(self._record)
        self._tell(self._record.take(event))
        if isinstance(event, wire.TurnStarted):
            self._tell(self._core.resumed(self._record))
        elif isinstance(event, wire.TurnEnded):
            self._finished = True
            self._core.finish_turn(self._record)
            self._tell([events.TurnFinished(reason=event.reason, usage=self.usage, bound=event.message)])

    def _tell(self, told: Iterable[events.AnyEvent]) -> None:
        self._ready.extend(map(self._core.stamp, told))

    async def _more(self) -> None:
        """Waits for the engine; with a scope of its own only where there is a deadline, since scopes are not free."""
        self._wake = anyio.Event()
        if self._timeout is None:
            await self._wake.wait()
            return
        with anyio.move_on_after(self._deadline - anyio.current_time()) as scope:
            await self._wake.wait()
        if scope.cancelled_caught and not self._record.inbox:
            raise self._too_late("" if self._record.started else await self._core.branch.waits_for())

    def _too_late(self, waits_for: str) -> errors.TurnTimeout:
        after = f"{self._timeout} s"
        if not waits_for:
            return errors.TurnTimeout(
                f"The turn took longer than {after} and was cancelled.",
                partial=self.text,
                remedy="Give it more time or fewer tokens.",
            )
        return errors.TurnTimeout(
            f"The turn still waited for {waits_for} after {after} and was cancelled.",
            partial=self.text,
            remedy="Give it more time: an engine that starts takes seconds."
            if waits_for == _TO_BE_TAKEN
            else "Give it more time, or the engine more pages or fewer turns at once.",
        )
