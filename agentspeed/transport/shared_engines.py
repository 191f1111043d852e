"""The engine of one `Engine` object: one connection per event loop, made anew after a death, perhaps shared by many."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, final
from weakref import WeakKeyDictionary

import anyio
import anyio.lowlevel
import msgspec

from agentspeed._base.wording import counted
from agentspeed.errors import ExtraMissing, InvalidRequest
from agentspeed.transport.base import Connection, Transport
from agentspeed.transport.engine_process import ATTACH, EngineSlot, acquire, release
from agentspeed.transport.error_map import converted
from agentspeed.transport.fingerprint import fingerprint
from agentspeed.usage import Starting
from agentspeed_engine.protocol.messages import as_text


@final
class _Place:
    """The one connection of one event loop to one engine, and how many `EngineConnections`s use it."""

    def __init__(self) -> None:
        self.users = 0
        self.opening = anyio.Lock()
        self.connection: Connection | None = None


OnStart: TypeAlias = Callable[[Starting], object]
_Places: TypeAlias = dict[Any, _Place]
_shared_places: WeakKeyDictionary[EngineSlot, _Places] = WeakKeyDictionary()
"""Sessions of one process-wide engine share the connection of their loop: one frame and one wake-up a step for all."""
_counting = threading.Lock()


def _forked() -> None:
    """A process that is forked off begins with no connection; `socket_link` closes its copies of the parent's."""
    global _counting
    _counting = threading.Lock()
    _shared_places.clear()


os.register_at_fork(after_in_child=_forked)


@final
class EngineConnections:
    """Connections of a transport, by event loop. A dead one is replaced at the next use."""

    def __init__(
        self,
        transport: Transport,
        *,
        on_close: Callable[[], Awaitable[None]] | None = None,
        places: _Places | None = None,
        model: str | None = None,
    ) -> None:
        """`on_close`: lets go of the transport; None closes it. `model`: the folder that the engine must serve; None
        takes what it serves."""
        self.transport = transport
        self._model = None if model is None else str(Path(model).resolve())
        self._places: _Places = {} if places is None else places
        self._joined: _Places = {}
        self._on_close = transport.close if on_close is None else on_close

    @classmethod
    def shared(cls, options: Mapping[str, Any], on_start: OnStart | None = None) -> EngineConnections:
        """On the process-wide engine of these options and of the model's files as they are now. `on_start` is told how
        far its starts are, until `close`."""
        slot = acquire(options, fingerprint(Path(options["model"])))
        with _counting:
            places = _shared_places.setdefault(slot, {})

        if on_start is not None:
            slot.listeners.append(on_start)

        async def released() -> None:
            if on_start is not None:
                slot.listeners.remove(on_start)
            release(slot)

        return cls(slot, on_close=released, places=places, model=options["model"])

    @classmethod
    def own(cls, options: Mapping[str, Any], on_start: OnStart | None = None) -> EngineConnections:
        """On an engine of its own, ended by `close`."""
        slot = EngineSlot(options)
        if on_start is not None:
            slot.listeners.append(on_start)
        return cls(slot, model=options["model"])

    async def link(self) -> Connection:
        """The living connection of the running event loop. Raises what `Transport.connect` raises, and
        `InvalidRequest` when a running engine that was attached to serves another model."""
        place = self._place(anyio.lowlevel.current_token())
        async with place.opening:
            connection = place.connection
            if connection is None or not connection.alive:
                connection = await self.transport.connect(after_death=connection is not None)
                place.connection = connection
            self._check_model(connection.welcome.source)
            return connection

    def _check_model(self, served: str) -> None:
        """Ids of one model mean nothing to another. An engine that names none computes nothing and takes any."""
        if served and self._model is not None and served != as_text(self._model):
            raise InvalidRequest(
                f"{ATTACH} names an engine that serves {served}; this session asks for {self._model}.",
                remedy=f"Ask for {served}, unset {ATTACH}, or attach to an engine of the model you want.",
            )

    async def close(self) -> None:
        """Lets go of the connections, closing those that no other session uses, and of the engine."""
        with _counting:
            left = list(self._joined.items())
            self._joined.clear()
            for loop, place in left:
                place.users -= 1
                if place.users == 0 and self._places.get(loop) is place:
                    del self._places[loop]
        for _, place in left:
            if place.users == 0 and place.connection is not None:
                place.connection.close()
        await self._on_close()

    def _place(self, loop: Any) -> _Place:
        place = self._joined.get(loop)
        if place is None:
            with _counting:
                place = self._places.get(loop)
                if place is None:
                    place = self._places[loop] = _Place()
                place.users += 1
                self._joined[loop] = place
        return place


def engine_defaults() -> dict[str, str]:
    """Every engine option with its default, as text. Raises `ExtraMissing` without the engine's packages."""
    try:
        from agentspeed_engine.serve.options import EngineOptions
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            f"The engine needs {error.name}, which is not installed.", remedy="Install agentspeed[engine]."
        ) from error
    fields = msgspec.structs.fields(EngineOptions)
    return {field.name: "required" if field.required else repr(field.default) for field in fields}


def engine_model(folder: Path) -> str:
    """What a model folder holds, in one line, as far as its configuration tells; torch is not loaded. Raises the public
    error of what the engine would refuse."""
    from agentspeed_engine.models.catalog import describe

    with converted():
        found = describe(folder)
    return f"{found.model_type}, {counted(found.layers, 'layer')}, a context of {found.context_limit} tokens"
