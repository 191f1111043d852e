"""The ASGI application: which path is answered by what, and what every request must show and may cost."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias, final

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentspeed import __version__, errors
from agentspeed.server import openapi, texts, ui
from agentspeed.server.anthropic import messages as anthropic_messages
from agentspeed.server.links import Links, link_routes
from agentspeed.server.metrics import CONTENT_TYPE
from agentspeed.server.native.routes import session_routes
from agentspeed.server.native.served import Sessions
from agentspeed.server.openai import chat, completions
from agentspeed.server.openai.response_routes import responses_routes
from agentspeed.server.openai.responses import Responses
from agentspeed.server.options import ServerOptions, tenant_of
from agentspeed.server.problems import Problem, RequestProblem, problem_of, refused
from agentspeed.server.streaming import EventStream, WholeBody, encoded
from agentspeed.server.turns import Service, parsed

_LOG = logging.getLogger("agentspeed.server")
_ACCESS = logging.getLogger("agentspeed.access")
_SWEEP_SECONDS = 5.0
_LAST_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_OPEN_PATHS = frozenset({"/health"})
Endpoint: TypeAlias = Callable[[Request, Service, str], Awaitable[ASGIApp]]


def application(service: Service) -> Gate:
    """Everything that `agentspeed serve` answers."""

    responses = Responses(service)
    held: list[Sessions] = []
    linked: list[Links] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            options = service.options
            sessions = Sessions(
                group,
                most=options.max_sessions,
                idle_seconds=options.idle_seconds,
                grace=options.grace_seconds,
                saved=service.saved,
            )
            held.append(sessions)
            links = Links(service, group, most=options.max_links, grace=options.grace_seconds)
            linked.append(links)
            group.start_soon(_swept, service, sessions, links)
            yield
            service.drain()
            await sessions.end_turns(service.drain_left)
            await sessions.close_all()
            await links.close_all()
            group.cancel_scope.cancel()
        if service.saved is not None:
            await service.saved.save_history(service.history)
            await responses.save()
        await service.history.close()

    async def ui_events(request: Request, service: Service, tenant: str) -> ASGIApp:
        return _json(held[0].get(tenant, request.path_params["label"]).newest(200))

    def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
        async def answer(request: Request) -> ASGIApp:
            return await endpoint(request, service, request.scope["agentspeed.tenant"])

        return Route(path, _Answered(answer), methods=list(methods))

    routes = [
        route("/health", _health, "GET"),
        route("/health_generate", _health_generate, "GET"),
        route("/version", _version, "GET"),
        route("/metrics", _metrics, "GET"),
        route("/openapi.json", _openapi, "GET"),
        route("/ui", _ui, "GET"),
        route("/ui/state", _ui_state, "GET"),
        route("/ui/events/{label}", ui_events, "GET"),
        route("/v1/models", _models, "GET"),
        route("/v1/models/{model:path}", _model, "GET"),
        route("/v1/chat/completions", _chat, "POST"),
        route("/v1/completions", _completions, "POST"),
        *responses_routes(responses, route),
        *session_routes(lambda: held[0], route),
        *link_routes(lambda: linked[0], route),
        route("/v1/messages", _messages, "POST"),
        route("/v1/messages/count_tokens", _count_tokens, "POST"),
        route("/tokenize", _tokenize, "POST"),
        route("/detokenize", _detokenize, "POST"),
    ]
    handlers: dict[Any, Any] = {HTTPException: _no_route, Exception: _broken}
    return Gate(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), service.options)


async def _no_route(request: Request, error: HTTPException) -> Response:
    """What no route takes, in the shape that clients read."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    what = f"{request.method} {request.url.path}: {error.detail}."
    found = _problem(Problem(status=error.status_code, kind="invalid_request_error", message=what, code=code), request)
    found.headers.update(error.headers or {})
    return found


async def _broken(request: Request, error: Exception) -> Response:
    """A bug of ours; it is raised on, and logged, after this was said."""
    told = f"This is a bug of the server; its log has it under {_number(request)}."
    return _problem(Problem(status=500, kind="server_error", message=told, code="internal_error"), request)


async def _swept(service: Service, sessions: Sessions, links: Links) -> None:
    while True:
        await service.wait_for_drain(_SWEEP_SECONDS)
        if service.draining:  # what has no end of its own ends shortly before everything is cancelled
            while service.drain_left > _LAST_SECONDS:
                await links.close_resting()
                await anyio.sleep(min(_LOOK_SECONDS, service.drain_left))
            await links.close_all()
            await sessions.end_turns(0.0)
            return
        await service.history.sweep()
        await sessions.sweep()
        await links.sweep()


@final
class _Answered:
    """An endpoint that gives an ASGI response, or refuses before there is one."""

    def __init__(self, answer: Callable[[Request], Awaitable[ASGIApp]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except RequestProblem as refusal:
            response = _problem(refusal.problem, request)
        except errors.AgentspeedError as error:
            response = _problem(problem_of(error), request)
        await response(scope, receive, send)


def _problem(problem: Problem, request: Request) -> Response:
    anthropic = request.url.path.startswith("/v1/messages")
    body = problem.anthropic(_number(request)) if anthropic else problem.openai()
    headers = {} if problem.retry_after is None else {"retry-after": str(problem.retry_after)}
    if problem.status == 401:  # a browser then asks for the key, as a password
        headers["www-authenticate"] = 'Basic realm="agentspeed: any name, the API key as password"'
    return Response(encoded(body), problem.status, headers, "application/json")


def _number(request: Request) -> str:
    return str(request.scope["agentspeed.request_id"])


@final
class Gate:
    """Before any endpoint: a number for the request, who it is from, how long its body may be. After it: the access
    log, which never holds content."""

    def __init__(self, app: Starlette, options: ServerOptions) -> None:
        self.routes = app.routes
        self._app = app
        self._options = options

    def running(self) -> AbstractAsyncContextManager[Any]:
        """What a server's lifespan is, for who serves this otherwise: at its end turns end and sessions are saved."""
        return self._app.router.lifespan_context(self._app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = f"req_{secrets.token_hex(12)}"
        scope["agentspeed.request_id"] = number
        begun, status = time.monotonic(), 0
        read, whole = 0, False

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [
                        *message.get("headers", ()),
                        (b"x-request-id", number.encode()),
                        (b"request-id", number.encode()),
                    ],
                }
            await send(message)

        async def receiving() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                with anyio.fail_after(self._options.body_seconds):
                    message = await receive()
            except TimeoutError as error:
                raise RequestProblem(_too_slow(self._options.body_seconds)) from error
            if message["type"] == "http.request":
                whole = not message.get("more_body", False)
                read += len(message.get("body", b""))
                if read > self._options.max_body:
                    raise RequestProblem(_too_large(self._options.max_body))
            return message

        try:
            request = Request(scope)
            if (early := self._early(request)) is not None:
                await _problem(early, request)(scope, receive, sending)
                return
            await self._app(scope, receiving, sending)
        finally:
            _ACCESS.info(
                '%s "%s %s" %s %.1f ms %s',
                (scope.get("client") or ("-",))[0],
                scope["method"],
                scope["path"],
                status or "left",
                (time.monotonic() - begun) * 1000,
                number,
            )

    def _early(self, request: Request) -> Problem | None:
        headers = request.headers
        tenant: str | None = ""
        if request.url.path not in _OPEN_PATHS:
            tenant = tenant_of(self._options.keys, headers.get("authorization"), headers.get("x-api-key"))
            if tenant is None:
                return Problem(
                    status=401,
                    kind="authentication_error",
                    code="invalid_api_key",
                    message="The API key is missing or wrong. Send Authorization: Bearer KEY, or x-api-key: KEY.",
                )
        request.scope["agentspeed.tenant"] = tenant
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._options.max_body:
            return _too_large(self._options.max_body)
        return None


def _too_slow(seconds: float) -> Problem:
    return Problem(
        status=408,
        kind="invalid_request_error",
        code="request_timeout",
        message=f"Nothing of the body came for {seconds:g} s.",
    )


def _too_large(most: int) -> Problem:
    return Problem(
        status=413,
        kind="invalid_request_error",
        code="request_too_large",
        message=f"The body is longer than {most} bytes, the most that this server reads.",
    )


# ---- endpoints ------------------------------------------------------------------------------------------------------
async def _chat(request: Request, service: Service, tenant: str) -> ASGIApp:
    body: chat.ChatRequest = parsed(await request.body(), chat.ChatRequest)
    headers: dict[str, str] = {}
    if body.stream:
        stream = chat.ChatStream(body, service, tenant)
        return EventStream(stream.produce, Problem.openai, headers=headers)
    return WholeBody(lambda: chat.complete(body, service, tenant), Problem.openai, headers=headers)


async def _completions(request: Request, service: Service, tenant: str) -> ASGIApp:
    body: completions.CompletionRequest = parsed(await request.body(), completions.CompletionRequest)
    one = completions.Completion(body, service, tenant)
    if body.stream:
        return EventStream(one.produce, Problem.openai, headers={})
    return WholeBody(one.complete, Problem.openai, headers={})


async def _messages(request: Request, service: Service, tenant: str) -> ASGIApp:
    body: anthropic_messages.MessagesRequest = parsed(await request.body(), anthropic_messages.MessagesRequest)
    number = _number(request)
    if body.stream:
        stream = anthropic_messages.MessagesStream(body, service, tenant)
        return EventStream(stream.produce, lambda problem: problem.anthropic(number), headers={}, error_event="error")
    return WholeBody(
        lambda: anthropic_messages.complete(body, service, tenant),
        lambda problem: problem.anthropic(number),
        headers={},
    )


async def _count_tokens(request: Request, service: Service, tenant: str) -> ASGIApp:
    body: anthropic_messages.MessagesRequest = parsed(await request.body(), anthropic_messages.MessagesRequest)
    conversation = anthropic_messages.conversation_of(body, tenant)
    return _json({"input_tokens": await anyio.to_thread.run_sync(service.count, conversation)})


async def _models(request: Request, service: Service, tenant: str) -> ASGIApp:
    return _json(
        {
            "object": "list",
            "data": [_card(service)],
            "has_more": False,
            "first_id": service.model_name,
            "last_id": service.model_name,
        }
    )


async def _model(request: Request, service: Service, tenant: str) -> ASGIApp:
    if request.path_params["model"] != service.model_name:
        raise refused(
            f"There is no model {request.path_params['model']!r}; this server has {service.model_name!r}.",
            param="model",
            code="model_not_found",
            status=404,
        )
    return _json(_card(service))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "type": "model",
        "created": service.started_at,
        "owned_by": "agentspeed",
        "display_name": service.model_name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.started_at)),
    }


async def _health(request: Request, service: Service, tenant: str) -> ASGIApp:
    if service.draining:
        return Response(encoded({"status": "draining"}), 503, {"retry-after": "5"}, "application/json")
    try:
        _ = await service.engine.stats()
    except errors.WorldError as error:
        return Response(
            encoded({"status": "engine is not answering", "why": str(error)}), 503, media_type="application/json"
        )
    return _json({"status": "ok"})


async def _health_generate(request: Request, service: Service, tenant: str) -> ASGIApp:
    """A turn of one token, to its end."""
    begun = time.monotonic()
    async with service.engine.session() as session:
        _ = await session.generate("ping", max_tokens=1, timeout=30.0)
    return _json({"status": "ok", "seconds": round(time.monotonic() - begun, 4)})


async def _metrics(request: Request, service: Service, tenant: str) -> ASGIApp:
    service.metrics.requests.set(service.running)
    service.metrics.idle.set(service.history.idle)
    counts = (await service.engine.stats()).counts
    return Response(service.metrics.page(counts), media_type=CONTENT_TYPE)


async def _ui(request: Request, service: Service, tenant: str) -> ASGIApp:
    return Response(ui.page(), media_type="text/html")


async def _ui_state(request: Request, service: Service, tenant: str) -> ASGIApp:
    seen = await ui.picture(service.engine, tenant, everyone=not service.options.keys)
    return _json({**seen, "model": service.model_name})


async def _version(request: Request, service: Service, tenant: str) -> ASGIApp:
    return _json({"version": __version__})


async def _tokenize(request: Request, service: Service, tenant: str) -> ASGIApp:
    return _json(await texts.tokenized(service.engine, parsed(await request.body(), texts.TextBody)))


async def _detokenize(request: Request, service: Service, tenant: str) -> ASGIApp:
    return _json(texts.detokenized(service.engine, parsed(await request.body(), texts.IdsBody)))


async def _openapi(request: Request, service: Service, tenant: str) -> ASGIApp:
    return _json(openapi.document(keys=bool(service.options.keys)))


def _json(value: object) -> Response:
    return Response(encoded(value), media_type="application/json")
