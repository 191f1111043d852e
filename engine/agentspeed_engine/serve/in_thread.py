"""The engine loop in a thread of this process: for tests, and where no second process may be."""

from __future__ import annotations

import os
import socket
import threading
from typing import final

from agentspeed_engine.protocol.credential import credential
from agentspeed_engine.serve.loop import EngineLoop
from agentspeed_engine.serve.options import EngineOptions, build, recording_of


@final
class EngineThread:
    """Started at construction; `close` ends it. A thread link has the frames and rules of a process link."""

    def __init__(self, options: EngineOptions) -> None:
        """Raises `EngineFault` when the options or the model are refused."""
        # Its process may end at any time without telling it: that is no crash of the engine.
        recording = recording_of(options, crashes=None)
        built = build(options)
        try:
            self._loop = EngineLoop(
                built,
                outbox_bytes=options.outbox_bytes,
                check=options.check_every_step,
                idle_seconds=options.idle_seconds,
                recording=recording,
                credential=credential(os.environ),
            )
        except BaseException:
            built.close()
            raise
        self._listener, self._address = _listener()
        self._loop.listen(self._listener)
        self._thread = threading.Thread(target=self._loop.run, name="agentspeed-engine", daemon=True)
        self._thread.start()

    def connect(self) -> socket.socket:
        """A new link to the engine, blocking."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.connect(self._address)
        return peer

    def close(self) -> None:
        self._loop.stop()
        self._thread.join(timeout=10.0)
        self._listener.close()


def _listener() -> tuple[socket.socket, str]:
    """A listening socket that no other process can name: Linux's abstract namespace picks the address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")
    listener.listen()
    address: str = listener.getsockname()
    return listener, address
