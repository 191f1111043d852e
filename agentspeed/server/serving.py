"""`agentspeed serve` while it runs: the engine is started, the server listens, SIGTERM drains it."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, Final, cast, final

import anyio
import anyio.to_thread
import uvicorn

from agentspeed import errors
from agentspeed._core.engine_options import EngineOptions
from agentspeed.engine import Engine
from agentspeed.observing import Observer
from agentspeed.server.app import application
from agentspeed.server.connections import connection_class
from agentspeed.server.options import ServerOptions
from agentspeed.server.turns import Service, snapshot_files
from agentspeed.transport.engine_process import ATTACH
from agentspeed.transport.shared_engines import OnStart

_LOG = logging.getLogger("agentspeed.server")
_KEPT_ALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""A peer that went without a word while nothing is sent is known to be gone after a minute."""
UNTAKEN_SECONDS = 30.0
"""The longest that what was sent may wait in the system's buffer for its peer to take it: a peer that is gone, or that
stopped reading, ends its connection then. Without this Linux would go on trying for a quarter of an hour."""


@final
class Server:
    """One engine and one listening socket, for as long as `serve` runs. The engine is the one that AGENTSPEED_ENGINE
    names, or one of its own."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None,
        options: ServerOptions,
        *,
        observer: Observer | None = None,
        on_start: OnStart | None = None,
        **engine_options: Any,
    ) -> None:
        if os.environ.get(ATTACH):
            self._engine = Engine.shared(model, cast("EngineOptions", engine_options), on_start)
        else:
            self._engine = Engine(model, on_start=on_start, **engine_options)
        self._engine.observer = observer
        self._options = options
        self._uvicorn: uvicorn.Server | None = None

    async def serve(self, ready: Callable[[str, Service], None] | None = None) -> None:
        """Until SIGTERM, SIGINT or `stop`. `ready` hears the URL once requests are answered. Raises what starting the
        engine raises, `ConnectFailed` when the port is taken, and
        `InvalidRequest` for a folder of snapshots that cannot be written."""
        files = snapshot_files(self._options)
        listener = _listen(self._options)
        try:
            if files is not None:
                await anyio.to_thread.run_sync(files.trim)
            async with self._engine as engine:
                service = Service(engine, self._options)
                config = uvicorn.Config(
                    application(service),
                    log_config=None,
                    access_log=False,
                    lifespan="on",
                    http=connection_class(self._options.header_seconds),
                    ws="none",
                    timeout_keep_alive=30,
                    timeout_graceful_shutdown=int(self._options.drain_seconds) or 1,
                    server_header=False,
                )
                self._uvicorn = _Uvicorn(config, service)
                if ready is not None:
                    ready(_url(listener), service)
                await self._uvicorn.serve(sockets=[listener])
        finally:
            listener.close()

    def stop(self) -> None:
        """Ends `serve` as SIGTERM does: running requests may end within `drain_seconds`."""
        if self._uvicorn is not None:
            self._uvicorn.handle_exit(signal.SIGTERM, None)


class _Uvicorn(uvicorn.Server):
    """Says that it drains as soon as it is told to end. Having ended it returns: uvicorn would send itself the signal
    again, and the process would die of it before its engine had been closed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._service.drain()
        self.force_exit |= self.should_exit and sig == signal.SIGINT  # a second Ctrl-C waits for nothing
        self.should_exit = True


def _listen(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections have what their listener has
    for name, value in {**_KEPT_ALIVE, "TCP_USER_TIMEOUT": int(UNTAKEN_SECONDS * 1000)}.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    try:
        listener.bind((options.host, options.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise errors.ConnectFailed(
            f"{options.host}:{options.port} cannot be listened to: {error.strerror or error}.",
            remedy="Give another --port (0 takes a free one), or end what listens there.",
        ) from error
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(
    model: str | os.PathLike[str] | None,
    options: ServerOptions,
    ready: Callable[[str, Service], None],
    **engine_options: Any,
) -> None:
    """Blocks until the server has ended."""
    server = Server(model, options, **engine_options)
    anyio.run(lambda: server.serve(ready), backend_options={"use_uvloop": True})
