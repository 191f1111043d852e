"""`/v1/links`: the SDK's own protocol over HTTP, for `Session("http://...")`.

A link is one of the engine's links, made by the server for a client, as two byte streams that survive a connection.
What the engine sends is read from any offset that was not acknowledged yet; what the client sends says at which offset
it begins, so a request that is sent again changes nothing. `Open` is changed: a client has the tenant of its key
and no other; so is `Look`, which would show the sessions of all (`GET /ui` shows a tenant its own). What passes tells
whether a link is used, for one that rests holds up no server that is about to end.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, Final, final

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import SocketStream, TaskGroup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from agentspeed import errors
from agentspeed._base.wording import counted
from agentspeed.server.link_use import LinkUse
from agentspeed.server.problems import Problem, refused
from agentspeed.server.streaming import Emitter, EventStream, encoded
from agentspeed.server.turns import Service
from agentspeed.transport.base import wire
from agentspeed.transport.frames import BadFrame, command_reader, encode_command, outbox_reader

_LOG = logging.getLogger("agentspeed.server")
MOST_UNREAD: Final = 8 * 1024 * 1024
"""Most bytes kept for a client that does not read; beyond them the engine is not read, and bounds what it keeps."""
_READ_BYTES: Final = 1 << 16


@final
class ServedLink:
    """One link of one tenant."""

    def __init__(self, stream: SocketStream, tenant: str) -> None:
        self.number = secrets.token_hex(16)
        self.tenant = tenant
        self.left_at: float | None = time.monotonic()
        """Since when no client reads it; None while one does."""
        self.ended = False
        self._stream = stream
        self._commands = command_reader()
        self._said = outbox_reader()
        self._use = LinkUse()
        self._received = 0
        self._sending = anyio.Lock()
        self._unread = bytearray()
        self._base = 0
        self._more = anyio.Event()
        self._room = anyio.Event()

    async def pump(self) -> None:
        """What the engine sends, until it ends."""
        try:
            while True:
                while len(self._unread) > MOST_UNREAD:
                    self._room = anyio.Event()
                    await self._room.wait()
                data = await self._stream.receive(_READ_BYTES)
                self._said.feed(data)
                for said in self._said:
                    self._use.heard(said, time.monotonic())
                self._unread += data
                self._wake()
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        except BadFrame as error:
            _LOG.error("a link ends: what the engine sent is no frame of this protocol: %s", error)
        finally:
            self.ended = True
            self._wake()

    @property
    def rests(self) -> bool:
        """Whether its client waits for nothing that runs."""
        return self._use.rests(time.monotonic())

    def _wake(self) -> None:
        self._more.set()
        self._more = anyio.Event()

    async def send(self, at: int, data: bytes) -> int:
        """Takes the client's bytes from offset `at`; the offset that comes next. Raises `RequestProblem` for a gap, and
        for what is no frame."""
        async with self._sending:
            if at > self._received:
                raise refused(f"Bytes from {self._received} on are missing.", status=409, code="link_gap")
            fresh = data[self._received - at :]
            self._received += len(fresh)
            self._commands.feed(fresh)
            try:
                frames = b"".join(encode_command(self._of_tenant(command)) for command in self._commands)
            except BadFrame as error:
                raise refused(f"What was sent is no frame of this protocol: {error}.", code="bad_frame") from error
            if frames:
                await self._stream.send(frames)
            return self._received

    def _of_tenant(self, command: wire.Command) -> wire.Command:
        self._use.told(command)
        match command:
            case wire.Open():
                return msgspec.structs.replace(command, tenant=self.tenant)
            case wire.Look():
                return msgspec.structs.replace(command, branches=0)
            case _:
                return command

    async def read(self, after: int, emit: Emitter) -> None:
        """Sends everything from offset `after` until the link ends. Raises `RequestProblem` for bytes that were
        acknowledged already, or never sent."""
        if not self._base <= after <= self._base + len(self._unread):
            raise refused(f"Bytes from {after} are gone.", status=410, code="link_lost")
        self.left_at = None
        try:
            await emit.raw(b"")
            while True:
                if data := bytes(self._unread[after - self._base :]):
                    await emit.raw(data)
                    after += len(data)
                elif self.ended:
                    return
                else:
                    await self._more.wait()
        finally:
            self.left_at = time.monotonic()

    def acknowledge(self, before: int) -> None:
        """The client has everything before this offset: it will not ask for it again."""
        before = min(before, self._base + len(self._unread))
        if before > self._base:
            del self._unread[: before - self._base]
            self._base = before
            self._room.set()

    async def close(self) -> None:
        """Ends the link; the engine closes its branches."""
        self.ended = True
        self._wake()
        await self._stream.aclose()


@final
class Links:
    """All of them. `group` reads their engines' ends."""

    def __init__(self, service: Service, group: TaskGroup, *, most: int, grace: float) -> None:
        self._service = service
        self._group = group
        self._most = most
        self._grace = grace
        self._links: dict[str, ServedLink] = {}

    async def open(self, tenant: str) -> ServedLink:
        """Raises `EngineOverloaded` when there are too many, and what reaching the engine raises."""
        if len(self._links) >= self._most:
            raise errors.EngineOverloaded(
                f"{counted(len(self._links), 'link')} open, as many as the server keeps.",
                remedy="Close some, or try again later.",
            )
        peer = await anyio.to_thread.run_sync(self._service.engine.connected_socket)
        link = ServedLink(await _stream(peer), tenant)
        self._links[link.number] = link
        self._group.start_soon(link.pump)
        return link

    def get(self, tenant: str, number: str) -> ServedLink:
        """Raises `RequestProblem` (404) for what is not there or is another tenant's."""
        link = self._links.get(number)
        if link is None or link.tenant != tenant:
            raise refused("There is no such link.", status=404, code="link_not_found")
        return link

    async def close(self, link: ServedLink) -> None:
        """Ends it."""
        self._links.pop(link.number, None)
        await link.close()

    async def sweep(self) -> None:
        """Ends links that nobody has read for the grace time."""
        late = time.monotonic() - self._grace
        for link in list(self._links.values()):
            if link.left_at is not None and link.left_at < late:
                await self.close(link)

    async def close_resting(self) -> None:
        """Those that a server which is about to end would wait for in vain."""
        for link in list(self._links.values()):
            if link.rests:
                await self.close(link)

    async def close_all(self) -> None:
        """At the end of the server."""
        for link in list(self._links.values()):
            await self.close(link)


async def _stream(peer: socket.socket) -> SocketStream:
    peer.setblocking(False)
    found: SocketStream = await SocketStream.from_socket(peer)
    return found


def link_routes(links: Callable[[], Links], route: Callable[..., Route]) -> list[Route]:
    """The paths, on the server's links, which exist once the server has started."""

    async def create(request: Request, service: Service, tenant: str) -> ASGIApp:
        service.takes_more()
        link = await links().open(tenant)
        return _json({"link": link.number, "grace_seconds": service.options.grace_seconds})

    async def send(request: Request, service: Service, tenant: str) -> ASGIApp:
        link = links().get(tenant, request.path_params["number"])
        link.acknowledge(_offset(request, "received"))
        return _json({"at": await link.send(_offset(request, "at"), await request.body())})

    async def read(request: Request, service: Service, tenant: str) -> ASGIApp:
        link, after = links().get(tenant, request.path_params["number"]), _offset(request, "after")
        media = "application/octet-stream"
        return EventStream(lambda emit: link.read(after, emit), Problem.openai, headers={}, media=media)

    async def close(request: Request, service: Service, tenant: str) -> ASGIApp:
        await links().close(links().get(tenant, request.path_params["number"]))
        return _json({"closed": True})

    one = "/v1/links/{number}"
    return [
        route("/v1/links", create, "POST"),
        route(f"{one}/frames", send, "POST"),
        route(f"{one}/frames", read, "GET"),
        route(one, close, "DELETE"),
    ]


def _offset(request: Request, name: str) -> int:
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise refused(f"{name} is {text!r}; it must be an offset in bytes.", param=name)
    return int(text)


def _json(value: Any) -> Response:
    return Response(encoded(value), media_type="application/json")
