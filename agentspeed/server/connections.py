"""One connection's protocol: a head that does not come, or never ends, ends the connection; a stuck one can be left."""

from __future__ import annotations

import asyncio
from typing import Any, Final, final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD: Final = 64 * 1024
"""Bytes of a request's line and headers."""
ABORT: Final = "agentspeed.abort"
"""In a request's scope: ends its connection at once, whatever was not taken from it yet."""

DIRECT: Final = "agentspeed.direct"
"""In a request's scope: its `Direct`."""


@final
class Direct:
    """Writes chunks of one answer's body past the layers of the application, which would only hand each of them on."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def ready(self) -> bool:
        """Whether the answer has begun and its connection takes more."""
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
        )

    def write(self, data: bytes) -> None:
        """One chunk."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def connection_class(header_seconds: float) -> type[asyncio.Protocol]:
    """Connections whose next head must be whole within `header_seconds` of its first byte, the first of all within
    that time of connecting."""

    class Connection(HttpToolsProtocol):
        _late: asyncio.TimerHandle | None = None
        _head = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_came()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._head += len(data)
            super().data_received(data)
            if self._late is not None and self._head > MOST_HEAD and not self.transport.is_closing():
                self._refuse(b"431 Request Header Fields Too Large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope[ABORT] = self.transport.abort  # type: ignore[typeddict-unknown-key]
            if self._late is None:
                self._await_head()

        def on_headers_complete(self) -> None:
            self._head_came()
            super().on_headers_complete()
            if self.cycle is not None and self.cycle.scope is self.scope:
                self.scope[DIRECT] = Direct(self.cycle)  # type: ignore[typeddict-unknown-key]

        def _await_head(self) -> None:
            self._head = 0
            self._late = self.loop.call_later(header_seconds, self._too_late)

        def _head_came(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _too_late(self) -> None:
            self._late = None
            if not self.transport.is_closing():
                self._refuse(b"408 Request Timeout")

        def _refuse(self, status: bytes) -> None:
            if self.cycle is None or self.cycle.response_complete:  # not into the middle of an answer
                self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    return Connection
