"""Reads what a model must know about a function off its signature: hints, defaults and docstring.

A parameter that cannot be described exactly is an error at definition time, with its name in the text; nothing is
left for the model to guess.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

import griffe
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from pydantic.fields import FieldInfo
from pydantic_core import SchemaError

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.context import ToolContext
from agentspeed.tools.grammars import check_expressible
from agentspeed.tools.schema import Json, Schema

_DOCSTRING_STYLES: Final = ("google", "numpy", "sphinx")
_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_SET_APART: Final = "="
_STRICT: Final = ConfigDict(extra="forbid", protected_namespaces=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A function as a model sees it, and the pydantic model that checks arguments for it."""

    name: str
    description: str
    schema: Schema
    arguments: type[BaseModel]
    context_parameter: str | None
    is_async: bool


def read_signature(fn: Callable[..., object], *, name: str | None = None, description: str | None = None) -> Signature:
    """Raises TypeError naming the function and the parameter that cannot be described to a model."""
    whole, bound = _without_partials(fn)
    called: str = name or getattr(whole, "__name__", "") or type(whole).__name__
    summary, documented = read_docstring(inspect.getdoc(whole) or "")
    target = inspect.unwrap(whole)
    hints = _hints(target, called)
    context_parameter: str | None = None
    fields: dict[str, Any] = {}
    for parameter in _parameters(fn, called):
        if parameter.name in bound:
            continue
        hint = _hint_of(parameter, hints, called)
        if _is_context(hint):
            if context_parameter is not None:
                raise TypeError(f"tool {called}(): {parameter.name!r} is a second ToolContext; one is enough.")
            context_parameter = parameter.name
            continue
        fields[field_of(parameter.name)] = (hint, _field(parameter, hint, documented.get(parameter.name)))
    model, schema = _schema_of(called, fields)
    return Signature(
        name=called,
        description=description or summary,
        schema=schema,
        arguments=model,
        context_parameter=context_parameter,
        is_async=inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__),
    )


def field_of(parameter: str) -> str:
    """The field that checks a parameter. A pydantic model has methods and settings of its own (`copy`, `model_config`):
    a parameter so named gets a field whose name no parameter can have, with the parameter's name as its alias."""
    return parameter + _SET_APART if hasattr(BaseModel, parameter) else parameter


def parameter_of(field: str) -> str:
    """The parameter that a field of `Signature.arguments` checks."""
    return field.removesuffix(_SET_APART)


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The prose before the first section, and the description of each parameter, in any of three common styles."""
    if not text:
        return "", {}
    best: tuple[str, dict[str, str]] | None = None
    log = logging.getLogger("griffe")
    was_disabled, log.disabled = log.disabled, True
    try:
        for style in _DOCSTRING_STYLES:
            read = _read_style(text, style)
            if best is None or len(read[1]) > len(best[1]):
                best = read
    finally:
        log.disabled = was_disabled
    return best or (text.strip(), {})


def _read_style(text: str, style: Any) -> tuple[str, dict[str, str]]:
    prose: list[str] = []
    parameters: dict[str, str] = {}
    for section in griffe.Docstring(text).parse(style):
        if section.kind is griffe.DocstringSectionKind.text:
            prose.append(str(section.value).strip())
        elif section.kind is griffe.DocstringSectionKind.parameters:
            parameters.update((item.name, " ".join(str(item.description).split())) for item in section.value)
    return " ".join(" ".join(prose).split()), parameters


def strip_titles(schema: Json) -> Json:
    """The schema without the titles that pydantic adds: they repeat the names and cost tokens in every prompt."""
    if isinstance(schema, list):
        return [strip_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    stripped: Schema = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str):
            continue
        if key in ("properties", "$defs") and isinstance(value, dict):
            stripped[key] = {name: strip_titles(inner) for name, inner in value.items()}
        elif key in ("enum", "const", "default", "examples"):
            stripped[key] = value
        else:
            stripped[key] = strip_titles(value)
    return stripped


def _without_partials(fn: Callable[..., object]) -> tuple[Callable[..., object], frozenset[str]]:
    """What `functools.partial` was made of, and the names it has given a value: these are not the model's to choose."""
    bound: set[str] = set()
    while isinstance(fn, partial):
        bound |= fn.keywords.keys()
        fn = fn.func
    return fn, frozenset(bound)


def _parameters(fn: Callable[..., object], called: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError as error:
        raise TypeError(f"tool {called}(): Python has no signature of it; call it from a typed function.") from error


def _hints(target: Callable[..., object], called: str) -> dict[str, Any]:
    if not inspect.isroutine(target):
        target = type(target).__call__
    try:
        return get_type_hints(target, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"tool {called}(): the type {error.name!r} cannot be found; define or import it at module level."
        ) from error


def _hint_of(parameter: inspect.Parameter, hints: Mapping[str, Any], called: str) -> Any:
    name = parameter.name
    if parameter.kind in _VARIADIC:
        raise TypeError(f"tool {called}(): {parameter} takes any number of values; name each parameter.")
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise TypeError(f"tool {called}(): {name!r} is positional-only, but a model passes names; remove the '/'.")
    if name not in hints and name in ("self", "cls"):
        raise TypeError(
            f"tool {called}(): {name!r} shows a method; decorate a function, or make the tool of the bound method: "
            f"tool(an_object.{called})."
        )
    if name not in hints:
        raise TypeError(f"tool {called}(): parameter {name!r} has no type hint; write e.g. `{name}: str`.")
    if name.startswith("_"):
        raise TypeError(f"tool {called}(): parameter {name!r} starts with an underscore; rename it.")
    return hints[name]


def _is_context(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _is_context(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        given = [one for one in get_args(hint) if one is not NoneType]
        return len(given) == 1 and _is_context(given[0])
    return hint is ToolContext or get_origin(hint) is ToolContext


def _field(parameter: inspect.Parameter, hint: Any, documented: str | None) -> FieldInfo:
    options: dict[str, Any] = {}
    if described := documented or _text_in_annotated(hint):
        options["description"] = described
    if field_of(parameter.name) != parameter.name and not _has_alias(hint):
        options["alias"] = parameter.name
    default = ... if parameter.default is inspect.Parameter.empty else parameter.default
    field: FieldInfo = Field(default=default, **options)
    return field


def _has_alias(hint: Any) -> bool:
    notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return any(isinstance(note, FieldInfo) and note.alias is not None for note in notes)


def _text_in_annotated(hint: Any) -> str | None:
    """`Annotated[int, "how many"]` describes as well as `Annotated[int, Field(description="how many")]`."""
    if get_origin(hint) is Annotated:
        return next((note for note in get_args(hint)[1:] if isinstance(note, str)), None)
    return None


def _schema_of(called: str, fields: dict[str, Any]) -> tuple[type[BaseModel], Schema]:
    for name, field in fields.items():
        _ = _describe(called, {name: field}, parameter=parameter_of(name))
    return _describe(called, fields, parameter="")


def _describe(called: str, fields: dict[str, Any], *, parameter: str) -> tuple[type[BaseModel], Schema]:
    try:
        model: type[BaseModel] = create_model(f"{called}_arguments", __config__=_STRICT, **fields)
        schema = strip_titles(model.model_json_schema())
        if not isinstance(schema, dict):
            raise TypeError(f"tool {called}(): its parameters are not an object.")
        _ = check_expressible(schema, sets=True)
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema) as error:
        raise TypeError(
            f"tool {called}(): parameter {parameter!r} has a type that JSON cannot carry; use str, int, float, bool, "
            f"list, dict[str, ...], Literal, an Enum, a dataclass or a model. ({error.message.splitlines()[0]})"
        ) from error
    except SchemaUnsupported as error:
        raise TypeError(f"tool {called}(): parameter {parameter!r}: {error}") from error
    except (PydanticUserError, SchemaError, NameError, TypeError) as error:
        raise TypeError(f"tool {called}(): parameter {parameter!r} cannot be described: {error}") from error
    schema.pop("additionalProperties", None)
    return model, schema
