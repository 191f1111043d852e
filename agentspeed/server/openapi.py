"""`GET /openapi.json`: the paths, bodies and statuses of this server, for programs that read such a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import msgspec

from agentspeed import __version__
from agentspeed.server.anthropic.messages import MessagesRequest
from agentspeed.server.native import bodies
from agentspeed.server.openai.chat import ChatRequest
from agentspeed.server.openai.completions import CompletionRequest
from agentspeed.server.openai.response_routes import NewConversation
from agentspeed.server.openai.responses import ResponsesRequest
from agentspeed.server.texts import IdsBody, TextBody

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_BYTES: Final = "application/octet-stream"
_REFUSED: Final = {
    400: "The request is wrong; the error says where.",
    401: "The API key is missing or wrong.",
    408: "The body did not come in time.",
    413: "The body is longer than this server reads.",
    429: "Too much is in work; `Retry-After` says when to come back.",
    500: "A bug of this server, or a broken model.",
    503: "The engine does not answer, or the server is about to end; `Retry-After` says when to come back.",
}
_OF_TURNS: Final = {
    409: "The session or conversation is busy, or is another one by now.",
    410: "What was asked for is gone.",
    422: "The model's output was not what was asked for.",
    504: "The turn took longer than this server lets it.",
}
_MISSING: Final = {404: "There is no such thing, or it is another tenant's."}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """One method of one path. `body`: its type; None where there is none."""

    path: str
    method: str
    says: str
    body: type[msgspec.Struct] | None = None
    optional: bool = False
    """An empty body is its default."""
    raw: bool = False
    """The body is bytes."""
    media: tuple[str, ...] = (_JSON,)
    turns: bool = False
    query: tuple[str, ...] = ()
    once: bool = False
    """It takes an idempotency key."""


_SESSION: Final = "/v1/sessions/{number}"
_LINK: Final = "/v1/links/{number}"
_OPERATIONS: Final = (
    _Operation(path="/health", method="get", says="Whether the engine answers; needs no key."),
    _Operation(path="/health_generate", method="get", says="Draws a token.", turns=True),
    _Operation(path="/version", method="get", says="The version of agentspeed."),
    _Operation(path="/metrics", method="get", says="For Prometheus.", media=("text/plain",)),
    _Operation(path="/openapi.json", method="get", says="This document."),
    _Operation(path="/ui", method="get", says="A page for people.", media=("text/html",)),
    _Operation(path="/ui/state", method="get", says="What that page shows."),
    _Operation(path="/ui/events/{label}", method="get", says="The newest events of a session of `/v1/sessions`."),
    _Operation(path="/v1/models", method="get", says="The model that is served."),
    _Operation(path="/v1/models/{model}", method="get", says="The same by its name."),
    _Operation(
        path="/v1/chat/completions",
        method="post",
        says="OpenAI's chat completions; with `stream`, as events.",
        body=ChatRequest,
        media=(_JSON, _EVENTS),
        turns=True,
    ),
    _Operation(
        path="/v1/completions",
        method="post",
        says="OpenAI's completions of plain texts; with `stream`, as events.",
        body=CompletionRequest,
        media=(_JSON, _EVENTS),
        turns=True,
    ),
    _Operation(
        path="/v1/responses",
        method="post",
        says="OpenAI's responses; with `stream`, as events.",
        body=ResponsesRequest,
        media=(_JSON, _EVENTS),
        turns=True,
    ),
    _Operation(path="/v1/responses/{number}", method="get", says="A response that was stored."),
    _Operation(path="/v1/responses/{number}", method="delete", says="Forgets it."),
    _Operation(path="/v1/responses/{number}/cancel", method="post", says="Ends one that runs."),
    _Operation(
        path="/v1/conversations", method="post", says="A named conversation.", body=NewConversation, optional=True
    ),
    _Operation(path="/v1/conversations/{number}", method="get", says="One of them."),
    _Operation(path="/v1/conversations/{number}", method="delete", says="Forgets it."),
    _Operation(path="/v1/conversations/{number}/items", method="get", says="Its items."),
    _Operation(
        path="/v1/messages",
        method="post",
        says="Anthropic's messages; with `stream`, as events.",
        body=MessagesRequest,
        media=(_JSON, _EVENTS),
        turns=True,
    ),
    _Operation(path="/v1/messages/count_tokens", method="post", says="Tokens of such a request.", body=MessagesRequest),
    _Operation(path="/tokenize", method="post", says="A text as token ids.", body=TextBody),
    _Operation(path="/detokenize", method="post", says="Token ids as a text.", body=IdsBody),
    _Operation(
        path="/v1/sessions", method="post", says="Opens a session.", body=bodies.OpenBody, optional=True, once=True
    ),
    _Operation(path="/v1/sessions", method="get", says="Those that are open."),
    _Operation(path="/v1/sessions/restore", method="post", says="One from a snapshot's bytes.", raw=True, once=True),
    _Operation(path=_SESSION, method="get", says="A session with its messages."),
    _Operation(path=_SESSION, method="delete", says="Closes it.", once=True),
    _Operation(
        path=f"{_SESSION}/messages",
        method="post",
        says="Appends messages.",
        body=bodies.AppendBody,
        turns=True,
        once=True,
    ),
    _Operation(
        path=f"{_SESSION}/generate",
        method="post",
        says="One turn: its reply, or with `stream` its events.",
        body=bodies.GenerateBody,
        optional=True,
        media=(_JSON, _EVENTS),
        turns=True,
        once=True,
    ),
    _Operation(
        path=f"{_SESSION}/events",
        method="get",
        says="Events after number `after`, until the running turn has ended.",
        media=(_EVENTS,),
        turns=True,
        query=("after",),
    ),
    _Operation(path=f"{_SESSION}/cancel", method="post", says="Ends the running turn.", turns=True, once=True),
    _Operation(
        path=f"{_SESSION}/fork",
        method="post",
        says="Children with the same context.",
        body=bodies.ForkBody,
        optional=True,
        turns=True,
        once=True,
    ),
    _Operation(
        path=f"{_SESSION}/adopt",
        method="post",
        says="A child's context becomes the session's.",
        body=bodies.AdoptBody,
        turns=True,
        once=True,
    ),
    _Operation(
        path=f"{_SESSION}/marks",
        method="post",
        says="Names this place.",
        body=bodies.MarkBody,
        turns=True,
        once=True,
    ),
    _Operation(
        path=f"{_SESSION}/rewind",
        method="post",
        says="Back to a mark or a position.",
        body=bodies.RewindBody,
        turns=True,
        once=True,
    ),
    _Operation(
        path=f"{_SESSION}/expect",
        method="post",
        says="When it will be used again; the answer is a lease.",
        body=bodies.ExpectBody,
        turns=True,
        once=True,
    ),
    _Operation(
        path=f"{_SESSION}/snapshot", method="get", says="Everything but rows, as bytes.", media=(_BYTES,), turns=True
    ),
    _Operation(path="/v1/links", method="post", says='A link for `Session("http://...")`.'),
    _Operation(
        path=f"{_LINK}/frames",
        method="post",
        says="The client's bytes from offset `at` on.",
        raw=True,
        turns=True,
        query=("at", "received"),
    ),
    _Operation(
        path=f"{_LINK}/frames",
        method="get",
        says="The engine's bytes from offset `after` on, until the link ends.",
        media=(_BYTES,),
        turns=True,
        query=("after",),
    ),
    _Operation(path=_LINK, method="delete", says="Ends the link."),
)


def document(*, keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1. `keys`: requests need one."""
    kinds = tuple({one.body for one in _OPERATIONS if one.body is not None})
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for one in _OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _described(one)
    components: dict[str, Any] = {"schemas": {**schemas, "Error": _ERROR}}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "agentspeed", "version": __version__, "description": "Sessions over HTTP."},
        "paths": paths,
        "components": components,
    }
    if keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        found["security"] = [{"bearer": []}, {"key": []}]
        paths["/health"]["get"]["security"] = []
    return found


_ERROR: Final = {
    "type": "object",
    "description": "As OpenAI's clients read it; under /v1/messages as Anthropic's do.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _described(one: _Operation) -> dict[str, Any]:
    names = [part[1:-1] for part in one.path.split("/") if part.startswith("{")]
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    parameters += [
        {"name": name, "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}}
        for name in one.query
    ]
    if one.once:
        parameters.append(
            {"name": "idempotency-key", "in": "header", "schema": {"type": "string", "pattern": "^[!-~]{1,256}$"}}
        )
    answers = {200: "Done."} | _REFUSED | (_OF_TURNS if one.turns else {}) | (_MISSING if names else {})
    if one.path == "/v1/responses":
        answers |= _MISSING
    if one.once or one.path.startswith("/v1/sessions") or one.path.endswith("/cancel") or one.path.startswith(_LINK):
        answers |= _OF_TURNS
    found: dict[str, Any] = {
        "summary": one.says,
        "operationId": f"{one.method}{one.path.translate(str.maketrans('/{}.', '____'))}",
        "responses": {str(status): _answer(status, text, one) for status, text in sorted(answers.items())},
    }
    if parameters:
        found["parameters"] = parameters
    if one.body is not None:
        schema = {"$ref": f"#/components/schemas/{one.body.__name__}"}
        found["requestBody"] = {"required": not one.optional, "content": {_JSON: {"schema": schema}}}
    elif one.raw:
        schema_of_bytes = {"type": "string", "format": "binary"}
        found["requestBody"] = {"required": True, "content": {_BYTES: {"schema": schema_of_bytes}}}
    return found


def _answer(status: int, text: str, one: _Operation) -> dict[str, Any]:
    if status == 200:
        return {"description": text, "content": {media: _content(media) for media in one.media}}
    return {"description": text, "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}


def _content(media: str) -> dict[str, Any]:
    if media in (_JSON, _EVENTS):
        return {"schema": {}}
    return {"schema": {"type": "string"}}
