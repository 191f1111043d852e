"""What every adapter stands on: an engine, and for each event loop the sessions of the conversations it has seen.

Frameworks make models and never close them, call them from many event loops, and from code without one. A runtime keeps
one `History` for each loop that asks, drops those whose loops have ended, and has a loop of its own, in a thread, for
calls without one. The engine process is shared with every session of the same model and options.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeAlias, TypeVar, final

from anyio import to_thread
from anyio.from_thread import BlockingPortal, start_blocking_portal

from agentspeed import errors, snapshot
from agentspeed._base.validate import shown
from agentspeed._core.engine_handle import EngineHandle
from agentspeed._core.engine_options import EngineOptions
from agentspeed.engine import Engine
from agentspeed.history import Conversation, History, Kept, Limits, Taken, hint_of, thread_of
from agentspeed.message_formats.tools import declared
from agentspeed.session import Session
from agentspeed.usage import Lease

T = TypeVar("T")
Source: TypeAlias = Engine | Session | str
"""What a model may be given to run on: an engine that runs, a session to begin from, or a server's address."""
_LOG = logging.getLogger("agentspeed.adapters")
Recall: TypeAlias = Callable[[str], list[bytes]]
"""The snapshots of a thread's sessions, oldest first; it may block."""


@final
class Runtime:
    """One model as adapters use it. `engine`: a running one, a session, or a server's address (`api_key` is for it);
    else the process-wide one of `model` and its options. Message lists that begin with what a given session says go on
    from a copy of it, as it was at the first call. Raises `InvalidRequest` for any other `engine`."""

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: Source | None = None,
        api_key: str | None = None,
        reasoning: bool = False,
        limits: Limits | None = None,
        engine_options: EngineOptions | None = None,
    ) -> None:
        if not isinstance(engine, Source | None) or (isinstance(engine, str) and not _is_url(engine)):
            raise errors.InvalidRequest(
                f"engine is {shown(engine)}; it must be an Engine, a Session, or the address of a server."
            )
        self._model = model
        self._engine = model if engine is None and model is not None and _is_url(model) else engine
        self._api_key = api_key
        self._reasoning = reasoning
        self._limits = limits
        self._engine_options: EngineOptions = engine_options or {}
        self.recall: Recall | None = None
        """Asked once for each thread on each event loop, before its first turn there."""
        self._histories: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._portal_block: AbstractContextManager[BlockingPortal] | None = None
        self._portal_thread: int | None = None

    @asynccontextmanager
    async def take(self, conversation: Conversation) -> AsyncIterator[Taken]:
        """The conversation's session on this event loop; see `History.take`."""
        own = await self._of_loop()
        if isinstance(self._engine, Session):
            await own.begin_from(self._engine, conversation.tenant)
        if self.recall is not None and (thread := thread_of(conversation.hint)) is not None:
            await own.restore(thread, self.recall)
        await own.history.sweep()
        async with own.history.take(conversation) as taken:
            yield taken

    async def engine(self) -> EngineHandle:
        """Started, for what only its codec knows."""
        return (await self._of_loop()).engine

    async def _of_loop(self) -> _OfLoop:
        loop = asyncio.get_running_loop()
        own = self._histories.get(loop)
        if own is None:
            owned = not isinstance(self._engine, Engine | Session)
            own = self._histories[loop] = _OfLoop(
                self._make_engine(), self._limits, reasoning=self._reasoning, owned=owned
            )
            await self._let_go_of_ended()
        await own.ready()
        return own

    async def _let_go_of_ended(self) -> None:
        """Nothing can be awaited on a loop that has ended; its link is closed, and with it the engine's sessions."""
        for loop in [one for one in list(self._histories) if one.is_closed()]:
            if (left := self._histories.pop(loop, None)) is not None:
                await left.let_go()

    def _make_engine(self) -> EngineHandle:
        match self._engine:
            case None:
                return Engine.shared(self._model, self._engine_options)
            case str(url):
                return Engine(url, api_key=self._api_key, **self._engine_options)
            case Session() as session:
                return session.engine
            case engine:
                return engine

    async def aclose(self) -> None:
        """Closes the sessions of this event loop."""
        own = self._histories.pop(asyncio.get_running_loop(), None)
        if own is not None:
            await own.close()

    # ---- sessions that outlive the process --------------------------------------------------------------------------
    async def akept(self, thread: str, known: Mapping[str, str]) -> list[Kept]:
        """The idle sessions of a thread on this event loop, and on the runtime's own; see `History.kept`."""
        found = await self._own_kept(thread, known)
        if (portal := self._portal) is not None and self._portal_thread != threading.get_ident():
            found += await to_thread.run_sync(portal.call, self._own_kept, thread, known)
        return found

    def kept(self, thread: str, known: Mapping[str, str]) -> list[Kept]:
        """Those on the runtime's own loop."""
        portal = self._portal
        return [] if portal is None else portal.call(self._own_kept, thread, known)

    async def _own_kept(self, thread: str, known: Mapping[str, str]) -> list[Kept]:
        own = self._histories.get(asyncio.get_running_loop())
        if own is None:
            return []
        return [kept async for kept in own.history.kept(lambda hint: thread_of(hint) == thread, known)]

    async def aforget(self, thread: str) -> None:
        """Closes the idle sessions of a thread, as far as `akept` sees them."""
        await self._own_forget(thread)
        if (portal := self._portal) is not None and self._portal_thread != threading.get_ident():
            await to_thread.run_sync(portal.call, self._own_forget, thread)

    def forget(self, thread: str) -> None:
        """Those on the runtime's own loop."""
        if (portal := self._portal) is not None:
            portal.call(self._own_forget, thread)

    async def _own_forget(self, thread: str) -> None:
        own = self._histories.get(asyncio.get_running_loop())
        if own is not None:
            await own.history.forget(lambda hint: thread_of(hint) == thread)

    async def aexpect(self, thread: str, seconds: float | None, tool: str) -> list[Lease]:
        """The idle sessions of a thread, as far as `akept` sees them, wait under a lease; see `Session.expect`."""
        found = await self._own_expect(thread, seconds, tool)
        if (portal := self._portal) is not None and self._portal_thread != threading.get_ident():
            found += await to_thread.run_sync(portal.call, self._own_expect, thread, seconds, tool)
        return found

    def expect(self, thread: str, seconds: float | None, tool: str) -> list[Lease]:
        """Those on the runtime's own loop."""
        portal = self._portal
        return [] if portal is None else portal.call(self._own_expect, thread, seconds, tool)

    async def _own_expect(self, thread: str, seconds: float | None, tool: str) -> list[Lease]:
        own = self._histories.get(asyncio.get_running_loop())
        if own is None:
            return []
        try:
            return await own.history.expect(lambda hint: thread_of(hint) == thread, seconds, tool)
        except errors.WorldError as error:
            _LOG.info("no lease for thread %s: %s", thread, error)
            return []

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
                self._portal_thread = self._portal.call(threading.get_ident)
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


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


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

    def __init__(self, engine: EngineHandle, limits: Limits | None, *, reasoning: bool, owned: bool) -> None:
        self.engine = engine
        self._owned = owned
        self._reasoning = reasoning
        self._started = asyncio.Lock()
        self._running = not owned
        self._restoring = asyncio.Lock()
        self._restored: set[str] = set()
        self._beginning: dict[str, asyncio.Lock] = {}
        """By tenant: held while the copy of the given session is made."""
        self._begun: set[str] = set()
        self.history = History(self._open, limits=limits)

    def _open(self, conversation: Conversation) -> Session:
        return Session(
            self.engine,
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

    async def restore(self, thread: str, recall: Recall) -> None:
        """The thread's stored sessions wait in the pool afterwards. One that this engine cannot go on with is left out:
        what it said is read as text then."""
        if thread in self._restored:
            return
        async with self._restoring:
            if thread in self._restored:
                return
            for data in await to_thread.run_sync(recall, thread):
                try:
                    await self._put(data, thread)
                except errors.InvalidRequest as error:
                    _LOG.warning("a stored session of thread %s is not used: %s", thread, error)
            self._restored.add(thread)

    async def _put(self, data: bytes, thread: str) -> None:
        found = snapshot.load(data)
        tools = declared(found.definitions)
        session = Session.restore(data, self.engine, tools=tools)
        conversation = Conversation(
            messages=session.messages,
            system=session.system,
            tools=tools,
            tenant=found.tenant,
            hint=hint_of(thread, ""),
        )
        await self.history.put(session, conversation)

    async def begin_from(self, session: Session, tenant: str) -> None:
        """A copy of it waits in the pool, once for each tenant. Raises `SessionBusy` and `SessionClosed`."""
        if tenant in self._begun:
            return
        async with self._beginning.setdefault(tenant, asyncio.Lock()):
            if tenant in self._begun:
                return
            copy, messages = session.copy(), session.messages
            conversation = Conversation(messages=messages, system=session.system, tools=session.tools, tenant=tenant)
            await self.history.put(copy, conversation)
            self._begun.add(tenant)

    async def close(self) -> None:
        """Closes the sessions, and lets go of the engine."""
        await self.history.close()
        await self.let_go()

    async def let_go(self) -> None:
        """Of the engine, if it is this one's own."""
        if self._owned and self._running:
            self._running = False
            await self.engine.close()
