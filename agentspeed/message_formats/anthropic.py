"""Anthropic's messages and tools as the SDK's, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agentspeed.message_formats.misfit import misfit
from agentspeed.messages import Assistant, Message, System, ToolCall, ToolMessage, User


def conversation_parts(system: object, messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, tuple[Message, ...]]:
    """The system text and the messages. Raises `MessageMisfit` that names the block."""
    names: dict[str, str] = {}
    found: list[Message] = []
    if not messages:
        raise misfit("messages is empty; at least one is needed.", "messages")
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        role, blocks = message.get("role"), _blocks(message.get("content"), where)
        if role == "user":
            found += _user(blocks, where, names)
        elif role == "assistant":
            made = _assistant(blocks, where)
            names.update({call.id: call.name for call in made.tool_calls})
            found.append(made)
        else:
            raise misfit(f"{where}.role is {role!r}; it must be user or assistant.", f"{where}.role")
    return _system(system), tuple(found)


def _blocks(content: object, where: str) -> Sequence[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and content:
        return content
    raise misfit(f"{where} has no content; give a text or a list of blocks.", f"{where}.content")


def _system(system: object) -> str | None:
    if system is None or isinstance(system, str):
        return system or None
    if isinstance(system, list):
        return "\n\n".join(_text(block, f"system.{place}") for place, block in enumerate(system)) or None
    raise misfit("system must be a text or a list of text blocks.", "system")


def _text(block: object, where: str) -> str:
    if isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    kind = block.get("type") if isinstance(block, Mapping) else block
    raise misfit(f"{where} has type {kind!r}; this model reads text alone.", where)


def _user(blocks: Sequence[Any], where: str, names: Mapping[str, str]) -> list[Message]:
    """Results come first, as the calls they answer do; text after them is one message."""
    found: list[Message] = []
    texts: list[str] = []
    for place, block in enumerate(blocks):
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            call_id = block.get("tool_use_id")
            if not isinstance(call_id, str):
                raise misfit(f"{where}.content.{place} needs a tool_use_id.", f"{where}.content.{place}")
            content = block.get("content") or ""
            text = (
                content
                if isinstance(content, str)
                else "".join(_text(part, f"{where}.content.{place}.content.{at}") for at, part in enumerate(content))
            )
            found.append(
                ToolMessage(
                    call_id=call_id, name=names.get(call_id, ""), text=text, ok=not block.get("is_error", False)
                )
            )
        else:
            texts.append(_text(block, f"{where}.content.{place}"))
    if texts:
        found.append(User("".join(texts)))
    return found


def _assistant(blocks: Sequence[Any], where: str) -> Assistant:
    texts: list[str] = []
    calls: list[ToolCall] = []
    reasoning: list[str] = []
    for place, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_use":
            if not isinstance(block.get("id"), str) or not isinstance(block.get("name"), str):
                raise misfit(f"{where}.content.{place} needs an id and a name.", f"{where}.content.{place}")
            calls.append(
                ToolCall(
                    id=block["id"], name=block["name"], arguments=json.dumps(block.get("input", {}), ensure_ascii=False)
                )
            )
        elif kind == "thinking":
            reasoning.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(_text(block, f"{where}.content.{place}"))
    return Assistant("".join(texts), tuple(calls), "".join(reasoning))


def tool_definitions(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Definitions as the SDK's `declared_tool` takes them."""
    return [
        {
            "name": tool.get("name"),
            "description": tool.get("description") or "",
            "parameters": tool.get("input_schema", {"type": "object", "properties": {}}),
        }
        for tool in tools or ()
    ]


def from_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as Anthropic's list; results of one turn are blocks of one user message, with the text after them."""
    found: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]]
    for message in messages:
        match message:
            case User(text=text) | System(text=text):
                role, blocks = "user", [{"type": "text", "text": text}]
            case Assistant(text=text, tool_calls=calls):
                role, blocks = "assistant", [{"type": "text", "text": text}] if text or not calls else []
                blocks += [
                    {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
                    for call in calls
                ]
            case ToolMessage(call_id=call_id, text=text, ok=ok):
                role, blocks = "user", [{"type": "tool_result", "tool_use_id": call_id, "content": text}]
                if not ok:
                    blocks[0]["is_error"] = True
        if found and found[-1]["role"] == role == "user":
            found[-1]["content"] += blocks
        else:
            found.append({"role": role, "content": blocks})
    return found
