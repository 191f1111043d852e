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
from agentspeed._base.completion import run_to_completion
from agentspeed.backends.faults import public_error
from agentspeed.backends.port import Sink, Then
from agentspeed_engine import wire

_INLINE_BYTES = 32 * 1024
"""A larger frame is sent from a worker thread: the event loop never waits for the engine to read it."""
_GREETING_SECONDS = 15.0
"""A living engine greets at once, whatever else it does."""
_WAITS = 24
"""So many times its patience waits a call whose engine answers others but not it: then the link is given up."""
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
        self._frames = 0
        """Frames that have come: one that came since somebody began to wait tells that the engine lives."""
        self._welcome: wire.Welcome | None = None
        self.why_dead: errors.AgentspeedError | None = None
        self._thread = threading.Thread(target=self._read, name="agentspeed-link", daemon=True)
        self._thread.start()

    @classmethod
    async def connect(cls, peer: socket.socket, client: str) -> Link:
        """Greets the engine. Raises `ConnectFailed` when it speaks another protocol, or does not answer."""
        link = cls(peer)
        try:
            reply: wire.Reply | None = None
            with anyio.move_on_after(_GREETING_SECONDS):
                reply = await link.call(lambda number: wire.Hello(request=number, client=client))
            if reply is None:
                raise errors.ConnectFailed(
                    f"An engine listens but did not answer for {_GREETING_SECONDS:g} s.",
                    remedy="See whether its process is stopped or stuck; when it was ended, another is started.")
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

    async def call(self, make: Callable[[int], wire.Command], then: Then | None = None, *,
                   patience: float | None = None) -> wire.Reply:
        """See `port.Connection.call`."""
        if not self._alive:
            raise self._death()
        number = next(self._requests)
        waiter = self._waiters[number] = _Waiter(then)
        try:
            await self._send(wire.encode_command(make(number)))
            if patience is None:
                await waiter.event.wait()
            else:
                await self._answered(waiter, patience)
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

    async def _answered(self, waiter: _Waiter, patience: float) -> None:
        """A step may take long, and with it what waits for its end: an engine that answers others is waited for."""
        for _ in range(_WAITS):
            frames = self._frames
            with anyio.move_on_after(patience):
                await waiter.event.wait()
            if waiter.event.is_set():
                return
            if frames == self._frames and not await self._answers(patience):
                break
        self.why_dead = errors.EngineDied(f"The engine did not answer for {patience:g} s; its link was closed.",
                                          remedy="Use the session again: it is opened anew from its ids.")
        self.close()

    async def _answers(self, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            _ = await self.call(lambda number: wire.GetStats(request=number))
            return True
        return False

    async def _send(self, frame: bytes) -> None:
        """At once where the socket takes it, else from a worker thread: the event loop waits for nobody."""
        rest, held = memoryview(frame), False
        try:
            if len(frame) <= _INLINE_BYTES and self._sending.acquire(blocking=False):
                held = True
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
            if rest:
                waits = held
                held = False
                await run_to_completion(lambda: anyio.to_thread.run_sync(self._send_rest, rest, waits))
        except OSError:
            self._alive = False  # the reader thread sees the end too and tells everyone who waits
        finally:
            if held:
                self._sending.release()

    def _send_rest(self, rest: memoryview, held: bool) -> None:
        """`held`: the lock is the frame's already, for the rest must follow its beginning."""
        if not held:
            _ = self._sending.acquire()
        try:
            self._socket.sendall(rest)
        finally:
            self._sending.release()

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
        self._frames += 1
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
