"""One model's engine as sessions use it: started and ended here, reached by the link of each event loop."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from agentspeed import errors
from agentspeed._base.completion import run_to_completion
from agentspeed._base.validate import check_messages, check_text, shown
from agentspeed._core.engine_options import EngineOptions, checked_engine_options
from agentspeed._core.model_files import NANO, codec_of, resolve
from agentspeed.backends.link import Link
from agentspeed.backends.local import LocalEngine, Opener
from agentspeed.backends.port import wire
from agentspeed.front.codec import ChatCodec
from agentspeed.messages import Message
from agentspeed.tools.threads import in_thread

_PATIENCE = 5.0
"""Seconds without any answer after which an engine that is asked for its counts is given up."""


class EngineHandle:
    """What `Engine` is made of. A session that was given a model's name instead of an `Engine` has one of these to
    itself, on the process-wide engine of that model."""

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Unpack[EngineOptions]) -> None:
        if model is not None and not isinstance(model, str | os.PathLike):
            raise errors.InvalidRequest(f"model is {shown(model)}; it must be a folder or a repository id.")
        self.model = NANO if model is None else model
        self._options = checked_engine_options(options)
        self._shared = False
        self._opener: Opener | None = None
        self._lock = threading.Lock()
        """Guards what follows: an engine may be used by several event loops."""
        self._local: LocalEngine | None = None
        self._codec: ChatCodec | None = None
        self._welcome: wire.Welcome | None = None
        self._starting = 0
        """Calls of `start` that have not returned."""
        self._started = False

    @classmethod
    def over(cls, opener: Opener, model: str | os.PathLike[str]) -> Self:
        """On links from `opener` instead of a process of its own; `model` gives the tokenizer. For `testing`."""
        engine = cls(model)
        engine._opener = opener
        return engine

    @classmethod
    def shared(cls, model: str | os.PathLike[str] | None, options: EngineOptions) -> Self:
        """On the process-wide engine of this model and these options; it ends a minute after its last use."""
        engine = cls(model, **options)
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
                folder = await in_thread(lambda: resolve(self.model))
                codec = await in_thread(lambda: codec_of(folder))
                with self._lock:  # another call may have been faster
                    if self._local is None:
                        self._codec, self._local = codec, self._opened(folder)
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

    def _opened(self, folder: Path) -> LocalEngine:
        if self._opener is not None:
            return LocalEngine(self._opener, on_close=self._opener.close)
        options = {"model": str(folder), **self._options}
        return LocalEngine.shared(options) if self._shared else LocalEngine.own(options)

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

    async def link(self) -> Link:
        """The living link of this event loop; a dead engine is started again. Raises `SessionClosed` before `start`."""
        local = self._local
        if local is None:
            raise errors.SessionClosed("The engine is not running.", remedy="Use it in `async with`.")
        link = await local.link()
        self._welcome = link.welcome
        return link

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

    @property
    def pid(self) -> int | None:
        """Of the engine process, when this object started one."""
        opener = None if self._local is None else self._local.opener
        return getattr(opener, "pid", None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {Path(self.model).name} {'running' if self._local else 'stopped'}>"
