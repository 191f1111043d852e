"""An engine in a thread of this process, behind the same frames: for tests, and where no second process may be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import msgspec

from agentspeed.transport.error_map import public_error

if TYPE_CHECKING:
    from agentspeed_engine.run.inprocess import EngineThread


@final
class ThreadOpener:
    """Starts the thread at the first link. Busy Python code beside it slows its steps: a process does not have that."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._engine: EngineThread | None = None
        self._lock = threading.Lock()

    def want(self, change: int) -> None:
        """It starts at once: nobody waits."""

    def open(self, *, after_death: bool) -> socket.socket:
        """A socket to the engine. Raises the public error of what it refused to load."""
        from agentspeed_engine.errors import EngineFault
        from agentspeed_engine.run.inprocess import EngineThread
        from agentspeed_engine.run.options import parse_options

        with self._lock:
            if after_death:
                self._end()
            if self._engine is None:
                try:
                    self._engine = EngineThread(parse_options(msgspec.json.encode(self._options).decode()))
                except EngineFault as fault:
                    raise public_error(fault.code, fault.message, fault.remedy) from fault
            return self._engine.connect()

    def close(self) -> None:
        """Ends the thread. Blocks."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

