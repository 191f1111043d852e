"""One tool: a function, what a model is told about it, and what may happen when it runs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, final, overload

from pydantic import BaseModel, ConfigDict, create_model

from agentspeed._base.validate import is_number, is_whole, shown
from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.grammars import check_expressible
from agentspeed.tools.schema import Json, Schema
from agentspeed.tools.signature import read_signature

OnError = Literal["return", "raise"]
"""A tool's error: told to the model alone, or raised to you as well."""
Predicate: TypeAlias = Callable[[Mapping[str, Any]], bool | Awaitable[bool]]
NeedsApproval: TypeAlias = bool | Predicate
"""Whether a call must be approved: always, never, or by its arguments."""

_CHOICES: Final = ("auto", "required", "none")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Tool:
    """Made by `tool` or `tools_from`; the schema is what the model sees, `arguments` is what checks it."""

    name: str
    description: str
    schema: Schema
    fn: Callable[..., object]
    arguments: type[BaseModel]
    is_async: bool
    context_parameter: str | None = None
    timeout: float | None = None
    on_error: OnError = "return"
    needs_approval: NeedsApproval = field(default=False, compare=False)
    retries: int = 0
    """How often the function is called again after it raised, before the model is told."""
    hands_over: tuple[str, ...] | None = None
    """Names of the tools that the rest of the run may call once this one has succeeded; None: those that it could call
    before. `agentspeed.hand_off` makes such tools."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise TypeError(f"tool name {self.name!r}: use letters, digits, '_' and '-', at most 64 of them.")
        if self.name in _CHOICES:
            raise TypeError(f"tool name {self.name!r} is a tool_choice; give the tool another with @tool(name=...).")
        if not isinstance(self.description, str):
            raise TypeError(f"tool {self.name}: description is {self.description!r}; it must be a text.")
        if self.timeout is not None and not (is_number(self.timeout) and 0 < self.timeout < math.inf):
            raise ValueError(
                f"tool {self.name}: timeout is {shown(self.timeout)}; it must be seconds above 0, or None."
            )
        if self.on_error not in ("return", "raise"):
            raise ValueError(f"tool {self.name}: on_error is {self.on_error!r}; it must be 'return' or 'raise'.")
        if not is_whole(self.retries) or self.retries < 0:
            raise ValueError(f"tool {self.name}: retries is {shown(self.retries)}; it must be a number, 0 or more.")
        if not isinstance(self.needs_approval, bool) and not callable(self.needs_approval):
            raise ValueError(
                f"tool {self.name}: needs_approval is {self.needs_approval!r}; it must be True, False or a function of "
                "the arguments."
            )

    def __repr__(self) -> str:
        parameters = self.schema.get("properties")
        return f"<Tool {self.name}({', '.join(parameters) if isinstance(parameters, dict) else ''})>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A decorated function stays callable from Python as it was."""
        return self.fn(*args, **kwargs)

    def definition(self) -> dict[str, Json]:
        """What a system message says about the tool."""
        return {"name": self.name, "description": self.description, "parameters": self.schema}


@overload
def tool(fn: Callable[..., object], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float | None = None,
    on_error: OnError = "return",
    needs_approval: NeedsApproval = False,
    retries: int = 0,
) -> Callable[[Callable[..., object]], Tool]: ...
def tool(
    fn: Callable[..., object] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float | None = None,
    on_error: OnError = "return",
    needs_approval: NeedsApproval = False,
    retries: int = 0,
) -> Tool | Callable[[Callable[..., object]], Tool]:
    """Makes a tool of a typed function: `@tool`, or `@tool(timeout=5)`.

    `retries`: a function that raised is called again so often, after 0.5 s, 1 s, 2 s ... and 8 s at most, before the
    model is told. `timeout` is of all attempts together, and ends them: what took too long may still be running. What
    was approved once is not asked about again."""

    def make(function: Callable[..., object]) -> Tool:
        _check_function(function, "tool")
        read = read_signature(function, name=name, description=description)
        return Tool(
            name=read.name,
            description=read.description,
            schema=read.schema,
            fn=function,
            arguments=read.arguments,
            is_async=read.is_async,
            context_parameter=read.context_parameter,
            timeout=timeout,
            on_error=on_error,
            needs_approval=needs_approval,
            retries=retries,
        )

    return make if fn is None else make(fn)


def declared_tool(definition: Mapping[str, Any], fn: Callable[..., object]) -> Tool:
    """A tool that comes as `{"name", "description", "parameters"}` instead of a typed function: from a server, a
    catalogue, another framework. The grammar keeps arguments to the schema; `fn` is given them by name.

    Raises TypeError when the definition is not whole, or no grammar can hold its schema."""
    if not isinstance(definition, Mapping):
        raise TypeError(f"tool definition {definition!r}: it must be a dict with a 'name' and 'parameters'.")
    name, schema = definition.get("name"), definition.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(name, str) or not isinstance(schema, Mapping):
        raise TypeError(f"tool definition {dict(definition)!r}: it needs a 'name' and an object 'parameters'.")
    if not callable(fn):
        raise TypeError(f"tool {name}: fn is {fn!r}; it must be a function that takes the arguments by name.")
    _check_function(fn, f"tool {name}")
    try:
        compiled = check_expressible(schema)
    except SchemaUnsupported as error:
        raise TypeError(f"tool {name}: {error}") from error
    if compiled.kinds != {"object"}:
        raise TypeError(f"tool {name}: its parameters are not an object; write them as properties of one.")
    return Tool(
        name=name,
        description=definition.get("description") or "",
        schema=dict(schema),
        fn=fn,
        arguments=create_model(f"{name}_arguments", __config__=ConfigDict(extra="allow")),
        is_async=inspect.iscoroutinefunction(inspect.unwrap(fn)),
    )


def tools_from(given: Iterable[Tool | Callable[..., object]]) -> tuple[Tool, ...]:
    """Tools in the order given. Raises TypeError for what is not a typed function, and for a name used twice."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"tools is {given!r}; it must be a list of functions with type hints, or Tool objects.")
    made: dict[str, Tool] = {}
    for item in given:
        if isinstance(item, Tool):
            one = item
        else:
            _check_function(item, "tools")
            one = tool(item)
        if one.name in made:
            raise TypeError(f"tools: two tools are named {one.name!r}; give one of them @tool(name=...).")
        made[one.name] = one
    return tuple(made.values())


def _check_function(given: object, argument: str) -> None:
    if inspect.isclass(given) or not callable(given):
        raise TypeError(f"{argument}: {given!r} is not a function; pass functions with type hints, or Tool objects.")
    whole = inspect.unwrap(given)
    if inspect.isgeneratorfunction(whole) or inspect.isasyncgenfunction(whole):
        raise TypeError(
            f"{argument}: {given!r} is a generator, and a call has one result; return it, and say how far it is with "
            "ToolContext.report."
        )
