"""Messages as values: what a session's history is made of."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call as the model wrote it; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class System(msgspec.Struct, frozen=True, tag="system"):
    """What stands above the conversation."""

    text: str


class User(msgspec.Struct, frozen=True, tag="user"):
    """What you say."""

    text: str


class Assistant(msgspec.Struct, frozen=True, tag="assistant"):
    """What the model (or you, for few-shot examples) said. `raw` is the text with its tags, exactly as in the log."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    raw: str = ""


class ToolMessage(msgspec.Struct, frozen=True, tag="tool", kw_only=True):
    """The result of one call."""

    call_id: str
    name: str
    text: str
    ok: bool = True


Message: TypeAlias = System | User | Assistant | ToolMessage
"""What a history is made of."""
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
"""Who speaks, as chat templates name it."""


def role_of(message: Message) -> Role:
    """The chat template's name for who speaks."""
    match message:
        case System():
            return "system"
        case User():
            return "user"
        case Assistant():
            return "assistant"
        case ToolMessage():
            return "tool"
