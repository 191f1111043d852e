"""One call to generate while it runs: an async context manager that iterates over typed events."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, final

import anyio

from agentspeed import errors, events
from agentspeed._core.options import TurnRequest
from agentspeed._core.session_core import SERVING, SessionCore, written
from agentspeed._core.turn_record import TurnRecord
from agentspeed.limits import Reached
from agentspeed.observing import Ending, Watched
from agentspeed.replies import Reply as Reply
from agentspeed.transport.base import wire
from agentspeed.usage import Usage

T = TypeVar("T")
_LOG = logging.getLogger("agentspeed.session")
_TO_BE_TAKEN: Final = "the engine to take it"
_UNREAD: Final = 256
"""Events of the engine that a turn nobody watches lets wait; then they are taken, so that what waits is bounded."""


@final
class Turn(Generic[T]):
    """Made by `Session.stream`. Leaving the block before the end cancels the turn; the session stays usable."""

    def __init__(self, core: SessionCore, request: TurnRequest) -> None:
        self._core = core
        self._record = TurnRecord(request, core.codec)
        self._ready: deque[events.AnyEvent] = deque()
        self._wake: anyio.Event
        self._timeout = request.timeout
        self._deadline = float("inf")
        self._state = "new"
        self._finished = False
        self._watch: Watched | None = None
        self._watched = True
        """Somebody wants every event; without, only the end is woken up for."""
        self._at_once: Callable[[list[events.AnyEvent]], bool] | None = None
        self._flushing = False
        self._telling = False
        self._broken: Exception | None = None
        """What telling at once raised."""

    # ---- entering and leaving -------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise errors.SessionError("A turn is entered once.", remedy="Call stream() again.")
        self._state = "entered"
        self._wake = anyio.Event()  # of the event loop that runs now
        self._watch = self._core.watch("turn", request=self._record.request.said, content=self._record.request.written)
        try:
            return await self._begun()
        except BaseException as error:
            self._told_end(error)
            raise

    async def _begun(self) -> Self:
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
        try:
            if not self._finished:
                await self._core.abort_turn(self._record)
            elif kind is None:
                await self._pause()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._finished = True
            self._told_end(error)

    async def _pause(self) -> None:
        """Blocks of `tool_call` that outlast the turn are a pause of the session, as those that are opened after it:
        the branch is held under a lease for as long as the longest of them was said to take."""
        core = self._core
        pending = core.pending
        calls = [call for call in core.open_calls() if call.id in pending.served]
        if core.busy != SERVING or not calls or pending.on:
            return
        said = [pending.served[call.id] for call in calls]
        known = [seconds for seconds in said if seconds is not None]
        try:
            _ = await core.branch.expect(
                max(known) if len(known) == len(said) else None, "soft", pending.slowest(calls)
            )
        except errors.WorldError as error:  # the turn is over, and its reply is worth more than a lease
            _LOG.info("no lease for session %s: %s", core.id, error)
        if core.busy == SERVING:  # they may have ended meanwhile
            pending.begin()

    # ---- reading --------------------------------------------------------------------------------------------------
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> events.AnyEvent:
        self._must_be_inside()
        while not self._ready:
            if self._finished:
                raise StopAsyncIteration
            self._check_limits()
            if self._take():
                continue
            if self._timeout is None:
                await self._next_wake().wait()
            else:
                await self._in_time()
        return self._ready.popleft()

    async def follow(
        self,
        told: Callable[[list[events.AnyEvent]], Awaitable[None]] | None = None,
        at_once: Callable[[list[events.AnyEvent]], bool] | None = None,
    ) -> None:
        """Reads to the end. `told` hears all that there is at once: tokens that came together are one delta. The
        turn's timeout counts for what `told` takes too. Without `told` nothing is woken up for but the end.

        `at_once` may take what tokens say on the event loop the moment that they come, without waking anybody; False
        means that it took nothing, and `told` hears it."""
        self._must_be_inside()
        with anyio.CancelScope(deadline=self._deadline) as scope:
            self._watched = told is not None
            self._at_once = at_once
            try:
                await self._to_the_end(told)
            except anyio.get_cancelled_exc_class():
                self._catch_up()
                raise
        if scope.cancelled_caught:
            while (
                told is None and self._take()
            ):  # with `told` the end does not count: it would stay in the log, unheard
                pass
            if told is None and self._finished:
                return
            raise self._too_late("" if self._record.started else await self._core.branch.waits_for())

    async def _to_the_end(self, told: Callable[[list[events.AnyEvent]], Awaitable[None]] | None) -> None:
        while not self._finished or self._ready:
            if self._broken is not None:
                raise self._broken
            if not self._finished:
                self._check_limits()
            if not self._ready and not self._take(end=told is None):
                await self._next_wake().wait()
            elif self._ready:
                batch = list(self._ready)
                self._ready.clear()
                if told is not None:
                    self._telling = True
                    await told(batch)
                    self._telling = False
                    if self._record.ended is not None:  # not before: what was not heard to its end is taken back
                        self._end()

    def _catch_up(self) -> None:
        """`text` is all that has come, also for who was not woken up for it. The end is not taken: who is cancelled
        leaves the turn before it."""
        inbox = self._record.inbox
        while inbox and isinstance(inbox[0], wire.TurnStarted | wire.Tokens):
            _ = self._take()

    async def reply(self) -> Reply[T]:
        """Reads to the end. Raises `OutputError` when `output=` was asked for and the text is not that."""
        await self.follow()
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
    def limit(self) -> Reached | None:
        """The limit of a run that cut the turn, once it has ended; None where none did."""
        return self._record.limit

    @property
    def usage(self) -> Usage:
        """What the turn has cost, as far as the engine has said."""
        return self._record.usage

    # ---- events from the engine -----------------------------------------------------------------------------------
    def _heard(self, event: wire.Event | None) -> None:
        """On the event loop. The session's log has the ids already."""
        inbox = self._record.inbox
        inbox.append(event)
        if self._at_once is not None and isinstance(event, wire.Tokens):
            if not self._flushing:
                self._flushing = True
                self._core.branch.after(self._flush)
        elif self._watched or not isinstance(event, wire.Tokens) or len(inbox) >= _UNREAD:
            self._wake.set()
        if self._record.charge is not None and self._record.over is not None:
            self._wake.set()

    def _flush(self) -> None:
        """On the event loop, once everything that came together is in the inbox: tokens are told of at once, unless
        the reader is at work or has something else to take first."""
        self._flushing = False
        inbox, at_once = self._record.inbox, self._at_once
        if self._telling or self._ready or at_once is None or self._state != "entered":
            return
        try:
            while inbox and isinstance(inbox[0], wire.Tokens):
                _ = self._take()
                if self._ready:
                    if not at_once(list(self._ready)):
                        self._wake.set()
                        return
                    self._ready.clear()
        except Exception as error:  # noqa: BLE001 - the reader raises it
            self._broken = error
            self._wake.set()

    def _take(self, *, end: bool = True) -> bool:
        """The next of what has come: tokens that came one after the other as one. False when nothing has. Without `end`
        the turn's end is told of, and the caller ends it."""
        inbox = self._record.inbox
        if not inbox:
            return False
        event = inbox.popleft()
        if event is None:
            self._finished = True
            raise self._core.turn_died(self._record)
        if isinstance(event, wire.Tokens):
            run = [event]
            while inbox and isinstance(following := inbox[0], wire.Tokens):
                run.append(following)
                _ = inbox.popleft()
            self._tell(self._record.take_tokens(run))
            return True
        self._tell(self._record.take(event))
        if isinstance(event, wire.TurnStarted):
            self._tell(self._core.resumed(self._record))
        elif isinstance(event, wire.TurnEnded):
            if end:
                self._end()
            self._tell([events.TurnFinished(reason=event.reason, usage=self.usage, bound=event.message)])
        return True

    def _end(self) -> None:
        """The turn is over, and its message is the log's."""
        self._finished = True
        self._core.finish_turn(self._record)
        self._told_end(None)

    def _told_end(self, error: BaseException | None) -> None:
        """Once: at the last event, or when the block is left before it."""
        if self._watch is not None:
            record, ended = self._record, self._record.ended
            self._watch.ended(
                lambda: Ending(
                    usage=record.usage,
                    reason="cancelled" if ended is None else ended.reason,
                    error=error,
                    content=lambda: written([record.message]),
                )
            )

    def _check_limits(self) -> None:
        if self._record.charge is not None and (over := self._record.over) is not None:
            raise over.error()

    def _must_be_inside(self) -> None:
        if self._state != "entered":
            raise errors.SessionError(
                "A turn is read inside its own block.",
                remedy="async with session.stream(...) as turn: async for event in turn: ...",
            )

    def _tell(self, told: Iterable[events.AnyEvent]) -> None:
        self._ready.extend(map(self._core.stamp, told))

    async def _in_time(self) -> None:
        """Waits for the engine until the deadline, with a scope of its own: scopes are not free."""
        with anyio.CancelScope(deadline=self._deadline) as scope:
            await self._next_wake().wait()
        if scope.cancelled_caught and not self._record.inbox:
            raise self._too_late("" if self._record.started else await self._core.branch.waits_for())

    def _next_wake(self) -> anyio.Event:
        """Is set when the engine says something more. Made by the class of the one before: to find out which event
        loop runs, as `anyio.Event` does, costs more than the event."""
        self._wake = type(self._wake)()
        return self._wake

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
