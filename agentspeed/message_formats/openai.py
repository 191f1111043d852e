"""OpenAI's messages and tools as the SDK's, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from agentspeed.message_formats.misfit import misfit
from agentspeed.messages import Assistant, Message, System, ToolCall, ToolMessage, User

_ABOVE: Final = ("system", "developer")


def conversation_parts(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, tuple[Message, ...]]:
    """The system text and the messages below it. Raises `MessageMisfit` that names the message."""
    if not messages:
        raise misfit("messages is empty; at least one is needed.", "messages")
    system: list[str] = []
    found: list[Message] = []
    names: dict[str, str] = {}
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping):
            raise misfit(f"{where} is no object.", where)
        role = message.get("role")
        if role in _ABOVE:
            if found:
                raise misfit(
                    f"{where}: a {role} message stands above the conversation, before any other.", f"{where}.role"
                )
            system.append(said_in(message, where))
        elif role == "user":
            found.append(User(said_in(message, where)))
        elif role == "assistant":
            made = _assistant(message, where)
            names.update({call.id: call.name for call in made.tool_calls})
            found.append(made)
        elif role == "tool":
            call_id = message.get("tool_call_id")
            if not isinstance(call_id, str):
                raise misfit(f"{where} needs a tool_call_id.", f"{where}.tool_call_id")
            found.append(
                ToolMessage(
                    call_id=call_id,
                    name=names.get(call_id, ""),
                    text=text_of(message.get("content"), f"{where}.content"),
                )
            )
        else:
            raise misfit(
                f"{where}: role is {role!r}; it must be system, developer, user, assistant or tool.",
                f"{where}.role",
            )
    return ("\n\n".join(system) if system else None), tuple(found)


def said_in(message: Mapping[str, Any], where: str) -> str:
    """The content of a message that says something: a text that is empty is one, no content is none. Raises
    `MessageMisfit`."""
    content = message.get("content")
    if content is None or content == []:
        raise misfit(f"{where} has no content; give a text or a list of text parts.", f"{where}.content")
    return text_of(content, f"{where}.content")


def text_of(content: object, where: str) -> str:
    """A text, or the texts of a list of parts. Raises `MessageMisfit` for images, audio and files."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise misfit(f"{where} must be a text or a list of parts.", where)
    texts: list[str] = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise misfit(f"{where}[{place}] has type {kind!r}; this model reads text alone.", f"{where}[{place}].type")
        texts.append(text)
    return "".join(texts)


def _assistant(message: Mapping[str, Any], where: str) -> Assistant:
    calls: list[ToolCall] = []
    for place, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise misfit(f"{where}.tool_calls[{place}] needs a function with a name.", f"{where}.tool_calls[{place}]")
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str) or not isinstance(call.get("id"), str):
            raise misfit(
                f"{where}.tool_calls[{place}] needs an id, and arguments as a text of JSON.",
                f"{where}.tool_calls[{place}]",
            )
        calls.append(ToolCall(id=call["id"], name=function["name"], arguments=arguments))
    reasoning = message.get("reasoning_content") or ""
    if not isinstance(reasoning, str):
        raise misfit(f"{where}.reasoning_content must be a text.", f"{where}.reasoning_content")
    return Assistant(text_of(message.get("content"), f"{where}.content"), tuple(calls), reasoning)


def tool_definitions(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """What `declared` takes, from `{"type": "function", "function": {...}}` or the flat form of `/v1/responses`."""
    found: list[dict[str, Any]] = []
    for place, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise misfit(
                f"tools[{place}] has type {kind!r}; functions are the tools that there are here.",
                f"tools[{place}].type",
            )
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            raise misfit(f"tools[{place}].function must be an object.", f"tools[{place}].function")
        schema = function.get("parameters")
        found.append(
            {
                "name": function.get("name"),
                "description": function.get("description") or "",
                "parameters": {"type": "object", "properties": {}} if schema is None else schema,
            }
        )
    return found


def from_messages(system: str | None, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation as OpenAI's list."""
    found: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for message in messages:
        match message:
            case System(text=text):
                found.append({"role": "system", "content": text})
            case User(text=text):
                found.append({"role": "user", "content": text})
            case Assistant(text=text, tool_calls=calls):
                said: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
                if calls:
                    said["tool_calls"] = [call_of(call) for call in calls]
                found.append(said)
            case ToolMessage(call_id=call_id, text=text):
                found.append({"role": "tool", "tool_call_id": call_id, "content": text})
    return found


def call_of(call: ToolCall) -> dict[str, Any]:
    """One call in OpenAI's form."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
