"""Several servers behind one address, on Ray Serve: every conversation goes to the replica that has it.

A front reads each request's key (`server.affinity`) and asks a replica, chosen by the key; a replica is one engine and
the application that `agentspeed serve` answers with. A replica that goes ends its turns and saves its sessions to the
shared folder, and the one that a session's key leads to from then on opens it again.
"""

# pyright: reportMissingImports=false
# Ray is in no environment that types are checked in: a large package for one file.
from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final, final

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agentspeed import errors
from agentspeed.engine import Engine
from agentspeed.server.affinity import AFFINITY, Affinity, Destination, affinity_of, ranked
from agentspeed.server.app import application
from agentspeed.server.options import ServerOptions, tenant_of
from agentspeed.server.problems import Problem
from agentspeed.server.pulled import Headers, pulled
from agentspeed.server.streaming import encoded
from agentspeed.server.turns import Service

MOST_KEYS: Final = 65_536
"""Keys whose replica the front remembers; others go where their hash leads."""
_MOVING_SECONDS: Final = 2


@final
class ByConversation(RequestRouter):  # type: ignore[misc]  # Ray has no types here
    """Serve's router of requests to replicas, by the `Destination` that is the first argument of each call."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank after the other is asked for room; none has any: again, after a pause."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        where = pending_request.args[0]  # no isinstance: Serve may have its own copy of a deployment's module
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[known[name] for name in rank] for rank in ranked(where, list(known))]


@final
class Replica:
    """One engine with its sessions, in a process of its own."""

    async def __init__(self, model: str | None, options: ServerOptions, engine_options: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._name = serve.get_replica_context().replica_id.unique_id
        self._ending = asyncio.Event()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run(model, options, engine_options, ready))
        _ = await asyncio.wait([ready, self._running], return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()

    async def _run(
        self, model: str | None, options: ServerOptions, engine_options: dict[str, Any], ready: asyncio.Future[None]
    ) -> None:
        async with Engine(model, **engine_options) as engine:
            service = Service(engine, options)
            self._gate = application(service)
            async with self._gate.running():
                ready.set_result(None)
                _ = await self._ending.wait()
                service.drain()

    async def answer(
        self, where: Destination, head: dict[str, Any], body: bytes
    ) -> AsyncIterator[tuple[str, int, Headers] | bytes]:
        """This replica's name with status and headers, then the body in the pieces that there are at once.

        The application waits for who takes them. Ray takes them as they come and keeps what a client has not read,
        which is no more than the answer of its turn."""
        async with aclosing(pulled(self._gate, head, body)) as parts:
            async for part in parts:
                yield (self._name, *part) if isinstance(part, tuple) else part

    async def __del__(self) -> None:
        """Serve calls and awaits it once no request is in work: what runs without one ends, and sessions are saved."""
        self._ending.set()
        _ = await asyncio.wait([self._running])


@final
class Front:
    """What Serve's proxy hands requests to. It remembers which replica answered which key."""

    def __init__(self, replicas: Any, options: ServerOptions) -> None:
        self._replicas = replicas.options(stream=True)
        self._options = options
        self._answered: OrderedDict[str, str] = OrderedDict()
        self._moved: dict[str, float] = {}
        """Of keys among them whose replica has gone: since when they are looked for at another."""

    async def __call__(self, request: Request) -> Response:
        """The replica's answer, piece by piece. A client that goes away ends its turn."""
        path = request.scope["path"]  # decoded, as the replica reads it: a name may hold a question mark
        if path.startswith("/v1/links"):
            return _refused(404, "no_links", "Session('http://...') needs one server; replicas answer all other paths.")
        body = await _body(request, self._options.max_body)
        headers = request.headers
        tenant = tenant_of(self._options.keys, headers.get("authorization"), headers.get("x-api-key"))
        affinity = None
        if tenant is not None:
            affinity = affinity_of(request.method, path, body, tenant, headers.get("idempotency-key"))
        known = (tenant or "", affinity.key) if affinity is not None else None
        where = Destination(affinity, None if known is None else self._answered.get("\0".join(known)))
        stream = self._replicas.answer.remote(where, _head(request, affinity), body)
        try:
            name, status, raw = await anext(stream)
        except (RayError, RayServeException) as error:
            return _refused(503, "replica_lost", f"The replica that had this request is gone: {type(error).__name__}.")
        except BaseException:
            stream.cancel()
            raise
        if known is not None and affinity is not None:
            if affinity.pinned and status == 404 and self._may_come(where, name, "\0".join(known)):
                stream.cancel()
                return _refused(
                    503, "session_moving", "The replica that had this is ending; another will have it soon."
                )
            self._remember("\0".join(known), name)
        answer = StreamingResponse(_rest(stream), status)
        answer.raw_headers = raw
        return answer

    def _may_come(self, where: Destination, name: str, key: str) -> bool:
        """Whether another replica had this key: it saves its sessions once its last request has ended."""
        if where.last in (None, name):
            return False
        since = self._moved.setdefault(key, time.monotonic())
        if time.monotonic() - since < _ending_seconds(self._options):
            return True
        del self._moved[key]
        return False

    def _remember(self, key: str, name: str) -> None:
        self._answered[key] = name
        self._answered.move_to_end(key)
        self._moved.pop(key, None)
        while len(self._answered) > MOST_KEYS:
            oldest, _ = self._answered.popitem(last=False)
            self._moved.pop(oldest, None)


def replicated(
    model: str | None,
    options: ServerOptions,
    *,
    replicas: int = 2,
    actor: dict[str, Any] | None = None,
    **engine_options: Any,
) -> Any:
    """An application for Ray Serve to run. `options.snapshots` is a folder that all replicas reach; `actor`: Ray's
    options of a replica's process, as its GPUs. Where it listens is Serve's. Raises `InvalidRequest` without a folder.
    """
    if options.snapshots is None:
        raise errors.InvalidRequest(
            "Replicas have no folder for snapshots: their sessions would end with each of them.",
            remedy="Give ServerOptions(snapshots=), a folder that every machine reaches.",
        )
    most = options.max_requests + options.max_sessions
    held = serve.deployment(Replica, name="agentspeed-replica").options(
        num_replicas=replicas,
        max_ongoing_requests=most,
        graceful_shutdown_timeout_s=_ending_seconds(options),
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options=actor or {},
        request_router_config=RequestRouterConfig(request_router_class=f"{__name__}:{ByConversation.__name__}"),
    )
    front = serve.deployment(Front, name="agentspeed-front").options(max_ongoing_requests=most * replicas)
    return front.bind(held.bind(model, options, engine_options), options)


def _ending_seconds(options: ServerOptions) -> float:
    """The longest that a replica takes to end: its requests, the turns that nobody reads, and its snapshots."""
    return options.turn_seconds + options.drain_seconds + 30.0


def _head(request: Request, affinity: Affinity | None) -> dict[str, Any]:
    """What of the scope says who asks for what; the key is the front's alone to give."""
    scope = request.scope
    headers = [(name, value) for name, value in scope["headers"] if name != AFFINITY.encode()]
    if affinity is not None:
        headers.append((AFFINITY.encode(), affinity.key.encode("utf-8", "surrogatepass")))
    kept = ("http_version", "method", "scheme", "path", "query_string")
    path = scope["path"].encode("utf-8", "surrogatepass")
    return {
        **{name: scope[name] for name in kept},
        "raw_path": path,
        "root_path": "",
        "headers": headers,
        "client": scope.get("client"),
        "server": scope.get("server"),
    }


async def _body(request: Request, most: int) -> bytes:
    """Of a longer one no more than shows that it is too long: the replica refuses it."""
    found = bytearray()
    async for piece in request.stream():
        found += piece
        if len(found) > most:
            break
    return bytes(found[: most + 1])


async def _rest(stream: Any) -> AsyncIterator[bytes]:
    try:
        async for piece in stream:
            yield piece
    finally:
        stream.cancel()


def _refused(status: int, code: str, message: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"retry-after": str(_MOVING_SECONDS)} if status == 503 else {}
    problem = Problem(status=status, kind=kind, message=message, code=code)
    return Response(encoded(problem.openai()), status, headers, "application/json")
