"""`POST /v1/responses`: a response goes on from any earlier one, or from a named conversation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, final

import anyio
import msgspec

from agentspeed.events import AnyEvent
from agentspeed.history import Conversation
from agentspeed.message_formats.openai import tool_definitions
from agentspeed.message_formats.tools import declared
from agentspeed.messages import Assistant, Message, ToolCall
from agentspeed.sampling import Sampling
from agentspeed.server.openai import items
from agentspeed.server.openai.parameters import bounded_tokens, choice_of, output_of
from agentspeed.server.openai.response_events import ResponseEvents
from agentspeed.server.openai.stored import Store, StoredConversation, StoredResponse
from agentspeed.server.problems import Problem, RequestProblem, refused
from agentspeed.server.saved_sessions import SavedSessions
from agentspeed.server.snapshot_files import Kind, Saved
from agentspeed.server.streaming import Emitter
from agentspeed.server.turns import Answer, Request, Service
from agentspeed.session import TurnOptions
from agentspeed.tools import Tool

T = TypeVar("T")


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body."""

    input: str | list[Any] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    stream: bool = False
    prewarm: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_logprobs: int | None = None
    prompt_cache_key: str | None = None
    background: bool | None = None
    prompt: Any = None

    metadata: dict[str, Any] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    truncation: str | None = None
    include: list[str] | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    reasoning: dict[str, Any] | None = None


def tools_of(body: ResponsesRequest) -> tuple[Tool, ...]:
    """Raises `MessageMisfit` that names the tool."""
    return declared(tool_definitions(body.tools))


def system_of(body: ResponsesRequest, texts: Sequence[str]) -> str | None:
    """Its instructions, then the system texts of its input."""
    return "\n\n".join([*([body.instructions] if body.instructions else []), *texts]) or None


def conversation_named(body: ResponsesRequest) -> object:
    """The id of its conversation, as it was given: alone, or in an object."""
    return body.conversation.get("id") if isinstance(body.conversation, dict) else body.conversation


@final
class Responses:
    """The endpoint's own state: what it stored, and what runs."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.stored: Store[StoredResponse] = Store()
        self.conversations: Store[StoredConversation] = Store()
        self._running: dict[tuple[str, str], anyio.CancelScope] = {}
        self._taking = anyio.Lock()

    def cancel(self, tenant: str, number: str) -> bool:
        """Ends a response that runs. False when none of that id does."""
        scope = self._running.get((tenant, number))
        if scope is not None:
            scope.cancel()
        return scope is not None

    async def find(self, tenant: str, number: str) -> StoredResponse | None:
        """A stored response, also one that an earlier server saved."""
        return await self._find(self.stored, "responses", StoredResponse, tenant, number)

    async def find_conversation(self, tenant: str, number: str) -> StoredConversation | None:
        """The same for conversations."""
        return await self._find(self.conversations, "conversations", StoredConversation, tenant, number)

    async def _find(self, among: Store[T], kind: Kind, of: type[T], tenant: str, number: str) -> T | None:
        if among.get(tenant, number) is None and (saved := self.service.saved) is not None:
            async with self._taking:  # whoever asks meanwhile finds it here
                if among.get(tenant, number) is None:
                    found = await saved.taken(kind, tenant, number, of)
                    if found is not None:
                        among.put(tenant, number, found)
        return among.get(tenant, number)

    async def save(self) -> None:
        """At the end of the server: what its newest conversations need to go on at the next."""
        saved, most = self.service.saved, self.service.options.idle_sessions
        if saved is None:
            return
        for tenant, number, response in self.stored.newest(most):
            await _save(saved, "responses", tenant, number, response)
        for tenant, number, conversation in self.conversations.newest(most):
            # A response that was broken off may not have ended yet, and holds up nobody at the next server.
            await _save(saved, "conversations", tenant, number, replace(conversation, busy=False))

    async def open(self, body: ResponsesRequest, tenant: str, affinity: str = "") -> OneResponse:
        """Its id begins with `affinity`. Raises `RequestProblem`."""
        if body.previous_response_id is not None:
            _ = await self.find(tenant, body.previous_response_id)
        if isinstance(number := conversation_named(body), str):
            _ = await self.find_conversation(tenant, number)
        return OneResponse(self, body, tenant, affinity)

    async def run(self, one: OneResponse, emit: Emitter | None) -> dict[str, Any]:
        """The response when it has ended; a streamed one has sent its events by then."""
        key = (one.tenant, one.number)
        if one.conversation is not None:
            if one.conversation.busy:
                raise refused(
                    f"A response of conversation {one.conversation.number} is running.",
                    status=409,
                    param="conversation",
                    code="conversation_locked",
                )
            one.conversation.busy = True
        try:
            with anyio.CancelScope() as scope:
                self._running[key] = scope
                return await one.produce(emit)
            return await one.cancelled(emit)
        finally:
            _ = self._running.pop(key, None)
            if one.conversation is not None:
                one.conversation.busy = False


async def _save(among: SavedSessions, kind: Kind, tenant: str, number: str, value: object) -> None:
    """As JSON: what clients sent may hold numbers of any length, and none of them costs others what is saved after."""
    await among.save(kind, Saved(tenant=tenant, name=number, data=msgspec.json.encode(value)))


@final
class OneResponse:
    """One request on its way to a response."""

    def __init__(self, owner: Responses, body: ResponsesRequest, tenant: str, affinity: str) -> None:
        self.number = items.new_id("resp", affinity)
        self.tenant = tenant
        self._owner = owner
        self._service = owner.service
        self._body = body
        self._created = int(time.time())
        for name in ("background", "prompt"):
            if getattr(body, name):
                raise refused(f"{name} is not supported; leave it out.", param=name, code="unsupported")
        if body.previous_response_id is not None and body.conversation is not None:
            raise refused("Give previous_response_id or conversation, not both.", param="conversation")
        self.conversation = self._conversation()
        earlier = self._earlier()
        system, new = items.read_items(body.input or [], earlier)
        if not new and not earlier:
            raise refused("input is empty.", param="input")
        self._messages: tuple[Message, ...] = (*earlier, *new)
        self._system = system_of(body, system)
        self._request = self._asked()
        self._events = ResponseEvents(self._head("in_progress"), streamed=body.stream)

    def _conversation(self) -> StoredConversation | None:
        if self._body.conversation is None:
            return None
        number = conversation_named(self._body)
        found = self._owner.conversations.get(self.tenant, number) if isinstance(number, str) else None
        if found is None:
            raise refused(
                f"There is no conversation {number!r}.", status=404, param="conversation", code="conversation_not_found"
            )
        return found

    def _earlier(self) -> tuple[Message, ...]:
        if self.conversation is not None:
            return self.conversation.messages
        number = self._body.previous_response_id
        if number is None:
            return ()
        found = self._owner.stored.get(self.tenant, number)
        if found is None:
            raise RequestProblem(
                Problem(
                    status=404,
                    kind="invalid_request_error",
                    param="previous_response_id",
                    code="previous_response_not_found",
                    message=f"There is no response {number!r}, or it was forgotten; send the whole history as input.",
                )
            )
        return found.messages

    def _asked(self) -> Request:
        body, limits = self._body, self._service.options
        options: TurnOptions = {
            "tool_choice": choice_of(body.tool_choice),
            "sampling": Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                frequency_penalty=body.frequency_penalty or 0.0,
                presence_penalty=body.presence_penalty or 0.0,
            ),
            **bounded_tokens(body.max_output_tokens, limits.default_max_tokens, limits.max_tokens, "max_output_tokens"),
        }
        if body.parallel_tool_calls is False:
            options["parallel_calls"] = 1
        if body.top_logprobs is not None:
            options["logprobs"] = body.top_logprobs
        return Request(
            conversation=Conversation(
                messages=self._messages,
                system=self._system,
                tenant=self.tenant,
                tools=tools_of(body),
                hint=body.prompt_cache_key,
            ),
            options=options,
            output=output_of((body.text or {}).get("format"), "text.format"),
        )

    async def produce(self, emit: Emitter | None) -> dict[str, Any]:
        """Runs the turn. A response that failed is one too, where its stream had begun."""
        events = self._events
        events.begin()
        if emit is not None:
            await emit.raw(events.taken())
        whole = await (self._prewarm() if self._body.prewarm else self._answer(emit))
        if emit is not None:
            await emit.raw(events.taken())
        return whole

    async def _answer(self, emit: Emitter | None) -> dict[str, Any]:
        events = self._events
        told, at_once = (self._told, self._gathered) if emit is None else emit.paths(self._written)
        answer = await self._service.turn(self._request, told, at_once)
        (reply,) = answer.replies
        output = events.finish()
        cut = reply.finish_reason == "max_tokens"
        whole = {
            **self._head("incomplete" if cut else "completed"),
            "output": output,
            "usage": usage_of(answer),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": int(time.time()),
        }
        calls = tuple(
            ToolCall(id=number, name=call.name, arguments=call.arguments)
            for number, call in zip(events.call_ids, reply.tool_calls, strict=False)
        )
        self._keep(whole, Assistant(reply.text, calls, reply.reasoning))
        events.end("response.incomplete" if cut else "response.completed", whole)
        return whole

    async def _told(self, _: int, batch: list[AnyEvent]) -> None:
        self._events.told(batch)

    def _gathered(self, _: int, batch: list[AnyEvent]) -> bool:
        self._events.told(batch)
        return True

    def _written(self, _: int, batch: list[AnyEvent]) -> bytes:
        self._events.told(batch)
        return self._events.taken()

    def failed(self, problem: Problem) -> dict[str, Any]:
        """An error inside of its stream."""
        return self._events.failed(problem)

    async def _prewarm(self) -> dict[str, Any]:
        """Computes the rows of the prompt while nobody waits for an answer."""
        service = self._service
        async with service.admitted(), service.history.take(self._request.conversation) as taken:
            if taken.messages:
                _ = await taken.session.add(*taken.messages, prefill=True)
            tokens = taken.session.tokens
        whole = {
            **self._head("completed"),
            "output": [],
            "completed_at": int(time.time()),
            "usage": _usage(tokens, taken.shared_tokens, 0),
        }
        self._events.end("response.completed", whole)
        return whole

    async def cancelled(self, emit: Emitter | None) -> dict[str, Any]:
        """The end of a response that another request ended."""
        whole = {**self._head("cancelled"), "output": []}
        self._events.end("response.cancelled", whole)
        if emit is not None:
            await emit.raw(self._events.taken())
        return whole

    def _keep(self, whole: dict[str, Any], said: Assistant) -> None:
        messages = (*self._messages, said)
        if self.conversation is not None:
            self.conversation.messages = messages
        if self._body.store is not False:
            self._owner.stored.put(self.tenant, self.number, StoredResponse(whole, messages, self._system))

    def _head(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": self.number,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._service.model_name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": None if body.reasoning is None else {"effort": None, "summary": None, **body.reasoning},
            "conversation": None if self.conversation is None else {"id": self.conversation.number},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"strict": True, "description": None, "parameters": None, **tool} for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "presence_penalty": body.presence_penalty or 0.0,
            "safety_identifier": body.safety_identifier,
            "truncation": "disabled",
            "usage": None,
            "metadata": body.metadata or {},
            "service_tier": "default",
            "user": body.user,
            "prompt_cache_key": body.prompt_cache_key,
            "max_tool_calls": body.max_tool_calls,
            "completed_at": None,
        }


def usage_of(answer: Answer) -> dict[str, Any]:
    """Tokens as this endpoint counts them."""
    return _usage(answer.prompt, answer.cached, answer.drawn)


def _usage(prompt: int, cached: int, drawn: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": drawn,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + drawn,
    }
