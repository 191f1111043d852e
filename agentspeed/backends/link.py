"""A front's end of a link: a reader thread hands each frame to the event loop once; replies wake who waits for them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable
from typing import Any, final

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread

from agentspeed import errors
from agentspeed.backends.faults import public_error
from agentspeed.backends.port import Sink, Then
from agentspeed_engine import wire

_INLINE_BYTES = 32 * 1024
"""A larger frame is sent from a worker thread: the event loop never waits for the engine to read it."""
_REPLIES = (
    wire.Welcome, wire.Done, wire.Opened, wire.Forked, wire.LeaseAnswer, wire.Inspected, wire.Stats, wire.Picture,
    wire.Failed,
)


@final
class _Waiter:
    __slots__ = ("event", "reply", "then")

    def __init__(self, then: Then | None) -> None:
        self.event = anyio.Event()
        self.reply: wire.Reply | None = None
        self.then = then


@final
class Link:
    """Made by `connect`. It belongs to the event loop it was made on, and to no task."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer
        self._token: Any = anyio.lowlevel.current_token()
        self._requests = itertools.count(1)
        self._waiters: dict[int, _Waiter] = {}
        self._sinks: dict[int, Sink] = {}
        self._sending = threading.Lock()
        self._alive = True
        self._welcome: wire.Welcome | None = None
        self.why_dead: errors.AgentspeedError | None = None
        self._thread = threading.Thread(target=self._read, name="agentspeed-link", daemon=True)
        self._thread.start()

    @classmethod
    async def connect(cls, peer: socket.socket, client: str) -> Link:
        """Greets the engine. Raises `ConnectFailed` when it speaks another protocol."""
        link = cls(peer)
        try:
            reply = await link.call(lambda number: wire.Hello(request=number, client=client))
            if not isinstance(reply, wire.Welcome):
                raise errors.InternalError(f"The engine answered a greeting with {type(reply).__name__}.")
        except BaseException:  # cancelled or refused: nobody would own the socket and its thread
            link.close()
            raise
        link._welcome = reply
        return link

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def welcome(self) -> wire.Welcome:
        if self._welcome is None:
            raise errors.InternalError("The link was used before the engine greeted it.")
        return self._welcome

    async def call(self, make: Callable[[int], wire.Command], then: Then | None = None) -> wire.Reply:
        """See `port.Connection.call`."""
        if not self._alive:
            raise self._death()
        number = next(self._requests)
        waiter = self._waiters[number] = _Waiter(then)
        try:
            frame = wire.encode_command(make(number))
            if len(frame) <= _INLINE_BYTES:
                self._send(frame)
            else:
                await anyio.to_thread.run_sync(self._send, frame)
            await waiter.event.wait()
        finally:
            self._waiters.pop(number, None)
        if waiter.reply is None:
            raise self._death()
        if isinstance(waiter.reply, wire.Failed):
            raise public_error(waiter.reply.code, waiter.reply.message, waiter.reply.remedy)
        return waiter.reply

    def listen(self, branch: int, sink: Sink) -> None:
        self._sinks[branch] = sink

    def unlisten(self, branch: int) -> None:
        self._sinks.pop(branch, None)

    def close(self) -> None:
        self._alive = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _death(self) -> errors.AgentspeedError:
        if self.why_dead is not None:
            return self.why_dead
        return errors.EngineDied("The engine ended.", remedy="Use the session again: it is opened anew from its ids.")

    def _send(self, frame: bytes) -> None:
        try:
            with self._sending:
                self._socket.sendall(frame)
        except OSError:
            self._alive = False  # the reader thread sees the end too and tells everyone who waits

    # ---- the reader thread ----------------------------------------------------------------------------------------
    def _read(self) -> None:
        buffer = bytearray()
        with contextlib.suppress(OSError):
            while data := self._socket.recv(1 << 18):
                buffer += data
                messages: list[wire.Outgoing] = []
                while len(buffer) >= 4 and len(buffer) >= 4 + (size := int.from_bytes(buffer[:4], "little")):
                    messages += wire.decode_outbox(bytes(buffer[4 : 4 + size]))
                    del buffer[: 4 + size]
                if messages and not self._hand_over(self._deliver, messages):
                    break
        self._hand_over(self._ended)

    def _hand_over(self, call: Callable[..., None], *arguments: object) -> bool:
        """Runs `call` on the event loop; False when the loop is gone."""
        try:
            anyio.from_thread.run_sync(call, *arguments, token=self._token)
        except (RuntimeError, anyio.RunFinishedError):
            self._alive = False
            self._socket.close()
            return False
        return True

    def _deliver(self, messages: list[wire.Outgoing]) -> None:
        for message in messages:
            if isinstance(message, _REPLIES):
                waiter = self._waiters.get(message.request)
                if waiter is not None:
                    waiter.reply = message
                    if waiter.then is not None and not isinstance(message, wire.Failed):
                        waiter.then(message)
                    waiter.event.set()
                elif isinstance(message, wire.Failed) and message.request == 0:
                    self.why_dead = public_error(message.code, message.message, message.remedy)
            else:
                sink = self._sinks.get(message.branch)
                if sink is not None:
                    sink(message)

    def _ended(self) -> None:
        self._alive = False
        self._socket.close()
        for waiter in self._waiters.values():
            waiter.event.set()
        for sink in list(self._sinks.values()):
            sink(None)
