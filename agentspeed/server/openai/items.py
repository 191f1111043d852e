"""Items of `/v1/responses` as messages, and a reply as output items."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from agentspeed.message_formats.misfit import misfit
from agentspeed.message_formats.openai import said_in, text_of
from agentspeed.messages import Assistant, Message, ToolCall, ToolMessage, User


@final
@dataclass(slots=True)
class _Reading:
    """What was read so far; the model's items gather until an item of another speaker."""

    system: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        if self.texts or self.calls:
            self.messages.append(Assistant("".join(self.texts), tuple(self.calls)))
            self.texts, self.calls = [], []


def read_items(
    given: str | Sequence[Any], earlier: Sequence[Message] = (), where: str = "input"
) -> tuple[list[str], tuple[Message, ...]]:
    """System texts and messages of `given`, which follow `earlier`. Raises `MessageMisfit` that names the item."""
    reading = _Reading(messages=[])
    for message in earlier:
        if isinstance(message, Assistant):
            reading.names.update({call.id: call.name for call in message.tool_calls})
    if isinstance(given, str):
        return [], (User(given),)
    for place, item in enumerate(given):
        _read(reading, item, f"{where}[{place}]", begun=bool(earlier))
    reading.close()
    return reading.system, tuple(reading.messages)


def _read(reading: _Reading, item: Any, where: str, *, begun: bool) -> None:
    if not isinstance(item, Mapping):
        raise misfit(f"{where} must be an object.", where)
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        role = item.get("role")
        if role == "assistant":
            reading.texts.append(text_of(item.get("content"), f"{where}.content"))
            return
        text = said_in(item, where)
        reading.close()
        if role in ("system", "developer"):
            if reading.messages or begun:
                raise misfit(f"{where}: a {role} message stands above the conversation.", where)
            reading.system.append(text)
        elif role == "user":
            reading.messages.append(User(text))
        else:
            raise misfit(f"{where}.role is {role!r}.", f"{where}.role")
    elif kind == "function_call":
        call_id, name, arguments = item.get("call_id"), item.get("name"), item.get("arguments", "{}")
        if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
            raise misfit(f"{where} needs call_id, name and arguments, all texts.", where)
        reading.names[call_id] = name
        reading.calls.append(ToolCall(id=call_id, name=name, arguments=arguments))
    elif kind == "function_call_output":
        reading.close()
        call_id = item.get("call_id")
        if not isinstance(call_id, str):
            raise misfit(f"{where} needs a call_id.", f"{where}.call_id")
        reading.messages.append(
            ToolMessage(
                call_id=call_id,
                name=reading.names.get(call_id, ""),
                text=text_of(item.get("output"), f"{where}.output"),
            )
        )
    elif kind != "reasoning":  # what the model thought is in the log that it thought it in, or in none
        raise misfit(
            f"{where} has type {kind!r}; messages, function calls and their outputs are read here.",
            f"{where}.type",
        )


def message_item(text: str, *, status: str = "completed", number: str | None = None) -> dict[str, Any]:
    """What the model said."""
    content = [] if status == "in_progress" else [text_part(text)]
    return {"type": "message", "id": number or new_id("msg"), "role": "assistant", "status": status, "content": content}


def text_part(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The one part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def reasoning_item(text: str, *, status: str = "completed", number: str | None = None) -> dict[str, Any]:
    """What the model thought before it answered."""
    content = [] if status == "in_progress" else [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": number or new_id("rs"), "summary": [], "content": content, "status": status}


def call_item(
    call_id: str, name: str, arguments: str, *, status: str = "completed", number: str | None = None
) -> dict[str, Any]:
    """One call."""
    return {
        "type": "function_call",
        "id": number or new_id("fc"),
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def new_id(kind: str, begins: str = "") -> str:
    """An id as these endpoints write it."""
    return f"{kind}_{begins}{secrets.token_hex(16)}"
