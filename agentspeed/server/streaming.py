"""Responses that end when their client goes away: server-sent events, and whole bodies that took a turn to make.

A handler is a coroutine function that is given an `Emitter`. Until it emits, nothing was sent, so whatever it raises
still becomes an error status; afterwards it becomes an event of the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias, final

import anyio
import msgspec
from starlette.types import Receive, Scope, Send

from agentspeed import errors, events
from agentspeed.server.connections import ABORT, DIRECT, Direct
from agentspeed.server.problems import Problem, RequestProblem, problem_of

_LOG = logging.getLogger("agentspeed.server")
_ENCODER: Final = msgspec.json.Encoder()
PING_SECONDS: Final = 15.0
"""A stream that says nothing for so long sends a comment, so that proxies keep it open."""
ErrorShape: TypeAlias = Callable[[Problem], dict[str, Any]]
Told: TypeAlias = Callable[[int, list[events.AnyEvent]], Awaitable[None]]
"""What is called with the events that came together, and which of the choices they belong to."""
AtOnce: TypeAlias = Callable[[int, list[events.AnyEvent]], bool]
"""The same for who can take them without waiting; False when it took nothing."""


def encoded(value: object) -> bytes:
    """JSON bytes."""
    return _ENCODER.encode(value)


def framed(value: object, event: str | None = None) -> bytes:
    """One server-sent event whose data are the JSON of `value`; `event` is its name where the protocol has names."""
    name = b"" if event is None else f"event: {event}\n".encode()
    return name + b"data: " + encoded(value) + b"\n\n"


@final
class Emitter:
    """Sends events of one stream."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], direct: Direct | None = None) -> None:
        self._send = send
        self._direct = direct
        self._headers = headers
        self._starting = anyio.Lock()
        self.begun = False
        self.sent = 0
        """Pieces that the connection took."""
        self.waiting = 0
        """Pieces that it has not taken yet."""
        self.ended = False
        self.stuck = False
        """It took nothing for so long that it was given up."""
        self.comments = any(value.startswith(b"text/event-stream") for _, value in headers)
        """Whether a silent stream may say that it lives."""

    async def __call__(self, value: object, event: str | None = None) -> None:
        """One event whose data are the JSON of `value`."""
        await self.raw(framed(value, event))

    async def raw(self, data: bytes) -> None:
        """Bytes as they are, one chunk, whoever else emits; the headers go before the first of them."""
        if not self.begun:
            async with self._starting:
                if not self.begun:
                    await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
                    self.begun = True
        await self._body(data, more=True)

    @property
    def can_now(self) -> bool:
        """Whether `now` may be called: the stream has begun, and its connection takes more."""
        return self.begun and not self.waiting and self._direct is not None and self._direct.ready

    def now(self, data: bytes) -> None:
        """As `raw`, without waiting; only where `can_now` says so."""
        assert self._direct is not None
        self._direct.write(data)

    def paths(self, written: Callable[[int, list[events.AnyEvent]], bytes]) -> tuple[Told, AtOnce]:
        """How a turn's events become this stream's: what `written` makes of those that came together goes out
        together, without waking anybody where the connection takes it."""

        async def told(index: int, batch: list[events.AnyEvent]) -> None:
            if data := written(index, batch):
                await self.raw(data)

        def at_once(index: int, batch: list[events.AnyEvent]) -> bool:
            if not self.can_now:
                return False
            if data := written(index, batch):
                self.now(data)
            return True

        return told, at_once

    async def end(self) -> None:
        """No more events."""
        self.ended = True
        await self._body(b"", more=False)

    async def _body(self, data: bytes, *, more: bool) -> None:
        self.waiting += 1
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self.sent += 1
        finally:
            self.waiting -= 1


@final
class EventStream:
    """An ASGI response: `produce` emits events until it returns."""

    def __init__(
        self,
        produce: Callable[[Emitter], Awaitable[None]],
        shape: ErrorShape,
        *,
        headers: dict[str, str],
        error_event: str | None = None,
        media: str = "text/event-stream; charset=utf-8",
    ) -> None:
        self._produce = produce
        self._shape = shape
        self._headers = headers
        self._error_event = error_event
        self._media = media

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream; a client that goes away cancels what produces it."""
        given = {"content-type": self._media, "cache-control": "no-cache", **self._headers}
        headers = [(name.encode(), value.encode()) for name, value in given.items()]
        emitter = Emitter(send, headers, scope.get(DIRECT))

        async def produce() -> None:
            problem = await _problem_in(self._produce(emitter))
            if problem is None:
                await emitter.end()
            elif emitter.begun:
                await emitter(self._shape(problem), self._error_event)
                await emitter.end()
            else:
                await _send_body(send, problem.status, self._shape(problem), _with_retry(self._headers, problem))

        await _while_connected(receive, produce, emitter)
        if emitter.stuck and (abort := scope.get(ABORT)) is not None:
            abort()  # closing it would wait for what nobody takes


@final
class WholeBody:
    """An ASGI response whose JSON body takes a turn to make."""

    def __init__(self, make: Callable[[], Awaitable[object]], shape: ErrorShape, *, headers: dict[str, str]) -> None:
        self._make = make
        self._shape = shape
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the body; a client that goes away cancels what makes it."""

        async def respond() -> None:
            made: list[object] = []

            async def make() -> None:
                made.append(await self._make())

            problem = await _problem_in(make())
            if problem is None:
                await _send_body(send, 200, made[0], self._headers)
            else:
                await _send_body(send, problem.status, self._shape(problem), _with_retry(self._headers, problem))

        await _while_connected(receive, respond, None)


async def _while_connected(receive: Receive, work: Callable[[], Awaitable[None]], emitter: Emitter | None) -> None:
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def ping(to: Emitter) -> None:
            """A connection that takes nothing between two looks has nobody at its end any more: it is left."""
            before = -1
            while True:
                await anyio.sleep(PING_SECONDS)
                if to.waiting:
                    if to.sent == before:
                        _LOG.info("a stream is left that took nothing for %g s", PING_SECONDS)
                        to.stuck = True
                        group.cancel_scope.cancel()
                    before = to.sent
                elif to.begun and to.comments and not to.ended:
                    await to.raw(b": ping\n\n")

        group.start_soon(watch)
        if emitter is not None:
            group.start_soon(ping, emitter)
        await work()
        group.cancel_scope.cancel()


async def _problem_in(work: Awaitable[None]) -> Problem | None:
    """What went wrong, for the client; what is a bug of ours is logged with its traceback and told without it."""
    try:
        await work
    except RequestProblem as refusal:
        return refusal.problem
    except errors.InternalError as error:
        _LOG.exception("a request met a bug")
        return problem_of(error)
    except errors.AgentspeedError as error:
        return problem_of(error)
    except ExceptionGroup as group:  # choices that run at once are refused together
        refusals, others = group.split((RequestProblem, errors.AgentspeedError))
        if others is not None or refusals is None:
            raise
        first = refusals.exceptions[0]
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        return await _problem_in(_raised(first))
    return None


async def _raised(error: Exception) -> None:
    raise error


def _with_retry(headers: dict[str, str], problem: Problem) -> dict[str, str]:
    return headers if problem.retry_after is None else {**headers, "retry-after": str(problem.retry_after)}


async def _send_body(send: Send, status: int, body: object, headers: dict[str, str]) -> None:
    data = encoded(body)
    given = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
    )
    await send({"type": "http.response.body", "body": data})
