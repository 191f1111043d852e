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
from agentspeed.server.streaming import Emitter, framed
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
        self._waiting = bytearray()

    async def produce(self, emit: Emitter) -> None:
        """To be given to `EventStream`."""
        answer = await self._service.turn(self._request, *emit.paths(self._written))
        (reply,) = answer.replies
        self._close()
        self._tell({"type": "message_delta", "delta": _end(reply), "usage": usage_of(answer)})
        self._tell({"type": "message_stop"})
        await emit.raw(self._taken())

    def _written(self, _: int, batch: list[events.AnyEvent]) -> bytes:
        for event in batch:
            self._hear(event)
        return self._taken()

    def _hear(self, event: events.AnyEvent) -> None:
        match event:
            case events.TurnStarted(usage=usage):
                before = usage.new + usage.resumed + usage.recomputed
                counted = {
                    "input_tokens": before - usage.prefill_saved,
                    "output_tokens": 0,
                    "cache_read_input_tokens": usage.prefill_saved,
                    "cache_creation_input_tokens": 0,
                }
                empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": counted}
                self._tell({"type": "message_start", "message": {**_head(self._service), **empty}})
                self._tell({"type": "ping"})
            case events.ReasoningDelta(text=text):
                self._in("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self._delta({"type": "thinking_delta", "thinking": text})
            case events.TextDelta(text=text):
                self._in("text", {"type": "text", "text": ""})
                self._delta({"type": "text_delta", "text": text})
            case events.ToolCallStarted(index=place, name=name):
                number = f"toolu_{secrets.token_hex(8)}"
                self._in(f"tool {place}", {"type": "tool_use", "id": number, "name": name, "input": {}})
            case events.ToolCallDelta(arguments=text):
                self._delta({"type": "input_json_delta", "partial_json": text})
            case _:
                pass

    def _in(self, block: str, start: dict[str, Any]) -> None:
        if self._block == block:
            return
        self._close()
        self._block = block
        self._index += 1
        self._tell({"type": "content_block_start", "index": self._index, "content_block": start})

    def _delta(self, delta: dict[str, Any]) -> None:
        self._tell({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> None:
        if self._block is not None:
            self._tell({"type": "content_block_stop", "index": self._index})
            self._block = None

    def _tell(self, value: dict[str, Any]) -> None:
        self._waiting += framed(value, value["type"])

    def _taken(self) -> bytes:
        data, self._waiting = bytes(self._waiting), bytearray()
        return data
