"""OpenAI's message list as a conversation, and its options as the SDK's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from agentspeed import errors
from agentspeed.asking import TurnOptions
from agentspeed.front.output import Schema
from agentspeed.messages import Assistant, Message, ToolCall, ToolMessage, User
from agentspeed.sampling import Sampling
from agentspeed.server.problems import refused

_ABOVE: Final = ("system", "developer")


def conversation_parts(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, tuple[Message, ...]]:
    """The system text and the messages below it. Raises `RequestProblem` that names the message."""
    if not messages:
        raise refused("messages is empty; at least one is needed.", param="messages")
    system: list[str] = []
    found: list[Message] = []
    names: dict[str, str] = {}
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping):
            raise refused(f"{where} is no object.", param=where)
        role = message.get("role")
        if role in _ABOVE:
            if found:
                raise refused(
                    f"{where}: a {role} message stands above the conversation, before any other.", param=f"{where}.role"
                )
            system.append(text_of(message.get("content"), f"{where}.content"))
        elif role == "user":
            found.append(User(text_of(message.get("content"), f"{where}.content")))
        elif role == "assistant":
            made = _assistant(message, where)
            names.update({call.id: call.name for call in made.tool_calls})
            found.append(made)
        elif role == "tool":
            call_id = message.get("tool_call_id")
            if not isinstance(call_id, str):
                raise refused(f"{where} needs a tool_call_id.", param=f"{where}.tool_call_id")
            found.append(
                ToolMessage(
                    call_id=call_id,
                    name=names.get(call_id, ""),
                    text=text_of(message.get("content"), f"{where}.content"),
                )
            )
        else:
            raise refused(
                f"{where}: role is {role!r}; it must be system, developer, user, assistant or tool.",
                param=f"{where}.role",
            )
    return ("\n\n".join(system) if system else None), tuple(found)


def text_of(content: object, where: str) -> str:
    """A text, or the texts of a list of parts. Raises `RequestProblem` for images, audio and files."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(f"{where} must be a text or a list of parts.", param=where)
    texts: list[str] = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise refused(
                f"{where}[{place}] has type {kind!r}; this model reads text alone.", param=f"{where}[{place}].type"
            )
        texts.append(text)
    return "".join(texts)


def _assistant(message: Mapping[str, Any], where: str) -> Assistant:
    calls: list[ToolCall] = []
    for place, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise refused(
                f"{where}.tool_calls[{place}] needs a function with a name.", param=f"{where}.tool_calls[{place}]"
            )
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str) or not isinstance(call.get("id"), str):
            raise refused(
                f"{where}.tool_calls[{place}] needs an id, and arguments as a text of JSON.",
                param=f"{where}.tool_calls[{place}]",
            )
        calls.append(ToolCall(id=call["id"], name=function["name"], arguments=arguments))
    reasoning = message.get("reasoning_content") or ""
    if not isinstance(reasoning, str):
        raise refused(f"{where}.reasoning_content must be a text.", param=f"{where}.reasoning_content")
    return Assistant(text_of(message.get("content"), f"{where}.content"), tuple(calls), reasoning)


def tool_definitions(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """What `declared` takes, from `{"type": "function", "function": {...}}` or the flat form of `/v1/responses`."""
    found: list[dict[str, Any]] = []
    for place, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise refused(
                f"tools[{place}] has type {kind!r}; functions are the tools that there are here.",
                param=f"tools[{place}].type",
            )
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            raise refused(f"tools[{place}].function must be an object.", param=f"tools[{place}].function")
        schema = function.get("parameters")
        found.append(
            {
                "name": function.get("name"),
                "description": function.get("description") or "",
                "parameters": {"type": "object", "properties": {}} if schema is None else schema,
            }
        )
    return found


def choice_of(tool_choice: object) -> str:
    """OpenAI's tool_choice as the SDK's. Raises `RequestProblem`."""
    if tool_choice is None:
        return "auto"
    if isinstance(tool_choice, str) and tool_choice in ("auto", "none", "required"):
        return tool_choice
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function":
        name = tool_choice.get("function", tool_choice).get("name")
        if isinstance(name, str):
            return name
    raise refused(
        f"tool_choice is {tool_choice!r}; it must be 'auto', 'none', 'required' or name a function.",
        param="tool_choice",
    )


def output_of(response_format: object, where: str = "response_format") -> Any:
    """What `output=` is: plain text, any JSON object, or a schema's. Raises `RequestProblem`."""
    if response_format is None:
        return str
    if not isinstance(response_format, Mapping):
        raise refused(f"{where} must be an object.", param=where)
    kind = response_format.get("type")
    if kind == "text":
        return str
    if kind == "json_object":
        schema: object = {"type": "object"}
    elif kind == "json_schema":
        inner = response_format.get("json_schema", response_format)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
    else:
        raise refused(f"{where}.type is {kind!r}; it must be text, json_object or json_schema.", param=f"{where}.type")
    if not isinstance(schema, Mapping):
        raise refused(f"{where} needs a schema.", param=where)
    try:
        return Schema.json(schema)
    except errors.InputError as error:
        raise refused(str(error), param=where, code="schema_unsupported") from error


def sampling_of(
    *, temperature: float | None, top_p: float | None, top_k: int | None = None, min_p: float | None = None
) -> Sampling:
    """What is not said is the protocol's default: temperature 1, everything else off."""
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=None if top_k in (None, 0, -1) else top_k,
        top_p=1.0 if top_p is None else top_p,
        min_p=0.0 if min_p is None else min_p,
    )


def stops_of(stop: object) -> tuple[str, ...]:
    """One stop text or several. Raises `RequestProblem`."""
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (None,)
    if len(stops) > 16 or any(not isinstance(text, str) or not text for text in stops):
        raise refused("stop must be a text or at most 16 of them, none empty.", param="stop")
    return tuple(text for text in stops if isinstance(text, str))


def bounded_tokens(asked: int | None, default: int | None, most: int | None, param: str) -> TurnOptions:
    """max_tokens of the turn. Raises `RequestProblem` for what this server does not give."""
    if asked is not None and asked < 1:
        raise refused(f"{param} is {asked}; it must be at least 1.", param=param)
    if asked is not None and most is not None and asked > most:
        raise refused(f"{param} is {asked}; this server gives at most {most}.", param=param)
    wanted = asked if asked is not None else default if default is not None else most
    return {} if wanted is None else {"max_tokens": wanted}


FINISH: Final = {
    "stop_id": "stop",
    "grammar_end": "stop",
    "stop_string": "stop",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
}
"""The SDK's reasons as OpenAI's."""
