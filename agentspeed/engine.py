"""An engine as an object: one model served by one process, opened and closed by who made it."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, final

import anyio.to_thread

from agentspeed import errors
from agentspeed.checking import check_number, is_whole
from agentspeed.front.codec import ChatCodec
from agentspeed.transport.base import Connection, Transport, wire
from agentspeed.transport.hub import resolve
from agentspeed.transport.model_files import fetch_model_files
from agentspeed.transport.remote import RemoteTransport
from agentspeed.transport.shared_engines import EngineHandle
from agentspeed.transport.socket_link import SocketSource
from agentspeed.whole import whole

if TYPE_CHECKING:
    from agentspeed.session import Session

NANO = Path(__file__).parent / "models" / "nano"
"""The model that ships with the package."""
_PATIENCE = 5.0
"""Seconds without any answer after which an engine that is asked for its counts is given up."""


@final
class Engine:
    """`async with Engine("model", pages=4096) as engine: async with engine.session() as s: ...`

    `model` is a Hugging Face model folder or a repository id; None is the model that ships with the package. Options
    are those of `agentspeed_engine.run.options.EngineOptions`; unknown ones are refused when the process starts.
    `revision` is a branch, a tag or a commit of a repository."""

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any) -> None:
        if model is not None and not isinstance(model, str | os.PathLike):
            raise errors.InvalidRequest(f"model is {model!r}; it must be a folder or a repository id.")
        self.model = NANO if model is None else model
        self.revision: str | None = options.pop("revision", None)
        if not isinstance(self.revision, str | None):
            raise errors.InvalidRequest(f"revision is {self.revision!r}; it must be a branch, a tag or a commit.")
        self._options = {name: os.fspath(value) if isinstance(value, os.PathLike) else value
                         for name, value in options.items()}
        for name, value in self._options.items():
            if value is not None and not isinstance(value, str | int | float):
                raise errors.InvalidRequest(f"{name} is {value!r}; an engine option is a number, a text, or None.")
            if is_whole(value):
                check_number(name, value)
        self._local: EngineHandle | None = None
        self._codec: ChatCodec | None = None
        self._shared = False
        self._transport: Transport | None = None
        self._api_key = os.environ.get("AGENTSPEED_API_KEY")
        self._http_client = None

    @classmethod
    def over(cls, transport: Transport, model: str | os.PathLike[str]) -> Engine:
        """On connections of `transport` instead of a process of its own; `model` gives the tokenizer."""
        engine = cls(model)
        engine._transport = transport
        return engine

    @classmethod
    def shared(cls, model: str | os.PathLike[str] | None, options: dict[str, Any]) -> Engine:
        """On the process-wide engine of this model and these options; it ends a minute after its last use."""
        engine = cls(model, **options)
        engine._shared = True
        return engine

    async def start(self) -> Self:
        """Starts the process (or finds the shared one) and loads the tokenizer. Calling it again does nothing."""
        if self._local is None:
            if (url := _url_of(self.model)) is not None:
                self._transport = RemoteTransport(url, api_key=self._api_key, client=self._http_client)
                self._local = EngineHandle(self._transport)
                folder = await self._fetched(self._local)
            else:
                folder = await anyio.to_thread.run_sync(resolve, self.model, self.revision)
            self._codec = await anyio.to_thread.run_sync(_codec_of, folder)
            options = {"model": str(folder), **self._options}
            if self._transport is not None:
                self._local = self._local or EngineHandle(self._transport)
            else:
                self._local = EngineHandle.shared(options) if self._shared else EngineHandle.own(options)
        try:
            _ = await self._local.link()
        except BaseException:  # refused or cancelled: nobody may own the process that was started
            await self.close()
            raise
        return self

    async def _fetched(self, local: EngineHandle) -> Path:
        """The folder with the texts of a server's model; nothing is left open when it cannot be had."""
        try:
            return await fetch_model_files(await local.link())
        except BaseException:
            self._local = None
            await whole(local.close)
            raise

    async def close(self) -> None:
        """Lets go of the process; one of its own ends."""
        local, self._local = self._local, None
        if local is not None:
            await whole(local.close)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    def session(self, **options: Any) -> Session:
        """A session on this engine; the options are those of `Session`."""
        from agentspeed.session import Session

        return Session(self, **options)

    @property
    def codec(self) -> ChatCodec:
        """Raises `SessionClosed` before `start`."""
        if self._codec is None:
            raise errors.SessionClosed("The engine was not started.", remedy="Use it in `async with`.")
        return self._codec

    async def link(self) -> Connection:
        """The living link of this event loop; a dead engine is started again."""
        if self._local is None:
            raise errors.SessionClosed("The engine is not running.", remedy="Use it in `async with`.")
        return await self._local.link()

    async def stats(self) -> wire.Stats:
        """Counts of the whole engine."""
        try:
            reply = await self._stats()
        except errors.EngineDied:  # since it was used last: another is started
            reply = await self._stats()
        if not isinstance(reply, wire.Stats):
            raise errors.InternalError(f"The engine answered GetStats with {type(reply).__name__}.")
        return reply

    async def _stats(self) -> wire.Reply:
        link = await self.link()
        return await link.call(lambda number: wire.GetStats(request=number), patience=_PATIENCE)

    def connected_socket(self) -> socket.socket:
        """A fresh socket to the engine, for a server that relays links. Blocks."""
        if self._local is None:
            raise errors.SessionClosed("The engine is not running.", remedy="Use it in `async with`.")
        opened: socket.socket = cast("SocketSource", self._local.transport).open(after_death=False)
        return opened

    @property
    def pid(self) -> int | None:
        """Of the engine process, when this object started one."""
        return None if self._local is None else self._local.transport.pid

    def __repr__(self) -> str:
        return f"<Engine {Path(self.model).name} {'running' if self._local else 'stopped'}>"


def _url_of(model: str | os.PathLike[str]) -> str | None:
    text = os.fspath(model)
    return text if text.startswith(("http://", "https://")) else None


def _codec_of(folder: Path) -> ChatCodec:
    """The folder's codec, made once as long as its files stay as they are: sessions come by the thousand."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")
    files = (folder / name for name in names)
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None for path in files)
    return _cached_codec(folder.resolve(), stamps)


@lru_cache(maxsize=8)
def _cached_codec(folder: Path, stamps: tuple[tuple[int, int] | None, ...]) -> ChatCodec:
    return ChatCodec(folder)
