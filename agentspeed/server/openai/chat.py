"""`POST /v1/chat/completions`: whole or streamed, with tools, structured output, log-probabilities and choices."""

from __future__ import annotations

import secrets
import time
from typing import Any, Final, final

import msgspec

from agentspeed import events
from agentspeed.history import Conversation
from agentspeed.message_formats.openai import conversation_parts, tool_definitions
from agentspeed.message_formats.tools import declared
from agentspeed.server.finish_reasons import FINISH
from agentspeed.server.openai.logprobs import token_logprobs
from agentspeed.server.openai.parameters import bounded_tokens, choice_of, output_of, sampling_of, stops_of
from agentspeed.server.problems import refused
from agentspeed.server.streaming import Emitter, encoded, framed
from agentspeed.server.turns import Answer, Request, Service
from agentspeed.session import TurnOptions
from agentspeed.turn import Reply

MOST_CHOICES = 128
_TEXT: Final = "\0text\0"
"""Stands for a chunk's text where its frame is encoded; no model and no client names it."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream has beside its chunks."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body. The last group is taken and means nothing here."""

    messages: list[dict[str, Any]]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Any = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    repetition_penalty: float | None = None
    prompt_cache_key: str | None = None

    metadata: Any = None
    user: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    functions: Any = None
    function_call: Any = None


def conversation_of(body: ChatRequest, tenant: str) -> Conversation:
    """Raises `MessageMisfit` that names the message or the tool."""
    system, messages = conversation_parts(body.messages)
    return Conversation(
        messages=messages,
        system=system,
        tools=declared(tool_definitions(body.tools)),
        tenant=tenant,
        hint=body.prompt_cache_key,
    )


def request_of(body: ChatRequest, service: Service, tenant: str) -> Request:
    """What is asked for, in the SDK's terms. Raises `RequestProblem`."""
    for name in ("functions", "function_call"):
        if getattr(body, name) is not None:
            raise refused(f"{name} was replaced by tools in this protocol.", param=name)
    if body.modalities not in (None, ["text"]):
        raise refused("modalities: this model writes text alone.", param="modalities")
    choices = 1 if body.n is None else body.n
    if not 1 <= choices <= MOST_CHOICES:
        raise refused(f"n is {choices}; it must be from 1 to {MOST_CHOICES}.", param="n")
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs needs logprobs.", param="top_logprobs")
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    limits = service.options
    options: TurnOptions = {
        "tool_choice": choice_of(body.tool_choice),
        "sampling": sampling_of(body),
        "stop": stops_of(body.stop),
        **bounded_tokens(most, limits.default_max_tokens, limits.max_tokens, "max_tokens"),
    }
    if body.parallel_tool_calls is False:
        options["parallel_calls"] = 1
    if body.seed is not None:
        options["seed"] = body.seed
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    return Request(
        conversation=conversation_of(body, tenant),
        options=options,
        output=output_of(body.response_format),
        choices=choices,
    )


async def complete(body: ChatRequest, service: Service, tenant: str) -> dict[str, Any]:
    """The whole answer as one body."""
    answer = await service.turn(request_of(body, service, tenant))
    return {
        **_head(service, "chat.completion", f"chatcmpl-{secrets.token_hex(12)}"),
        "choices": [_choice(index, reply, body, service) for index, reply in enumerate(answer.replies)],
        "usage": usage_of(answer),
    }


def _choice(index: int, reply: Reply[Any], body: ChatRequest, service: Service) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": None}
    if reply.text or not reply.tool_calls:
        message["content"] = reply.text
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
    logprobs = {"content": token_logprobs(reply, service.engine.codec), "refusal": None} if body.logprobs else None
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": FINISH[reply.finish_reason]}


def usage_of(answer: Answer) -> dict[str, Any]:
    """Tokens as OpenAI counts them: cached ones are part of the prompt."""
    return {
        "prompt_tokens": answer.prompt,
        "completion_tokens": answer.drawn,
        "total_tokens": answer.prompt + answer.drawn,
        "prompt_tokens_details": {"cached_tokens": answer.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "cache_miss_reason": answer.taken.why or None,
    }


def _head(service: Service, kind: str, number: str) -> dict[str, Any]:
    return {
        "id": number,
        "object": kind,
        "created": int(time.time()),
        "model": service.model_name,
        "system_fingerprint": service.fingerprint,
    }


@final
class ChatStream:
    """Chunks of one streamed request, as OpenAI's clients put them together."""

    def __init__(self, body: ChatRequest, service: Service, tenant: str) -> None:
        self._body = body
        self._service = service
        self._request = request_of(body, service, tenant)
        self._head = _head(service, "chat.completion.chunk", f"chatcmpl-{secrets.token_hex(12)}")
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._greeted: set[int] = set()
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    async def produce(self, emit: Emitter) -> None:
        """To be given to `EventStream`."""
        answer = await self._service.turn(self._request, *emit.paths(self._written))
        last: list[bytes] = []
        for index, reply in enumerate(answer.replies):
            logprobs = None
            if self._body.logprobs:
                logprobs = {"content": token_logprobs(reply, self._service.engine.codec), "refusal": None}
            last.append(self._delta(index, {}, FINISH[reply.finish_reason], logprobs))
        if self._with_usage:
            last.append(framed({**self._head, "choices": [], "usage": usage_of(answer)}))
        await emit.raw(b"".join([*last, b"data: [DONE]\n\n"]))

    def _written(self, index: int, batch: list[events.AnyEvent]) -> bytes:
        return b"".join([self._chunks(index, event) for event in batch])

    def _chunks(self, index: int, event: events.AnyEvent) -> bytes:
        match event:
            case events.TextDelta(text=text):
                before, after = self._frames.get(index) or self._frame(index)
                return self._greeting(index) + before + encoded(text) + after
            case events.ReasoningDelta(text=text):
                return self._delta(index, {"reasoning_content": text})
            case events.ToolCallStarted(index=place, name=name):
                opened = {
                    "index": place,
                    "id": f"call_{secrets.token_hex(8)}",
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
                return self._delta(index, {"tool_calls": [opened]})
            case events.ToolCallDelta(index=place, arguments=text):
                return self._delta(index, {"tool_calls": [{"index": place, "function": {"arguments": text}}]})
            case _:
                return b""

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands around the text of nearly every chunk, encoded once."""
        before, _, after = self._chunk(index, {"content": _TEXT}).partition(encoded(_TEXT))
        self._frames[index] = before, after
        return before, after

    def _delta(self, index: int, value: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        return self._greeting(index) + self._chunk(index, value, finish, logprobs)

    def _greeting(self, index: int) -> bytes:
        if index in self._greeted:
            return b""
        self._greeted.add(index)
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def _chunk(self, index: int, value: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        usage = {"usage": None} if self._with_usage else {}
        choice = {"index": index, "delta": value, "logprobs": logprobs, "finish_reason": finish}
        return framed({**self._head, **usage, "choices": [choice]})
