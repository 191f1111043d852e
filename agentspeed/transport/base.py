"""What a session needs of an engine, message by message; every transport implements exactly this.

The protocol's messages (`wire`) and ids are handed on here: nothing above `transport` imports the engine's packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from agentspeed.errors import AgentspeedError
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids

__all__ = ["Connection", "Sink", "Then", "pack_ids", "unpack_ids", "wire"]

Sink: TypeAlias = Callable[[wire.Event | None], None]
"""Called on the event loop with each event of a branch, in order; None when the engine is gone."""

Then: TypeAlias = Callable[[wire.Reply], None]
"""Called on the event loop with a reply that is no refusal, in order with the events around it."""


class Connection(Protocol):
    """One way to one engine, owned by one event loop."""

    @property
    def alive(self) -> bool:
        """False once the engine is gone; a new connection must be made."""
        ...

    @property
    def why_dead(self) -> AgentspeedError | None:
        """The engine's last words, if it had any."""
        ...

    @property
    def welcome(self) -> wire.Welcome:
        """What the engine said of itself."""
        ...

    async def call(self, make: Callable[[int], wire.Command], then: Then | None = None, *,
                   patience: float | None = None) -> wire.Reply:
        """Sends `make(request number)` and waits for its reply. Raises the public error of a refusal, and
        `EngineDied` when the engine goes first, or answers nothing at all for `patience` seconds."""
        ...

    def listen(self, branch: int, sink: Sink) -> None:
        """Events of `branch` go to `sink` from now on."""
        ...

    def unlisten(self, branch: int) -> None:
        """They no longer do."""
        ...

    def close(self) -> None:
        """Ends the connection; the engine closes its branches."""
        ...
