"""The local backend: one link per event loop to an engine process on this machine (or a thread, for tests)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, final
from weakref import WeakKeyDictionary, WeakSet

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from agentspeed.backends.faults import public_error
from agentspeed.backends.link import Link
from agentspeed.backends.model_files import fingerprint
from agentspeed.backends.process import ATTACH, EngineSlot, acquire, release
from agentspeed.errors import ExtraMissing, InvalidRequest


class Opener(Protocol):
    """Where sockets to an engine come from."""

    def want(self, change: int) -> None:
        """One more, or one less, waits for `open`: an engine that starts while nobody waits for it any more is
        ended. Never blocks."""
        ...

    def open(self, *, after_death: bool) -> socket.socket:
        """Blocks."""
        ...

    def close(self) -> None:
        """Blocks."""
        ...


@final
class _LoopLink:
    """The one link of one event loop to one engine, and how many `LocalEngine`s use it."""

    def __init__(self) -> None:
        self.users = 0
        self.opening = anyio.Lock()
        self.peer: socket.socket | None = None
        self.link: Link | None = None
        _places.add(self)

    def let_go(self) -> None:
        """In a process that was forked off: closes this copy of the socket and tells its link. The socket goes first,
        for `Link.close` shuts it down, and that would end the parent's link as well."""
        if self.peer is not None:
            self.peer.close()
        if self.link is not None:
            self.link.close()


_Loops: TypeAlias = dict[Any, _LoopLink]
_shared_loops: WeakKeyDictionary[EngineSlot, _Loops] = WeakKeyDictionary()
"""Sessions of one process-wide engine share the link of their loop: one frame and one wake-up a step for all."""
_counting = threading.Lock()
_places: WeakSet[_LoopLink] = WeakSet()


def _forked() -> None:
    """A process that is forked off begins with no link: what it sent would come between its parent's frames."""
    global _counting
    _counting = threading.Lock()
    for place in list(_places):
        place.let_go()
    _places.clear()
    _shared_loops.clear()


os.register_at_fork(after_in_child=_forked)


@final
class LocalEngine:
    """Sockets from an opener, links by event loop. A dead link is replaced at the next use."""

    def __init__(self, opener: Opener, *, on_close: Callable[[], None], loops: _Loops | None = None,
                 model: str | None = None) -> None:
        """`model`: the folder that the engine must serve; None takes what it serves."""
        self.opener = opener
        self._model = None if model is None else str(Path(model).resolve())
        self._loops: _Loops = {} if loops is None else loops
        self._joined: dict[Any, _LoopLink] = {}
        self._on_close = on_close

    @classmethod
    def shared(cls, options: Mapping[str, Any]) -> LocalEngine:
        """On the process-wide engine of these options and of the model's files as they are now."""
        slot = acquire(options, fingerprint(Path(options["model"])))
        with _counting:
            loops = _shared_loops.setdefault(slot, {})
        return cls(slot, on_close=lambda: release(slot), loops=loops, model=options["model"])

    @classmethod
    def own(cls, options: Mapping[str, Any]) -> LocalEngine:
        """On an engine of its own, ended by `close`."""
        slot = EngineSlot(options)
        return cls(slot, on_close=slot.close, model=options["model"])

    async def link(self) -> Link:
        """The living link of the running event loop. Raises what starting or greeting an engine raises, and
        `InvalidRequest` when a running engine that was attached to serves another model."""
        place = self._place(anyio.lowlevel.current_token())
        async with place.opening:
            link = place.link
            if link is None or not link.alive:
                place.peer = await self._peer(after_death=link is not None)
                link = place.link = await Link.connect(place.peer, "agentspeed")
            self._check_model(link.welcome.source)
            return link

    async def _peer(self, *, after_death: bool) -> socket.socket:
        """A socket of the opener's. Whoever is cancelled meanwhile does not wait for an engine that takes long."""
        lock, made, given_up = threading.Lock(), list[socket.socket](), False

        def opened() -> socket.socket:
            peer = self.opener.open(after_death=after_death)
            with lock:
                made.append(peer)
                if given_up:
                    peer.close()
            return peer

        self.opener.want(+1)
        try:
            return await anyio.to_thread.run_sync(opened, abandon_on_cancel=True)
        except BaseException:
            with lock:
                given_up = True
                for peer in made:
                    peer.close()
            raise
        finally:
            self.opener.want(-1)

    def _check_model(self, served: str) -> None:
        """Ids of one model mean nothing to another. An engine that names none computes nothing and takes any."""
        if served and self._model is not None and served != self._model:
            raise InvalidRequest(
                f"{ATTACH} names an engine that serves {served}; this session asks for {self._model}.",
                remedy=f"Ask for {served}, unset {ATTACH}, or attach to an engine of the model you want.")

    async def close(self) -> None:
        """Lets go of the links, closing those that nobody else uses, and of the engine."""
        with _counting:
            left = [(loop, place) for loop, place in self._joined.items()]
            self._joined.clear()
            for loop, place in left:
                place.users -= 1
                if place.users == 0 and self._loops.get(loop) is place:
                    del self._loops[loop]
        for _, place in left:
            if place.users == 0 and place.link is not None:
                place.link.close()
        await anyio.to_thread.run_sync(self._on_close)

    def _place(self, loop: Any) -> _LoopLink:
        place = self._joined.get(loop)
        if place is None:
            with _counting:
                place = self._loops.get(loop)
                if place is None:
                    place = self._loops[loop] = _LoopLink()
                place.users += 1
                self._joined[loop] = place
        return place


def engine_defaults() -> dict[str, str]:
    """Every engine option with its default, as text. Raises `ExtraMissing` without the engine's packages."""
    try:
        from agentspeed_engine.run.options import EngineOptions
    except ModuleNotFoundError as error:
        raise ExtraMissing(f"The engine needs {error.name}, which is not installed.",
                           remedy="Install agentspeed[engine].") from error
    fields = msgspec.structs.fields(EngineOptions)
    return {field.name: "required" if field.required else repr(field.default) for field in fields}


def engine_model(folder: Path) -> str:
    """What a model folder holds, in one line, as far as its configuration tells; torch is not loaded. Raises the public
    error of what the engine would refuse."""
    from agentspeed_engine.errors import EngineFault
    from agentspeed_engine.models.catalog import describe

    try:
        found = describe(folder)
    except EngineFault as fault:
        raise public_error(fault.code, fault.message, fault.remedy) from fault
    return f"{found.model_type}, {found.layers} layers, a context of {found.context_limit} tokens"
