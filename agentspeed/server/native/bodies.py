"""Bodies of `/v1/sessions`, and the values of the SDK as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from agentspeed import events
from agentspeed.messages import Assistant, Message, System, ToolMessage, User
from agentspeed.session import Session
from agentspeed.turn import Reply
from agentspeed.usage import Lease, Residence, Usage

MessageBody = System | User | Assistant | ToolMessage
"""`{"type": "user", "text": "..."}` and so on: the SDK's own messages."""


class OpenBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions`."""

    system: str | None = None
    tools: list[dict[str, Any]] = []
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    private: bool = False
    seed: int | None = None
    name: str | None = None
    max_tokens: int | None = None
    reasoning: bool = False
    record_logprobs: bool = False


class AppendBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions/{id}/messages`. `prefill`: compute their rows now."""

    messages: list[MessageBody]
    prefill: bool = False


class GenerateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions/{id}/generate`: one turn. Without `messages` the model goes on."""

    messages: list[MessageBody] = []
    stream: bool = False
    tool_choice: str = "auto"
    parallel_calls: int | None = None
    temperature: float | None = None
    stop: list[str] = []
    max_tokens: int | None = None
    logprobs: int | None = None
    seed: int | None = None
    keep_on_cancel: bool = False
    timeout: float | None = None
    schema: dict[str, Any] | None = None
    """A JSON schema that the answer must keep to."""


class ForkBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions/{id}/fork`. `at`: a mark's name or a position in tokens."""

    n: int = 1
    at: str | int | None = None


class AdoptBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions/{id}/adopt`."""

    child: str


class MarkBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions/{id}/marks`."""

    name: str


class RewindBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions/{id}/rewind`. `to`: a mark's name or a position in tokens."""

    to: str | int


class ExpectBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sessions/{id}/expect`."""

    seconds: float | None = None
    keep: Literal["soft", "firm"] = "soft"
    tool: str = ""


def session_json(session: Session) -> dict[str, Any]:
    """What a session is now."""
    return {
        "id": session.id,
        "object": "session",
        "parent": None if session.parent is None else session.parent.id,
        "tokens": session.tokens,
        "messages": len(session.messages),
        "usage": usage_json(session.usage),
        "residence": residence_json(session.residence),
        "lease": None if session.lease is None else lease_json(session.lease),
    }


def messages_json(messages: Sequence[Message]) -> list[Any]:
    """As `AppendBody` takes them."""
    return [msgspec.to_builtins(message) for message in messages]


def usage_json(usage: Usage) -> dict[str, Any]:
    """Tokens and seconds, with the sums that people ask for."""
    return {**dataclasses.asdict(usage), "resumed": usage.resumed, "computed": usage.computed}


def residence_json(residence: Residence) -> dict[str, int]:
    """Where rows are, in tokens."""
    return dataclasses.asdict(residence)


def lease_json(lease: Lease) -> dict[str, Any]:
    """What was promised."""
    return dataclasses.asdict(lease)


def reply_json(reply: Reply[Any]) -> dict[str, Any]:
    """What a turn came to."""
    return {
        "text": reply.text,
        "tool_calls": [msgspec.to_builtins(call) for call in reply.tool_calls],
        "reasoning": reply.reasoning,
        "finish_reason": reply.finish_reason,
        "usage": usage_json(reply.usage),
        "ids": list(reply.ids),
        "logprobs": list(reply.logprobs),
        "bound": reply.bound,
        "partial_call": reply.partial_call,
    }


def event_json(event: events.AnyEvent) -> dict[str, Any]:
    """A typed event with its `type`, `seq` and `session_id`."""
    found: dict[str, Any] = msgspec.to_builtins(event)
    return found
