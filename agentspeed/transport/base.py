"""What a session needs of an engine, message by message; every transport implements exactly this.

The protocol's messages (`wire`) and ids are handed on here: nothing above `transport` imports the engine's packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from agentspeed.errors import AgentspeedError
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids

__all__ = ["Connection", "Sink", "Then", "Transport", "pack_ids", "unpack_ids", "wire"]

Sink: TypeAlias = Callable[[wire.Event | None], None]
"""Called on the event loop with each event of a branch, in order; None is the last, when the engine is gone or the
connection gave up this branch: `Connection.why_dead` says why, if it is known. A sink that raises is a bug: it is
logged, the branch ends with None and `InternalError`, and no other branch notices."""

Then: TypeAlias = Callable[[wire.Reply], None]
"""Called on the event loop with a reply that is no refusal, in order with the events around it. If it raises, the call
raises `InternalError`."""


class Connection(Protocol):
    """One way to one engine, owned by the event loop that it was made on."""

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

    async def call(
        self,
        make: Callable[[int], wire.Command],
        then: Then | None = None,
        *,
        patience: float | None = None,
        keep_link: bool = False,
    ) -> wire.Reply:
        """Sends `make(request number)` and waits for its reply.

        `patience`: seconds for which the engine may be silent; one that answers others, or a question whether it lives,
        is waited for. Past it the connection is closed, unless `keep_link`: then this call alone is given up.

        Raises the public error of a refusal; `InvalidRequest` for a command that no frame can carry; `EngineDied` when
        the engine goes first or was silent for too long."""
        ...

    def post(self, make: Callable[[int], wire.Command]) -> None:
        """Sends a command whose reply nobody waits for, behind all that was sent before. Never blocks or raises."""
        ...

    def listen(self, branch: int, sink: Sink) -> None:
        """Gives events of `branch` to `sink` from now on. The branch belongs to this connection."""
        ...

    def unlisten(self, branch: int) -> None:
        """Gives events of `branch` to no sink any more; those that still come are dropped."""
        ...

    def after(self, call: Callable[[], None]) -> None:
        """To be called in a sink: runs `call`, which must not raise, once everything that came together was handed to
        its sinks."""
        ...

    def close(self) -> None:
        """Ends the connection; the engine closes its branches."""
        ...


class Transport(Protocol):
    """Where connections to one engine come from: a process that is started when it is needed, a thread, a server."""

    @property
    def pid(self) -> int | None:
        """The number of the engine process that this transport started and that lives; None for every other engine."""
        ...

    async def connect(self, *, after_death: bool) -> Connection:
        """A new connection, greeted, for the running event loop; it starts the engine where none runs.

        `after_death`: the last connection broke, so an engine that is ending is not to be taken for a living one.
        A caller that is cancelled does not wait for a slow engine, and leaves nothing open. Raises
        `EngineStartFailed`, `ConnectFailed`, `SessionClosed` after `close`, and the public error of what the engine
        refused to load."""
        ...

    async def close(self) -> None:
        """Ends the engine, if this transport started it. Connections are closed by those who asked for them."""
        ...
