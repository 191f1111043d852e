"""`POST /v1/messages` and its `count_tokens`: Anthropic's blocks over the same sessions."""

from __future__ import annotations

import secrets
from typing import Any, Final, final

import msgspec

from agentspeed import events
from agentspeed.history import Conversation
from agentspeed.message_formats.anthropic import conversation_parts, tool_definitions
from agentspeed.message_formats.tools import declared
from agentspeed.sampling import Sampling
from agentspeed.server.openai.parameters import bounded_tokens
from agentspeed.server.problems import refused
from agentspeed.server.streaming import Emitter
from agentspeed.server.turns import Answer, Request, Service
from agentspeed.session import TurnOptions
from agentspeed.turn import Reply

_STOP: Final = {
    "stop_id": "end_turn",
    "grammar_end": "end_turn",
    "stop_string": "stop_sequence",
    "max_tokens": "max_tokens",
    "tool_calls": "tool_use",
}


class MessagesRequest(msgspec.Struct, kw_only=True):
    """The body. Fields that mean nothing here are let pass: clients of this protocol send many."""

    messages: list[dict[str, Any]]
    max_tokens: int = 0
    model: str = ""
    system: Any = None
    stream: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


def conversation_of(body: MessagesRequest, tenant: str) -> Conversation:
    """Raises `MessageMisfit` that names the block."""
    system, messages = conversation_parts(body.system, body.messages)
    return Conversation(
        messages=messages,
        system=system,
        tools=declared(tool_definitions(body.tools)),
        tenant=tenant,
        hint=(body.metadata or {}).get("user_id"),
    )


def request_of(body: MessagesRequest, service: Service, tenant: str) -> Request:
    """What is asked for, in the SDK's terms. Raises `RequestProblem`."""
    limits = service.options
    options: TurnOptions = {
        "sampling": Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k or None,
            top_p=1.0 if body.top_p is None else body.top_p,
        ),
        "stop": tuple(body.stop_sequences or ()),
        **bounded_tokens(body.max_tokens, limits.default_max_tokens, limits.max_tokens, "max_tokens"),
    }
    choice = body.tool_choice or {"type": "auto"}
    kinds = {"auto": "auto", "any": "required", "none": "none", "tool": str(choice.get("name"))}
    if choice.get("type") not in kinds:
        raise refused(
            f"tool_choice.type is {choice.get('type')!r}; it must be auto, any, tool or none.", param="tool_choice"
        )
    options["tool_choice"] = kinds[choice["type"]]
    if choice.get("disable_parallel_tool_use"):
        options["parallel_calls"] = 1
    return Request(conversation=conversation_of(body, tenant), options=options)


async def complete(body: MessagesRequest, service: Service, tenant: str) -> dict[str, Any]:
    """The whole answer as one body."""
    answer = await service.turn(request_of(body, service, tenant))
    (reply,) = answer.replies
    return {**_head(service), "content": _blocks(reply), **_end(reply), "usage": usage_of(answer)}


def _head(service: Service) -> dict[str, Any]:
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": service.model_name}


def _end(reply: Reply[Any]) -> dict[str, Any]:
    return {"stop_reason": _STOP[reply.finish_reason], "stop_sequence": None}


def _blocks(reply: Reply[Any]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.reasoning:
        blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": ""})
    if reply.text or not reply.tool_calls:
        blocks.append({"type": "text", "text": reply.text, "citations": None})
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": msgspec.json.decode(call.arguments)}
        for call in reply.tool_calls
    ]
    return blocks


def usage_of(answer: Answer) -> dict[str, Any]:
    """Tokens as Anthropic counts them: what was read from the cache is not among the input tokens."""
    return {
        "input_tokens": answer.prompt - answer.cached,
        "cache_read_input_tokens": answer.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": answer.drawn,
    }


@final
class MessagesStream:
    """Events of one streamed request: blocks that open, grow and close, one after the other."""

    def __init__(self, body: MessagesRequest, service: Service, tenant: str) -> None:
        self._service = service
        self._request = request_of(body, service, tenant)
        self._block: str | None = None
        self._index = -1

    async def produce(self, emit: Emitter) -> None:
        """To be given to `EventStream`."""

        async def told(_: int, batch: list[events.AnyEvent]) -> None:
            for event in batch:
                await one(event)

        async def one(event: events.AnyEvent) -> None:
            match event:
                case events.TurnStarted(usage=usage):
                    before = usage.new + usage.resumed + usage.recomputed
                    await emit(
                        {
                            "type": "message_start",
                            "message": {
                                **_head(self._service),
                                "content": [],
                                "stop_reason": None,
                                "stop_sequence": None,
                                "usage": {
                                    "input_tokens": before - usage.prefill_saved,
                                    "output_tokens": 0,
                                    "cache_read_input_tokens": usage.prefill_saved,
                                    "cache_creation_input_tokens": 0,
                                },
                            },
                        },
                        "message_start",
                    )
                    await emit({"type": "ping"}, "ping")
                case events.ReasoningDelta(text=text):
                    await self._in(emit, "thinking", {"type": "thinking", "thinking": "", "signature": ""})
                    await self._delta(emit, {"type": "thinking_delta", "thinking": text})
                case events.TextDelta(text=text):
                    await self._in(emit, "text", {"type": "text", "text": ""})
                    await self._delta(emit, {"type": "text_delta", "text": text})
                case events.ToolCallStarted(index=place, name=name):
                    await self._in(
                        emit,
                        f"tool {place}",
                        {"type": "tool_use", "id": f"toolu_{secrets.token_hex(8)}", "name": name, "input": {}},
                    )
                case events.ToolCallDelta(arguments=text):
                    await self._delta(emit, {"type": "input_json_delta", "partial_json": text})
                case _:
                    pass

        answer = await self._service.turn(self._request, told)
        (reply,) = answer.replies
        await self._close(emit)
        await emit({"type": "message_delta", "delta": _end(reply), "usage": usage_of(answer)}, "message_delta")
        await emit({"type": "message_stop"}, "message_stop")

    async def _in(self, emit: Emitter, block: str, start: dict[str, Any]) -> None:
        if self._block == block:
            return
        await self._close(emit)
        self._block = block
        self._index += 1
        await emit({"type": "content_block_start", "index": self._index, "content_block": start}, "content_block_start")

    async def _delta(self, emit: Emitter, delta: dict[str, Any]) -> None:
        await emit({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")

    async def _close(self, emit: Emitter) -> None:
        if self._block is not None:
            await emit({"type": "content_block_stop", "index": self._index}, "content_block_stop")
            self._block = None
