"""OpenAI's request options as the SDK's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from agentspeed import errors
from agentspeed.chat.output import Schema
from agentspeed.sampling import Sampling
from agentspeed.server.problems import refused
from agentspeed.session import TurnOptions


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


class Drawing(Protocol):
    """A body with the options that draws go by; what is not said is the protocol's default."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    logit_bias: dict[str, float] | None


def sampling_of(body: Drawing) -> Sampling:
    """Temperature 1 and everything else off, where nothing is said. Raises `RequestProblem`."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=None if body.top_k in (None, 0, -1) else body.top_k,
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=bias_of(body.logit_bias),
    )


def bias_of(given: Mapping[str, float] | None) -> dict[int, float]:
    """`logit_bias`, whose keys are token ids written as texts. Raises `RequestProblem`."""
    if wrong := [key for key in given or () if not (key.isascii() and key.isdigit() and len(key) < 10)]:
        raise refused(f"logit_bias has the key {wrong[0]!r}; keys are token ids.", param="logit_bias")
    return {int(key): value for key, value in (given or {}).items()}


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
