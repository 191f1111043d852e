"""A client's end of a socket: a reader thread hands each frame to the event loop once; replies wake those who wait."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol, final
from weakref import WeakSet

import anyio
import anyio.lowlevel
import anyio.to_thread

from agentspeed import errors
from agentspeed.transport.base import Sink, Then
from agentspeed.transport.error_map import last_words, public_error
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import BadFrame, Unsendable, encode_command, outbox_reader

_LOG: Final = logging.getLogger("agentspeed.transport")
_GREETING_SECONDS: Final = 15.0
"""A living engine greets at once, whatever else it does."""
_MOST_PATIENCES: Final = 24
"""Give up a call after this many times its patience, even if the engine still answers other calls."""
_READ_BYTES: Final = 1 << 18
_MOST_UNTAKEN: Final = 16
"""Reads that may wait for a busy event loop; then the engine waits, as it does for any slow reader."""
_LOOKS_SECONDS: Final = 1.0
"""How often a reader that waits for the event loop sees whether there is one."""


class SocketSource(Protocol):
    """Where connected sockets to one engine come from."""

    def want(self, change: int) -> None:
        """Counts the callers that wait for `open`: `change` is 1 before a call and -1 after it. An engine that is
        still starting when the count falls to 0 is ended. Never blocks."""
        ...

    def open(self, *, after_death: bool) -> socket.socket:
        """A connected socket; starts the engine where none runs. Blocks; may be called from any thread."""
        ...


@final
class _Waiter:
    __slots__ = ("event", "failure", "reply", "then")

    def __init__(self, then: Then | None) -> None:
        self.event = anyio.Event()
        self.reply: wire.Reply | None = None
        self.failure: Exception | None = None
        """What `then` raised."""
        self.then = then


@final
class SocketLink:
    """A `Connection` over one socket. Made by `connect`; it belongs to an event loop and to no task."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer
        self._token: Any = anyio.lowlevel.current_token()
        self._requests = itertools.count(1)
        self._waiters: dict[int, _Waiter] = {}
        self._sinks: dict[int, Sink] = {}
        self._after: list[Callable[[], None]] = []
        self._untaken: deque[Callable[[], None]] = deque()
        """What the reader thread has for the event loop; it begins at the first of them."""
        self._taking = threading.Condition()
        """Around the one above; told of when it has room again."""
        self._sending = threading.Lock()
        """Around the two below; never held while anything waits."""
        self._outgoing: deque[memoryview] = deque()
        self._draining = False
        """A thread sends what is outgoing."""
        self._alive = True
        self._heard = 0
        """Times that something came. The reader thread counts, so an event loop that was busy is no silent engine."""
        self._welcome: wire.Welcome | None = None
        self._why_dead: errors.AgentspeedError | None = None
        self._thread = threading.Thread(target=self._read, name="agentspeed-link", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            peer.close()
            raise errors.ConnectFailed(
                f"No thread could be started to read from the engine: {error}.", remedy="Raise `ulimit -u`."
            ) from error
        _links.add(self)

    @classmethod
    async def connect(cls, peer: socket.socket, client: str, *, credential: str = "") -> SocketLink:
        """Greets the engine. Raises `ConnectFailed` when it speaks another protocol or does not answer, and
        `InvalidRequest` when it does not take the credential."""
        link = cls(peer)
        try:
            reply: wire.Reply | None = None
            with anyio.move_on_after(_GREETING_SECONDS):
                reply = await link.call(lambda number: wire.Hello(request=number, client=client, credential=credential))
            if reply is None:
                raise errors.ConnectFailed(
                    f"An engine listens but did not answer for {_GREETING_SECONDS:g} s.",
                    remedy="See whether its process is stopped or stuck; when it was ended, another is started.",
                )
            if not isinstance(reply, wire.Welcome):
                raise errors.InternalError(f"The engine answered a greeting with {type(reply).__name__}.")
        except BaseException:  # cancelled or refused: nothing else would close the socket and end its thread
            link.close()
            raise
        link._welcome = reply
        return link

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def why_dead(self) -> errors.AgentspeedError | None:
        return self._why_dead

    @property
    def welcome(self) -> wire.Welcome:
        if self._welcome is None:
            raise errors.InternalError("The link was used before the engine greeted it.")
        return self._welcome

    async def call(
        self,
        make: Callable[[int], wire.Command],
        then: Then | None = None,
        *,
        patience: float | None = None,
        keep_link: bool = False,
    ) -> wire.Reply:
        """See `base.Connection.call`."""
        if not self._alive:
            raise self._death()
        number = next(self._requests)
        frame = _frame(make, number)
        waiter = self._waiters[number] = _Waiter(then)
        try:
            self._send(frame)
            if patience is None:
                await waiter.event.wait()
            elif not await self._answered(waiter, patience):
                raise self._silent(patience, keep_link)
        finally:
            self._waiters.pop(number, None)
        if waiter.failure is not None:
            raise errors.InternalError(f"A reply could not be taken in: {waiter.failure!r}.") from waiter.failure
        if waiter.reply is None:
            raise self._death()
        if isinstance(waiter.reply, wire.Failed):
            raise public_error(waiter.reply.code, waiter.reply.message, waiter.reply.remedy)
        return waiter.reply

    def post(self, make: Callable[[int], wire.Command]) -> None:
        """See `base.Connection.post`."""
        if self._alive:
            self._send(_frame(make, next(self._requests)))

    def listen(self, branch: int, sink: Sink) -> None:
        self._sinks[branch] = sink

    def unlisten(self, branch: int) -> None:
        self._sinks.pop(branch, None)

    def after(self, call: Callable[[], None]) -> None:
        self._after.append(call)

    def close(self) -> None:
        self._alive = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def let_go(self) -> None:
        """In a process that was forked off: closes this copy of the socket without ending the parent's, which shutting
        it down would do."""
        self._alive = False
        self._socket.close()

    def _death(self) -> errors.AgentspeedError:
        if self._why_dead is not None:
            return self._why_dead
        return errors.EngineDied("The engine ended.", remedy="Use the session again: it is opened anew from its ids.")

    # ---- patience -------------------------------------------------------------------------------------------------
    async def _answered(self, waiter: _Waiter, patience: float) -> bool:
        """Waits; False when the engine was silent for `patience` seconds. A step may take long, and with it
        what waits for its end: an engine that says anything meanwhile, if only that it lives, is waited for."""
        last = anyio.current_time() + _MOST_PATIENCES * patience
        heard = self._heard
        with anyio.move_on_after(patience / 2):
            await waiter.event.wait()
        while not waiter.event.is_set():
            if anyio.current_time() > last:
                return False
            if self._heard == heard:
                self.post(lambda number: wire.GetStats(request=number))
                with anyio.move_on_after(patience / 2):
                    await waiter.event.wait()
                if self._heard == heard:
                    return waiter.event.is_set()
            heard = self._heard
            with anyio.move_on_after(patience / 2):
                await waiter.event.wait()
        return True

    def _silent(self, patience: float, keep_link: bool) -> errors.EngineDied:
        remedy = "Use the session again: it is opened anew from its ids."
        if keep_link:
            return errors.EngineDied(f"The engine did not answer for {patience:g} s.", remedy=remedy)
        death = errors.EngineDied(f"The engine did not answer for {patience:g} s; its link was closed.", remedy=remedy)
        self._why_dead = death
        self.close()
        return death

    # ---- sending --------------------------------------------------------------------------------------------------
    def _send(self, frame: bytes) -> None:
        """At once as far as the socket takes it, the rest from a thread, in order: the event loop never waits."""
        with self._sending:
            rest = memoryview(frame)
            if not self._draining:
                rest = self._send_now(rest)
            if not rest:
                return
            self._outgoing.append(rest)
            if self._draining:
                return
            self._draining = True
        try:
            threading.Thread(target=self._drain, name="agentspeed-send", daemon=True).start()
        except RuntimeError as error:  # no thread to be had: the link cannot go on, since half a frame was sent
            _LOG.warning("A link is closed, for no thread could be started to send from: %s", error)
            self.close()

    def _send_now(self, rest: memoryview) -> memoryview:
        """What the socket does not take at once."""
        try:
            return rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return rest
        except OSError:
            self._alive = False  # the reader thread sees the end too and tells everyone who waits
            return rest[:0]

    def _drain(self) -> None:
        """Ends when everything was sent, or the link is closed."""
        while True:
            with self._sending:
                if not self._outgoing:
                    self._draining = False
                    return
                rest = self._outgoing.popleft()
            try:
                self._socket.sendall(rest)
            except OSError:
                self._alive = False

    # ---- the reader thread ----------------------------------------------------------------------------------------
    def _read(self) -> None:
        try:
            self._read_on()
        finally:  # however it ended, its caller no longer waits
            self._hand_over(self._ended)

    def _read_on(self) -> None:
        reader = outbox_reader()
        while data := self._received():
            self._heard += 1
            reader.feed(data)
            messages: list[wire.Outgoing] = []
            bad: BadFrame | None = None
            try:
                for frame in reader:
                    messages += frame
            except BadFrame as error:
                bad = error
            if messages and not self._hand_over(self._deliver, messages):
                return
            if bad is not None:
                self._hand_over(self._misunderstood, bad)
                return

    def _received(self) -> bytes:
        """What came next; nothing at the end of the link."""
        try:
            return self._socket.recv(_READ_BYTES)
        except OSError:
            return b""

    def _hand_over(self, call: Callable[..., None], *arguments: object) -> bool:
        """Has `call` run on the event loop behind those before it; False when the loop is gone. Waiting for
        each to have run costs as much as what a few tokens do there, so the thread waits only where many have not."""
        with self._taking:
            while len(self._untaken) >= _MOST_UNTAKEN:
                if not self._taking.wait(_LOOKS_SECONDS) and not self._wake():
                    return False
            self._untaken.append(partial(call, *arguments))
            return len(self._untaken) > 1 or self._wake()

    def _wake(self) -> bool:
        try:
            self._token.backend_class.run_sync_soon(self._take, (), self._token.native_token)
        except (RuntimeError, anyio.RunFinishedError):
            self._alive = False
            self._socket.close()
            return False
        return True

    # ---- on the event loop ----------------------------------------------------------------------------------------
    def _take(self) -> None:
        """All that the reader thread has. What a call raises ends the link, whose callers are told so."""
        with self._taking:
            calls, self._untaken = self._untaken, deque()
            self._taking.notify()
        for call in calls:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - our bug: there is no caller here to raise it to
                _LOG.error("A link is closed: what the engine said could not be taken in.", exc_info=error)
                self.close()

    def _deliver(self, messages: list[wire.Outgoing]) -> None:
        for message in messages:
            if isinstance(message, wire.Event):
                sink = self._sinks.get(message.branch)
                if sink is not None:
                    self._tell(message.branch, sink, message)
            elif message.request == 0 and isinstance(message, wire.Failed):
                self._why_dead = last_words(message.code, message.message, message.remedy)
            elif (waiter := self._waiters.get(message.request)) is not None:
                self._answer(waiter, message)
            else:
                self._unheard(message)
        self._run_after()

    def _run_after(self) -> None:
        while self._after:
            calls, self._after = self._after, []
            for call in calls:
                call()

    def _unheard(self, reply: wire.Reply) -> None:
        """Closes the branches of a reply whose caller has given up: no session will ever use them."""
        match reply:
            case wire.Opened():
                orphans: tuple[int, ...] = (reply.branch,)
            case wire.Forked():
                orphans = reply.branches
            case _:
                return
        for branch in orphans:
            self.post(partial(_closing, branch))

    def _answer(self, waiter: _Waiter, reply: wire.Reply) -> None:
        if waiter.then is not None and not isinstance(reply, wire.Failed):
            try:
                waiter.then(reply)
            except Exception as error:  # noqa: BLE001 - the call that waits raises it
                waiter.failure = error
        waiter.reply = reply
        waiter.event.set()

    def _tell(self, branch: int, sink: Sink, event: wire.Event) -> None:
        """A bug in one sink ends that branch, and no other."""
        try:
            sink(event)
        except Exception as error:  # noqa: BLE001 - told to the branch, which raises it
            _LOG.error("A listener of branch %d raised; the branch is given up.", branch, exc_info=error)
            self.unlisten(branch)
            self.post(partial(_closing, branch))
            before = self._why_dead
            self._why_dead = errors.InternalError(f"What the engine said could not be taken in: {error!r}.")
            self._tell_end(sink)
            self._why_dead = before

    def _tell_end(self, sink: Sink) -> None:
        try:
            sink(None)
        except Exception as error:  # noqa: BLE001 - there is no caller to raise it to
            _LOG.error("A listener raised at the end of its branch.", exc_info=error)

    def _misunderstood(self, error: BadFrame) -> None:
        self._why_dead = errors.EngineDied(
            f"The engine sent what is no frame of the protocol ({error}); its link was closed.",
            remedy="Use the session again. If it happens again, use an engine of the client's version.",
        )

    def _ended(self) -> None:
        self._alive = False
        self._socket.close()
        for waiter in self._waiters.values():
            waiter.event.set()
        sinks = list(self._sinks.values())
        self._sinks.clear()
        for sink in sinks:
            self._tell_end(sink)
        self._run_after()


async def open_link(source: SocketSource, *, after_death: bool, client: str, credential: str = "") -> SocketLink:
    """A greeted link over a socket of `source`. Raises what opening the socket and greeting the engine raise. A
    caller that is cancelled does not wait for a slow engine; the socket that comes too late is closed."""
    lock, made, given_up = threading.Lock(), list[socket.socket](), False

    def opened() -> socket.socket:
        peer = source.open(after_death=after_death)
        with lock:
            made.append(peer)
            if given_up:
                peer.close()
        return peer

    source.want(+1)
    try:
        peer = await anyio.to_thread.run_sync(opened, abandon_on_cancel=True)
    except BaseException:
        with lock:
            given_up = True
            for peer in made:
                peer.close()
        raise
    finally:
        source.want(-1)
    return await SocketLink.connect(peer, client, credential=credential)


def _closing(branch: int, number: int) -> wire.Command:
    return wire.Close(request=number, branch=branch)


def _frame(make: Callable[[int], wire.Command], number: int) -> bytes:
    try:
        return encode_command(make(number))
    except Unsendable as error:
        raise errors.InvalidRequest(
            f"The engine cannot be asked this: {error}", remedy="Give less at once, and text that is valid Unicode."
        ) from error


_links: WeakSet[SocketLink] = WeakSet()


def _forked() -> None:
    """A process that is forked off begins with no link: what it sent would come between its parent's frames."""
    for link in list(_links):
        link.let_go()
    _links.clear()


os.register_at_fork(after_in_child=_forked)
