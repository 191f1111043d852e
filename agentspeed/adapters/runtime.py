"""What every adapter stands on: an engine, and for each event loop the sessions of the conversations it has seen.

Frameworks make models and never close them, call them from many event loops, and from code without one. A runtime keeps
one `History` for each loop that asks, drops those whose loops have ended, and has a loop of its own, in a thread, for
calls without one. The engine process is shared with every session of the same model and options.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar, final

from anyio.from_thread import BlockingPortal, start_blocking_portal

from agentspeed._core.engine_options import EngineOptions
from agentspeed.engine import Engine
from agentspeed.history import Conversation, History, Limits, Taken
from agentspeed.session import Session

T = TypeVar("T")


@final
class Runtime:
    """One model as adapters use it. `engine`: a running one; else the process-wide one of `model` and its options."""

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: Engine | None = None,
        reasoning: bool = False,
        limits: Limits | None = None,
        engine_options: EngineOptions | None = None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._reasoning = reasoning
        self._limits = limits
        self._engine_options: EngineOptions = engine_options or {}
        self._histories: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._portal_block: AbstractContextManager[BlockingPortal] | None = None

    @asynccontextmanager
    async def take(self, conversation: Conversation) -> AsyncIterator[Taken]:
        """The conversation's session on this event loop; see `History.take`."""
        own = await self._of_loop()
        async with own.history.take(conversation) as taken:
            yield taken

    async def engine(self) -> Engine:
        """Started, for what only its codec knows."""
        return (await self._of_loop()).engine

    async def _of_loop(self) -> _OfLoop:
        loop = asyncio.get_running_loop()
        own = self._histories.get(loop)
        if own is None:
            own = self._histories[loop] = _OfLoop(
                self._make_engine(), self._limits, reasoning=self._reasoning, owned=self._engine is None
            )
        await own.ready()
        return own

    def _make_engine(self) -> Engine:
        return self._engine or Engine.shared(self._model, self._engine_options)

    async def aclose(self) -> None:
        """Closes the sessions of this event loop."""
        own = self._histories.pop(asyncio.get_running_loop(), None)
        if own is not None:
            await own.close()

    # ---- calls without an event loop --------------------------------------------------------------------------------
    def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """Runs on the runtime's own loop and waits; interrupting the wait cancels it."""
        portal = self._own_portal()
        future = portal.start_task_soon(make)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, make: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        """The items of an asynchronous iterator, which is closed when this one is."""
        portal = self._own_portal()
        with portal.wrap_async_context_manager(_closed(make)) as items:
            while True:
                try:
                    yield portal.call(items.__anext__)
                except StopAsyncIteration:
                    return

    def _own_portal(self) -> BlockingPortal:
        with self._lock:
            if self._portal is None:
                self._portal_block = start_blocking_portal("asyncio")
                self._portal = self._portal_block.__enter__()
                _ = atexit.register(self.close)
            return self._portal

    def close(self) -> None:
        """Ends the runtime's own loop, if it has one."""
        with self._lock:
            portal, self._portal = self._portal, None
            block, self._portal_block = self._portal_block, None
        if portal is not None and block is not None:
            atexit.unregister(self.close)
            portal.call(self.aclose)
            block.__exit__(None, None, None)


@asynccontextmanager
async def _closed(make: Callable[[], AsyncIterator[T]]) -> AsyncIterator[AsyncIterator[T]]:
    items = make()
    try:
        yield items
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()


@final
class _OfLoop:
    """What one event loop has."""

    def __init__(self, engine: Engine, limits: Limits | None, *, reasoning: bool, owned: bool) -> None:
        self.engine = engine
        self._owned = owned
        self._reasoning = reasoning
        self._started = asyncio.Lock()
        self._running = not owned
        self.history = History(self._open, limits=limits)

    def _open(self, conversation: Conversation) -> Session:
        return self.engine.session(
            system=conversation.system,
            tools=conversation.tools,
            tenant=conversation.tenant or None,
            reasoning=self._reasoning,
        )

    async def ready(self) -> None:
        """Starts the engine, once."""
        if not self._running:
            async with self._started:
                if not self._running:
                    _ = await self.engine.start()
                    self._running = True

    async def close(self) -> None:
        """Closes the sessions, and lets go of the engine."""
        await self.history.close()
        if self._owned and self._running:
            self._running = False
            await self.engine.close()
