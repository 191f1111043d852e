"""A whole run while it goes on: an async context manager that iterates over the events of its turns and tools."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar, final

import anyio
import anyio.lowlevel

from agentspeed import errors, events
from agentspeed._base.background import Background
from agentspeed.messages import Message
from agentspeed.replies import Result
from agentspeed.run import Run

T = TypeVar("T")
_LOG = logging.getLogger("agentspeed.session")


@final
class RunStream(Generic[T]):
    """Made by `Session.stream_run`. Leaving the block before the end cancels the turn or the tools that run; the
    session stays usable: a turn leaves no trace, a tool's call gets a result that says that it was cancelled.

    A run is never ahead of its reader: a turn goes on, the tools of a turn start, and the next turn begins once all
    events before that were read and another one is asked for. A reader that leaves at `ToolCallReady` has therefore
    started no tool. The block holds no cancel scope of the reader's, so it may stand in an async generator."""

    def __init__(
        self,
        make: Callable[[Callable[[events.AnyEvent], None], Callable[[], Awaitable[None]]], Run],
        prompt: tuple[Message, ...],
        check: Callable[[], None],
    ) -> None:
        """`make` gives the run, told who hears its events and what to wait for before a step. `check` raises what
        entering must raise."""
        self._prompt = prompt
        self._check = check
        self._events: deque[events.AnyEvent] = deque()
        self._wake = anyio.Event()
        self._reader_waits = anyio.Event()
        self._task: Background | None = None
        self._left = False
        self._ended = False
        self._error: Exception | None = None
        self._result: Result[T] | None = None
        self._driver = make(self._heard, self._caught_up)

    # ---- entering and leaving -------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._task is not None:
            raise errors.SessionError("A run is entered once.", remedy="Call stream_run() again.")
        self._check()
        self._task = Background(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._task is not None:
            await self._task.end()
        if self._error is not None:
            _LOG.info("a run that was left had failed: %s", self._error)

    async def _run(self) -> None:
        try:
            self._result = await self._driver.drive(self._prompt)
        except Exception as error:  # noqa: BLE001 - the reader's: raised where the events end
            self._error = error
        finally:
            self._ended = True
            self._wake.set()

    def _heard(self, event: events.AnyEvent) -> None:
        self._events.append(event)
        self._wake.set()

    async def _caught_up(self) -> None:
        while self._events or not self._reader_waits.is_set():
            await self._reader_waits.wait()
            if self._events:  # the reader was woken and has not run yet
                await anyio.lowlevel.checkpoint()

    # ---- reading --------------------------------------------------------------------------------------------------
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> events.AnyEvent:
        if self._task is None or self._left:
            raise errors.SessionError(
                "A run is read inside its own block.",
                remedy="async with session.stream_run(...) as run: async for event in run: ...",
            )
        while not self._events:
            if self._ended:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            self._wake = anyio.Event()
            self._reader_waits.set()
            try:
                await self._wake.wait()
            finally:
                self._reader_waits = anyio.Event()
        return self._events.popleft()

    def result(self) -> Result[T]:
        """What the run came to, once it was read to its end. Raises `SessionError` before."""
        if self._result is None or self._events:
            raise errors.SessionError("The run has not ended.", remedy="Read its events to the end first.")
        return self._result
