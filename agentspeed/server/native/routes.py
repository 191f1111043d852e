"""The paths of `/v1/sessions`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from agentspeed import errors
from agentspeed.chat.output import Schema
from agentspeed.message_formats.tools import declared
from agentspeed.sampling import Sampling
from agentspeed.server.affinity import AFFINITY, key_in
from agentspeed.server.native import bodies
from agentspeed.server.native.idempotency import Idempotency
from agentspeed.server.native.served import Served, Sessions
from agentspeed.server.problems import Problem, refused
from agentspeed.server.saved_sessions import session_of
from agentspeed.server.streaming import Emitter, EventStream, WholeBody, encoded
from agentspeed.server.turns import Service, parsed
from agentspeed.session import TurnOptions

_PATH = "/v1/sessions"


def session_routes(sessions: Callable[[], Sessions], route: Callable[..., Route]) -> list[Route]:
    """Each on the server's sessions, which exist once the server has started."""
    once = Idempotency()

    async def of(request: Request, tenant: str) -> Served:
        return await sessions().find(tenant, request.path_params["number"])

    def doing(do: Callable[[Request, Service, str, bytes], Awaitable[Any]], *, ends: bool = False) -> Any:
        """`ends`: what is asked for while the server drains too."""

        async def endpoint(request: Request, service: Service, tenant: str) -> ASGIApp:
            body = await request.body()
            key, said = _key_of(request), _said(request, body)
            if not ends:
                service.takes_more()
            return WholeBody(
                lambda: once.once(tenant, key, said, lambda: do(request, service, tenant, body)),
                Problem.openai,
                headers={},
            )

        return endpoint

    async def open_one(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        given: bodies.OpenBody = parsed(body or b"{}", bodies.OpenBody)
        _ = _at_most(given.max_tokens, service.options.max_tokens)
        session = service.engine.session(
            system=given.system,
            tools=declared(given.tools),
            private=given.private,
            tenant=tenant or None,
            seed=given.seed,
            name=given.name or key_in(request.headers.get(AFFINITY)) or None,
            max_tokens=given.max_tokens,
            reasoning=given.reasoning,
            record_logprobs=given.record_logprobs,
            sampling=Sampling(**{name: getattr(given, name) for name in Sampling.__dataclass_fields__}),
        )
        return bodies.session_json((await sessions().add(session, tenant)).session)

    async def append(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        served, given = await of(request, tenant), parsed(body, bodies.AppendBody)
        _ = await served.session.add(*given.messages, prefill=given.prefill)
        return bodies.session_json(served.session)

    async def fork(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        served, given = await of(request, tenant), parsed(body or b"{}", bodies.ForkBody)
        children = await sessions().fork(served, given.n, given.at)
        return {"object": "list", "data": [bodies.session_json(child.session) for child in children]}

    async def adopt(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        served, given = await of(request, tenant), parsed(body, bodies.AdoptBody)
        await sessions().adopt(served, await sessions().find(tenant, given.child))
        return bodies.session_json(served.session)

    async def mark(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        served, given = await of(request, tenant), parsed(body, bodies.MarkBody)
        made = await served.session.mark(given.name)
        return {"object": "mark", "name": given.name, "tokens": made.tokens}

    async def rewind(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        served, given = await of(request, tenant), parsed(body, bodies.RewindBody)
        await served.session.rewind(given.to)
        return bodies.session_json(served.session)

    async def expect(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        served, given = await of(request, tenant), parsed(body, bodies.ExpectBody)
        return bodies.lease_json(await served.session.expect(given.seconds, keep=given.keep, tool=given.tool))

    async def cancel(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        served = await of(request, tenant)
        if served.turn is None:
            raise refused("No turn of this session runs.", status=409, code="no_turn")
        served.turn.cancel()
        return bodies.session_json(served.session)

    async def restore(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        session = session_of(body, service.engine, tenant)
        return bodies.session_json((await sessions().add(session, tenant)).session)

    async def close(request: Request, service: Service, tenant: str, body: bytes) -> Any:
        number = request.path_params["number"]
        if not await sessions().forget_saved(tenant, number):  # which is not opened for that: its file may be broken
            await sessions().close(sessions().get(tenant, number))
        return {"id": number, "object": "session", "closed": True}

    async def generate(request: Request, service: Service, tenant: str) -> ASGIApp:
        body = await request.body()
        given: bodies.GenerateBody = parsed(body or b"{}", bodies.GenerateBody)
        key, said = _key_of(request), _said(request, body)
        served = await of(request, tenant)

        async def begin() -> int:
            service.takes_more()
            turn = served.session.stream(
                given.messages or None, output=_output(given), **_options(given, served, service)
            )
            if served.turn is not None:
                raise errors.SessionBusy(
                    f"A turn of session {served.session.id} runs.",
                    remedy="Read its events, or fork to go two ways at once.",
                )
            after = served.last
            sessions().start(served, turn)
            return after

        after = await once.once(tenant, key, said, begin)
        if key is not None and served.came_to_nothing(after):
            once.forget(tenant, key, after)
            after = await once.once(tenant, key, said, begin)
        if given.stream:
            return _stream(served, after, one_turn=True)
        return WholeBody(lambda: _last(served, after), Problem.openai, headers={})

    async def events(request: Request, service: Service, tenant: str) -> ASGIApp:
        served = await of(request, tenant)
        text = request.headers.get("last-event-id") or request.query_params.get("after", "0")
        if not (text.isascii() and text.isdigit()):
            raise refused(f"after is {text!r}; it must be the number of an event.", param="after")
        return _stream(served, int(text), one_turn=False)

    async def read(request: Request, service: Service, tenant: str) -> ASGIApp:
        session = (await of(request, tenant)).session
        return _json({**bodies.session_json(session), "log": bodies.messages_json(session.messages)})

    async def listed(request: Request, service: Service, tenant: str) -> ASGIApp:
        return _json({"object": "list", "data": [bodies.session_json(one.session) for one in sessions().of(tenant)]})

    async def snapshot(request: Request, service: Service, tenant: str) -> ASGIApp:
        data = await (await of(request, tenant)).session.snapshot()
        return Response(data, media_type="application/octet-stream")

    one = f"{_PATH}/{{number}}"
    return [
        route(_PATH, doing(open_one), "POST"),
        route(_PATH, listed, "GET"),
        route(f"{_PATH}/restore", doing(restore), "POST"),
        route(one, read, "GET"),
        route(one, doing(close, ends=True), "DELETE"),
        route(f"{one}/messages", doing(append), "POST"),
        route(f"{one}/generate", generate, "POST"),
        route(f"{one}/events", events, "GET"),
        route(f"{one}/cancel", doing(cancel, ends=True), "POST"),
        route(f"{one}/fork", doing(fork), "POST"),
        route(f"{one}/adopt", doing(adopt), "POST"),
        route(f"{one}/marks", doing(mark), "POST"),
        route(f"{one}/rewind", doing(rewind), "POST"),
        route(f"{one}/expect", doing(expect), "POST"),
        route(f"{one}/snapshot", snapshot, "GET"),
    ]


def _output(given: bodies.GenerateBody) -> Any:
    return str if given.schema is None else Schema.json(given.schema)


def _at_most(asked: int | None, most: int | None) -> int | None:
    """Raises `RequestProblem` for more than the server gives."""
    if asked is not None and most is not None and asked > most:
        raise refused(f"max_tokens is {asked}; this server gives at most {most}.", param="max_tokens")
    return most if asked is None else asked


def _options(given: bodies.GenerateBody, served: Served, service: Service) -> TurnOptions:
    options: TurnOptions = {
        "tool_choice": given.tool_choice,
        "stop": given.stop,
        "keep_on_cancel": given.keep_on_cancel,
        "timeout": min(given.timeout or service.options.turn_seconds, service.options.turn_seconds),
    }
    asked = served.session.defaults.max_tokens if given.max_tokens is None else given.max_tokens
    options["max_tokens"] = _at_most(asked, service.options.max_tokens)
    options["temperature"], options["logprobs"] = given.temperature, given.logprobs
    if given.parallel_calls is not None:
        options["parallel_calls"] = given.parallel_calls
    if given.seed is not None:
        options["seed"] = given.seed
    return options


def _key_of(request: Request) -> str | None:
    return request.headers.get("idempotency-key") or None


def _said(request: Request, body: bytes) -> bytes:
    """What must be the same when a key comes again."""
    return b"\0".join((request.method.encode(), request.url.path.encode(), body))


def _stream(served: Served, after: int, *, one_turn: bool) -> ASGIApp:
    async def produce(emit: Emitter) -> None:
        with served.reading():
            async for event in served.read(after, one_turn=one_turn):
                await emit.raw(f"id: {event['seq']}\n".encode() + b"data: " + encoded(event) + b"\n\n")
        await emit.raw(b": end\n\n")

    return EventStream(produce, Problem.openai, headers={})


async def _last(served: Served, after: int) -> Any:
    """The turn's reply, once it has ended. What ended it otherwise is raised."""
    found: dict[str, Any] = {}
    with served.reading():
        async for event in served.read(after, one_turn=True):
            found = event
    if found.get("type") == "Error":
        raise refused(found["message"], status=found["status"], code=found["code"])
    if found.get("type") != "Reply":
        raise refused("The turn was cancelled.", status=409, code="cancelled")
    return found["reply"]


def _json(value: object) -> Response:
    return Response(encoded(value), media_type="application/json")
