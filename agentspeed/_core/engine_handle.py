"""One model's engine as sessions use it: started and ended here, reached by the link of each event loop."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack, cast

from agentspeed import errors
from agentspeed._base.completion import run_to_completion
from agentspeed._base.validate import check_messages, check_text, shown
from agentspeed._core.engine_options import EngineOptions, checked_engine_options
from agentspeed._core.model_files import NANO, codec_of
from agentspeed._core.wire_values import stats_of
from agentspeed.chat.codec import ChatCodec
from agentspeed.messages import Message
from agentspeed.observing import Observer
from agentspeed.tools.threads import in_thread
from agentspeed.transport.base import Connection, Transport, wire
from agentspeed.transport.hub import resolve
from agentspeed.transport.model_files import fetch_model_files
from agentspeed.transport.shared_engines import EngineConnections, OnStart
from agentspeed.transport.socket_link import SocketSource
from agentspeed.usage import EngineStats

if TYPE_CHECKING:
    import httpx

_PATIENCE = 5.0
"""Seconds without any answer after which an engine that is asked for its counts is given up."""


class EngineHandle:
    """What `Engine` is made of. A session that was given a model's name instead of an `Engine` has one of these to
    itself, on the process-wide engine of that model."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        api_key: str | None = None,
        http_client: httpx.Client | None = None,
        observer: Observer | None = None,
        on_start: OnStart | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        if model is not None and not isinstance(model, str | os.PathLike):
            raise errors.InvalidRequest(f"model is {shown(model)}; it must be a folder or a repository id.")
        self.model = NANO if model is None else model
        if not isinstance(revision, str | None):
            raise errors.InvalidRequest(f"revision is {revision!r}; it must be a branch, a tag or a commit.")
        self.revision = revision
        self.observer = observer
        """Told of the runs, turns and tools of every session that has no observer of its own."""
        if on_start is not None and not callable(on_start):
            raise errors.InvalidRequest(f"on_start is {shown(on_start)}; it must be a function, or None.")
        self._on_start = on_start
        self._api_key = api_key
        self._http_client = http_client
        self._options = checked_engine_options(options)
        own = [name for name, value in {"revision": revision, **options}.items() if value is not None]
        if self.url is not None and own:
            raise errors.InvalidRequest(
                f"{self.url} is a server's address, and its engine has a model and options of its own.",
                remedy=f"Leave out {', '.join(own)}, or give them to `agentspeed serve`.",
            )
        self._shared = False
        self._transport: Transport | None = None
        self._lock = threading.Lock()
        """Guards what follows: an engine may be used by several event loops."""
        self._local: EngineConnections | None = None
        self._codec: ChatCodec | None = None
        self._welcome: wire.Welcome | None = None
        self._starting = 0
        """Calls of `start` that have not returned."""
        self._started = False

    @classmethod
    def over(cls, transport: Transport, model: str | os.PathLike[str]) -> Self:
        """On connections of `transport` instead of a process of its own; `model` gives the tokenizer."""
        engine = cls(model)
        engine._transport = transport
        return engine

    @classmethod
    def shared(
        cls, model: str | os.PathLike[str] | None, options: EngineOptions, on_start: OnStart | None = None
    ) -> Self:
        """On the process-wide engine of this model and these options; it ends a minute after its last use."""
        engine = cls(model, on_start=on_start, **options)
        engine._shared = True
        return engine

    # ---- start and end --------------------------------------------------------------------------------------------
    async def start(self) -> Self:
        """Starts the process (or finds the shared one) and loads the tokenizer. Calling it again does nothing, also
        while an earlier call has not returned: both wait for the same engine. When a start fails or is cancelled,
        nothing is left of it; a download that it waited for goes on in its thread, and nobody waits for that.

        Raises `ModelBroken` and `ModelUnsupported` for the model, `EngineStartFailed` for the process,
        `InvalidRequest` for an option's value."""
        with self._lock:
            self._starting += 1
        try:
            if self._local is None:
                await (self._start_local() if self.url is None else self._start_remote(self.url))
            _ = await self.link()
        except BaseException:
            with self._lock:
                unowned = self._starting == 1 and not self._started
            if unowned:
                await self.close()
            raise
        finally:
            with self._lock:
                self._starting -= 1
        self._started = True
        return self

    @property
    def url(self) -> str | None:
        """The server's address, when the model is one; else None."""
        text = os.fspath(self.model)
        return text.rstrip("/") if text.startswith(("http://", "https://")) else None

    async def _start_local(self) -> None:
        folder = await in_thread(lambda: resolve(self.model, self.revision))
        codec = await in_thread(lambda: codec_of(folder))
        with self._lock:  # another call may have been faster
            if self._local is None:
                self._codec, self._local = codec, self._opened(folder)

    def _opened(self, folder: Path) -> EngineConnections:
        if self._transport is not None:
            return EngineConnections(self._transport)
        options = {"model": str(folder), **self._options}
        opened = EngineConnections.shared if self._shared else EngineConnections.own
        return opened(options, self._on_start)

    async def _start_remote(self, url: str) -> None:
        """The tokenizer and the template come from the server's engine, once."""
        # Imported late: httpx takes a tenth of a second, and engines of this machine need none of it.
        from agentspeed.transport.remote import RemoteTransport

        api_key = self._api_key or os.environ.get("AGENTSPEED_API_KEY")
        transport = RemoteTransport(url, api_key=api_key, client=self._http_client)
        local = EngineConnections(transport)
        try:
            folder = await fetch_model_files(await local.link())
            codec = await in_thread(lambda: codec_of(folder))
        except BaseException:
            await run_to_completion(local.close)
            raise
        with self._lock:
            if self._local is None:
                self._codec, self._local = codec, local
                return
        await run_to_completion(local.close)

    async def close(self) -> None:
        """Lets go of the process; one of its own ends."""
        with self._lock:
            local, self._local = self._local, None
            self._started = False
        if local is not None:
            await run_to_completion(local.close)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---- what it is -----------------------------------------------------------------------------------------------
    @property
    def codec(self) -> ChatCodec:
        """Raises `SessionClosed` before `start`."""
        if self._codec is None:
            raise errors.SessionClosed("The engine was not started.", remedy="Use it in `async with`.")
        return self._codec

    @property
    def context_limit(self) -> int:
        """The most tokens that a session's log may have. Raises `SessionClosed` before `start`."""
        if self._welcome is None:
            raise errors.SessionClosed("The engine was not started.", remedy="Use it in `async with`.")
        return self._welcome.context_limit

    def count_tokens(self, *content: str | Message) -> int:
        """How many tokens that is: of a text alone; of a message, with what the chat template writes around it.

        Raises `SessionClosed` before `start`, and `InvalidRequest` for what is neither."""
        codec = self.codec
        for one in content:
            if isinstance(one, str):
                check_text("content", one)
            elif isinstance(one, Message):
                check_messages([one])
            else:
                raise errors.InvalidRequest(
                    f"{shown(one)} has no tokens.", remedy="Give texts, or messages like User(...)."
                )
        return sum(
            len(codec.tokenizer.content_ids(one) if isinstance(one, str) else codec.message(one)) for one in content
        )

    def connected_socket(self) -> socket.socket:
        """A fresh socket to the engine, for a server that relays links. Blocks; raises `SessionClosed` before `start`,
        and what starting an engine raises."""
        if self._local is None:
            raise errors.SessionClosed("The engine is not running.", remedy="Use it in `async with`.")
        source = cast("SocketSource", self._local.transport)
        return source.open(after_death=False)

    async def link(self) -> Connection:
        """The living link of this event loop; a dead engine is started again. Raises `SessionClosed` before `start`."""
        local = self._local
        if local is None:
            raise errors.SessionClosed("The engine is not running.", remedy="Use it in `async with`.")
        link = await local.link()
        self._welcome = link.welcome
        return link

    async def stats(self) -> EngineStats:
        """Counts of the whole engine. Raises `SessionClosed` before `start`, and `EngineDied`."""
        try:
            reply = await self._stats()
        except errors.EngineDied:  # since it was used last: another is started
            reply = await self._stats()
        if not isinstance(reply, wire.Stats):
            raise errors.InternalError(f"The engine answered GetStats with {type(reply).__name__}.")
        return stats_of(reply)

    async def _stats(self) -> wire.Reply:
        link = await self.link()
        return await link.call(lambda number: wire.GetStats(request=number), patience=_PATIENCE)

    @property
    def pid(self) -> int | None:
        """The number of the engine process, when this object started one; else None."""
        return None if self._local is None else self._local.transport.pid

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {Path(self.model).name} {'running' if self._local else 'stopped'}>"
