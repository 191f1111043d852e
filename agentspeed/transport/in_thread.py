"""An engine in a thread of this process, behind the same frames: for tests, and where no second process may be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import anyio.to_thread
import msgspec

from agentspeed.errors import EngineStartFailed
from agentspeed.transport.base import Connection
from agentspeed.transport.error_map import converted, shown_credential
from agentspeed.transport.socket_link import open_link

if TYPE_CHECKING:
    from agentspeed_engine.serve.in_thread import EngineThread


@final
class ThreadTransport:
    """Starts the thread at the first link. Busy Python code beside it slows its steps: a process does not have that."""

    pid = None

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._engine: EngineThread | None = None
        self._lock = threading.Lock()

    async def connect(self, *, after_death: bool) -> Connection:
        """See `base.Transport`."""
        return await open_link(self, after_death=after_death, client="agentspeed", credential=shown_credential())

    async def close(self) -> None:
        """Ends the thread."""
        await anyio.to_thread.run_sync(self._end)

    def want(self, change: int) -> None:
        """See `socket_link.SocketSource`. A thread that loads cannot be ended: it is kept for the next use."""

    def open(self, *, after_death: bool) -> socket.socket:
        """A socket to the engine. Raises the public error of what it refused to load."""
        from agentspeed_engine.serve.in_thread import EngineThread
        from agentspeed_engine.serve.options import parse_options

        if after_death:
            self._end()
        with self._lock:
            try:
                if self._engine is None:
                    with converted():
                        options = parse_options(msgspec.json.encode(self._options).decode())
                        self._engine = EngineThread(options)
                return self._engine.connect()
            except OSError as error:
                raise EngineStartFailed(
                    f"The engine thread could not be reached: {error}.", remedy="See `ulimit -n` and `ulimit -u`."
                ) from error

    def _end(self) -> None:
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()
