"""A server of the project in a thread of this process, on a free port, for tests that use real clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from agentspeed.server.options import ServerOptions
from agentspeed.server.serving import Server
from agentspeed.server.turns import Service


@contextmanager
def server(model: Any = None, options: ServerOptions | None = None, **engine_options: Any) -> Iterator[str]:
    """Its URL. At the end of the block it drains and ends; what it raised is raised here."""
    with server_and_service(model, options, **engine_options) as (url, _):
        yield url


@contextmanager
def server_and_service(
    model: Any = None, options: ServerOptions | None = None, **engine_options: Any
) -> Iterator[tuple[str, Service]]:
    """With what it serves by, which belongs to its own event loop."""
    running = Server(model, options or ServerOptions(port=0, drain_seconds=5.0), **engine_options)
    ready = threading.Event()
    found: list[tuple[str, Service]] = []
    raised: list[BaseException] = []

    def main() -> None:
        try:
            anyio.run(lambda: running.serve(lambda url, service: (found.append((url, service)), ready.set())))
        except BaseException as error:  # noqa: BLE001
            raised.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="server under test")
    thread.start()
    try:
        assert ready.wait(60)
        if raised:
            raise raised[0]
        yield found[0]
    finally:
        running.stop()
        thread.join(60)
        assert not thread.is_alive()
