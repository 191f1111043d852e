"""The paths of `/v1/responses` and `/v1/conversations`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from agentspeed.messages import Assistant, Message, ToolMessage, User
from agentspeed.server.affinity import AFFINITY, key_in
from agentspeed.server.openai import items
from agentspeed.server.openai.responses import Responses, ResponsesRequest
from agentspeed.server.openai.stored import StoredConversation
from agentspeed.server.problems import Problem, RequestProblem, refused
from agentspeed.server.streaming import Emitter, EventStream, WholeBody, encoded
from agentspeed.server.turns import Service, parsed


class NewConversation(msgspec.Struct, kw_only=True):
    """The body of a new conversation."""

    items: list[Any] | None = None
    metadata: dict[str, Any] | None = None


def responses_routes(owner: Responses, route: Callable[..., Route]) -> list[Route]:
    """Each with the state that they share."""

    async def create(request: Request, service: Service, tenant: str) -> ASGIApp:
        body: ResponsesRequest = parsed(await request.body(), ResponsesRequest)
        one = await owner.open(body, tenant, key_in(request.headers.get(AFFINITY)))
        if not body.stream:
            return WholeBody(lambda: owner.run(one, None), Problem.openai, headers={})

        async def produce(emit: Emitter) -> None:
            _ = await owner.run(one, emit)

        return EventStream(produce, one.failed, headers={}, error_event="error")

    async def read(request: Request, service: Service, tenant: str) -> ASGIApp:
        found = await owner.find(tenant, request.path_params["number"])
        if found is None:
            raise _missing("response", request)
        return _json(found.body)

    async def delete(request: Request, service: Service, tenant: str) -> ASGIApp:
        number = request.path_params["number"]
        if await owner.find(tenant, number) is None or owner.stored.pop(tenant, number) is None:
            raise _missing("response", request)
        return _json({"id": number, "object": "response", "deleted": True})

    async def cancel(request: Request, service: Service, tenant: str) -> ASGIApp:
        number = request.path_params["number"]
        if owner.cancel(tenant, number):
            return _json({"id": number, "object": "response", "status": "cancelled", "output": []})
        found = await owner.find(tenant, number)
        if found is None:
            raise _missing("response", request)
        return _json(found.body)

    async def new_conversation(request: Request, service: Service, tenant: str) -> ASGIApp:
        body: NewConversation = parsed(await request.body() or b"{}", NewConversation)
        system, messages = items.read_items(body.items or [], where="items")
        if system:
            raise refused("A conversation has no system items; give instructions to each response.", param="items")
        made = StoredConversation(
            items.new_id("conv", key_in(request.headers.get(AFFINITY))), int(time.time()), body.metadata or {}, messages
        )
        owner.conversations.put(tenant, made.number, made)
        return _json(_card(made))

    async def conversation(request: Request, service: Service, tenant: str) -> ASGIApp:
        number = request.path_params["number"]
        found = await owner.find_conversation(tenant, number)
        if found is None:
            raise _missing("conversation", request)
        if request.method == "DELETE":
            _ = owner.conversations.pop(tenant, number)
            return _json({"id": number, "object": "conversation.deleted", "deleted": True})
        return _json(_card(found))

    async def conversation_items(request: Request, service: Service, tenant: str) -> ASGIApp:
        found = await owner.find_conversation(tenant, request.path_params["number"])
        if found is None:
            raise _missing("conversation", request)
        data = [item for message in found.messages for item in _items_of(message)]
        return _json(
            {
                "object": "list",
                "data": data,
                "has_more": False,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
            }
        )

    return [
        route("/v1/responses", create, "POST"),
        route("/v1/responses/{number}", read, "GET"),
        route("/v1/responses/{number}", delete, "DELETE"),
        route("/v1/responses/{number}/cancel", cancel, "POST"),
        route("/v1/conversations", new_conversation, "POST"),
        route("/v1/conversations/{number}", conversation, "GET", "DELETE"),
        route("/v1/conversations/{number}/items", conversation_items, "GET"),
    ]


def _missing(what: str, request: Request) -> RequestProblem:
    return refused(f"There is no {what} {request.path_params['number']!r}.", status=404, code=f"{what}_not_found")


def _card(made: StoredConversation) -> Mapping[str, Any]:
    return {"id": made.number, "object": "conversation", "created_at": made.created, "metadata": made.metadata}


def _items_of(message: Message) -> list[dict[str, Any]]:
    match message:
        case User(text=text):
            return [
                {
                    "type": "message",
                    "id": items.new_id("msg"),
                    "role": "user",
                    "status": "completed",
                    "content": [{"type": "input_text", "text": text}],
                }
            ]
        case Assistant(text=text, tool_calls=calls):
            said = [items.message_item(text)] if text or not calls else []
            return [*said, *(items.call_item(call.id, call.name, call.arguments) for call in calls)]
        case ToolMessage(call_id=call_id, text=text):
            return [
                {
                    "type": "function_call_output",
                    "id": items.new_id("fco"),
                    "call_id": call_id,
                    "output": text,
                    "status": "completed",
                }
            ]
        case _:
            return []


def _json(value: object) -> Response:
    return Response(encoded(value), media_type="application/json")
