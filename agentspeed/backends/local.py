"""The local backend: one link per event loop to an engine process on this machine (or a thread, for tests)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, final

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from agentspeed.backends.link import Link
from agentspeed.backends.process import EngineSlot, acquire, release
from agentspeed.errors import ExtraMissing


class Opener(Protocol):
    """Where sockets to an engine come from."""

    def open(self, *, after_death: bool) -> socket.socket: ...

    def close(self) -> None: ...


@final
class LocalEngine:
    """Sockets from an opener, links by event loop. A dead link is replaced at the next use."""

    def __init__(self, opener: Opener, *, on_close: Callable[[], None]) -> None:
        self.opener = opener
        self._links: dict[Any, Link] = {}
        self._opening: dict[Any, anyio.Lock] = {}
        self._on_close = on_close

    @classmethod
    def shared(cls, options: Mapping[str, Any]) -> LocalEngine:
        """On the process-wide engine of these options."""
        slot = acquire(options)
        return cls(slot, on_close=lambda: release(slot))

    @classmethod
    def own(cls, options: Mapping[str, Any]) -> LocalEngine:
        """On an engine of its own, ended by `close`."""
        slot = EngineSlot(options)
        return cls(slot, on_close=slot.close)

    async def link(self) -> Link:
        """The living link of the running event loop. Raises what starting or greeting an engine raises."""
        loop = anyio.lowlevel.current_token()
        async with self._opening.setdefault(loop, anyio.Lock()):
            link = self._links.get(loop)
            if link is None or not link.alive:
                peer = await anyio.to_thread.run_sync(partial(self.opener.open, after_death=link is not None))
                link = self._links[loop] = await Link.connect(peer, "agentspeed")
            return link

    async def close(self) -> None:
        """Closes this loop's links and lets go of the engine."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        await anyio.to_thread.run_sync(self._on_close)


def engine_defaults() -> dict[str, str]:
    """Every engine option with its default, as text. Raises `ExtraMissing` without the engine's packages."""
    try:
        from agentspeed_engine.run.options import EngineOptions
    except ModuleNotFoundError as error:
        raise ExtraMissing(f"The engine needs {error.name}, which is not installed.",
                           remedy="Install agentspeed[engine].") from error
    fields = msgspec.structs.fields(EngineOptions)
    return {field.name: "required" if field.required else repr(field.default) for field in fields}
