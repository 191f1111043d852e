"""Whole lists of messages as other SDKs write them, by the name of their form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from agentspeed._base.validate import shown
from agentspeed.errors import InvalidRequest
from agentspeed.message_formats import anthropic, openai
from agentspeed.messages import Message

Format: TypeAlias = Literal["openai", "anthropic"]


def read(messages: Sequence[Mapping[str, Any]], form: Format) -> tuple[str | None, tuple[Message, ...]]:
    """The system text, if the list has it, and the messages. Raises `MessageMisfit` that names the message."""
    match form:
        case "openai":
            return openai.conversation_parts(messages)
        case "anthropic":
            return anthropic.conversation_parts(None, messages)
        case _:
            raise _unknown(form)


def write(system: str | None, messages: Sequence[Message], form: Format) -> list[dict[str, Any]]:
    """The list; Anthropic's has no system text in it."""
    match form:
        case "openai":
            return openai.from_messages(system, messages)
        case "anthropic":
            return anthropic.from_messages(messages)
        case _:
            raise _unknown(form)


def _unknown(form: object) -> InvalidRequest:
    return InvalidRequest(f"format is {shown(form)}; it must be 'openai' or 'anthropic'.")
