"""Runs tool calls: checks arguments, asks for approval, keeps time, leaves a result for every call whatever happens.

The border where user code is called: what a tool raises becomes a result that the model reads. A cancellation of the
run passes, and a call that did not finish has a result that says so; one that only the tool met is its own failure.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar, final

import anyio
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from agentspeed.errors import BadArguments, ToolDenied, ToolError, ToolFailed, ToolTimeout, UnknownTool
from agentspeed.messages import ToolCall
from agentspeed.tools.context import ToolContext
from agentspeed.tools.signature import parameter_of
from agentspeed.tools.threads import asyncio_runs, in_thread
from agentspeed.tools.tool import Tool

_LOG: Final = logging.getLogger("agentspeed.tools")
T = TypeVar("T")
Approve: TypeAlias = Callable[[ToolCall], bool | Awaitable[bool]]
"""Asked about each call that needs approval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What goes back to the model, and the error when the call did not succeed. Half a character in `content` (a lone
    surrogate, as in odd file names) becomes a replacement character: no tokenizer takes it."""

    content: str
    ok: bool
    error: ToolError | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.content.isascii():
            whole = self.content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            object.__setattr__(self, "content", whole)


CANCELLED: Final = ToolResult(content="error: cancelled before it finished", ok=False)
"""The result of a call that was cancelled."""


async def execute(
    tool: Tool, arguments: str | Mapping[str, Any], *, context: ToolContext[Any] | None = None,
    approve: Approve | None = None,
) -> ToolResult:
    """One call. Never raises for what the tool does, only for cancellation; `ToolResult.error` says what went wrong."""
    started = anyio.current_time()
    try:
        checked = check_arguments(tool, arguments)
        await _approval(tool, checked, arguments, context, approve)
        content = await _timed(tool, checked, context)
    except ToolError as error:
        return ToolResult(content=f"error: {error}", ok=False, error=error, seconds=anyio.current_time() - started)
    return ToolResult(content=content, ok=True, seconds=anyio.current_time() - started)


def check_arguments(tool: Tool, arguments: str | Mapping[str, Any]) -> BaseModel:
    """Raises `BadArguments` with one line per problem, written for the model to correct itself by; `ToolFailed` when a
    check of the tool's own types breaks."""
    try:
        if isinstance(arguments, str):
            return tool.arguments.model_validate_json(arguments or "{}")
        return tool.arguments.model_validate(dict(arguments))
    except ValidationError as error:
        problems = "; ".join(_problem(item["loc"], item["msg"]) for item in error.errors(include_url=False))
        raise BadArguments(f"{tool.name}: wrong arguments: {problems}", tool=tool.name) from error
    except Exception as error:
        _LOG.warning("checking the arguments of tool %s raised", tool.name, exc_info=error)
        raise ToolFailed(
            f"{tool.name}: its arguments could not be checked: {type(error).__name__}: {error}", tool=tool.name
        ) from error


def content_of(value: object) -> str:
    """Text as it is; everything else as compact JSON, which is what the model was trained to read. What JSON has no
    number for is a text: "NaN", "Infinity"."""
    if isinstance(value, str):
        return value
    return to_json(value, inf_nan_mode="strings").decode()


def told_of(error: BaseException) -> str:
    """What the model is told of an exception; of a group, each exception in it: the group's own text names none."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(told_of(one) for one in error.exceptions)
    return f"{type(error).__name__}: {error}"


@final
class ToolBatch:
    """The calls of one turn, run at once, with their results in call order.

    `results()` is complete at any moment: a call that is not finished has the result "cancelled". So whoever appends
    results to a log does it in a `finally`, and the log stays well formed when the run is cancelled."""

    def __init__(
        self, tools: Sequence[Tool], calls: Sequence[ToolCall], *, session: object = None, data: object = None,
        approve: Approve | None = None, arrived: Callable[[int, ToolResult], None] | None = None,
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._calls = tuple(calls)
        self._session = session
        self._data = data
        self._approve = approve
        self._arrived = arrived
        self._results: list[ToolResult | None] = [None] * len(self._calls)

    async def run(self) -> None:
        """Ends when every call has its result."""
        async with anyio.create_task_group() as group:
            for index in range(len(self._calls)):
                _ = group.start_soon(self._one, index)

    def results(self) -> tuple[ToolResult, ...]:
        """One per call, in call order."""
        return tuple(CANCELLED if result is None else result for result in self._results)

    def to_raise(self) -> ToolError | None:
        """The first error of a tool whose author asked for it to be raised (`on_error="raise"`)."""
        for call, result in zip(self._calls, self._results, strict=True):
            tool = self._tools.get(call.name)
            if tool is not None and tool.on_error == "raise" and result is not None and result.error is not None:
                return result.error
        return None

    async def _one(self, index: int) -> None:
        call = self._calls[index]
        tool = self._tools.get(call.name)
        if tool is None:
            unknown = UnknownTool(
                f"there is no tool {call.name!r}; the tools are: {', '.join(self._tools) or 'none'}", tool=call.name
            )
            result = ToolResult(content=f"error: {unknown}", ok=False, error=unknown)
        else:
            context = ToolContext(call_id=call.id, tool=call.name, session=self._session, data=self._data)
            result = await execute(tool, call.arguments, context=context, approve=self._approve)
        self._results[index] = result
        if self._arrived is not None:
            self._arrived(index, result)


def _problem(place: tuple[int | str, ...], message: str) -> str:
    where = ".".join(str(part) for part in place)
    return f"{where}: {message}" if where else message


async def _approval(
    tool: Tool, checked: BaseModel, arguments: str | Mapping[str, Any], context: ToolContext[Any] | None,
    approve: Approve | None,
) -> None:
    """Fails closed: no approver, a predicate that raises and an answer that is not True all deny."""
    try:
        needed = await _own(_answer(tool.needs_approval, _whole(tool, checked)))
    except Exception as error:
        _LOG.warning("needs_approval of tool %s raised; the call is denied", tool.name, exc_info=error)
        raise ToolDenied(f"{tool.name}: not approved: the check failed", tool=tool.name) from error
    if needed is False:
        return
    if approve is None:
        raise ToolDenied(f"{tool.name}: not approved: nobody was asked (pass approve= to run)", tool=tool.name)
    text = arguments if isinstance(arguments, str) else content_of(arguments)
    request = ToolCall(id=context.call_id if context else "", name=tool.name, arguments=text)
    try:
        granted = await _own(_answer(approve, request))
    except Exception as error:
        _LOG.warning("approve raised for tool %s; the call is denied", tool.name, exc_info=error)
        raise ToolDenied(f"{tool.name}: not approved: the approver failed", tool=tool.name) from error
    if granted is not True:
        raise ToolDenied(f"{tool.name}: not approved by the user", tool=tool.name)


async def _answer(question: bool | Callable[[Any], object], subject: object) -> object:
    if isinstance(question, bool):
        return question
    answer = question(subject)
    return await answer if inspect.isawaitable(answer) else answer


async def _timed(tool: Tool, checked: BaseModel, context: ToolContext[Any] | None) -> str:
    with anyio.move_on_after(tool.timeout) as scope:
        return await _call(tool, checked, context)
    assert scope.cancelled_caught
    raise ToolTimeout(f"{tool.name}: no result after {tool.timeout} s", tool=tool.name)


async def _call(tool: Tool, checked: BaseModel, context: ToolContext[Any] | None) -> str:
    arguments = _passed(checked)
    if tool.context_parameter is not None:
        arguments[tool.context_parameter] = context
    try:
        return content_of(await _own(_value(tool, arguments)))
    except PydanticSerializationError as error:
        raise ToolFailed(f"{tool.name}: its result cannot be written as JSON: {error}", tool=tool.name) from error
    except (Exception, SystemExit) as error:  # a command line's parser exits where a function would raise
        _LOG.info("tool %s raised", tool.name, exc_info=error)
        raise ToolFailed(f"{tool.name}: {told_of(error)}", tool=tool.name) from error


async def _value(tool: Tool, arguments: Mapping[str, Any]) -> object:
    if tool.is_async:
        return await tool.fn(**arguments)  # type: ignore[misc]
    value = await in_thread(partial(tool.fn, **arguments))
    return await value if inspect.isawaitable(value) else value


async def _own(work: Awaitable[T]) -> T:
    """What the user's `work` gives. A cancellation that is not the caller's, of a task that `work` awaited or of an
    event loop of its own, is an error like others: let through, it would end as cancelled whatever runs beside it."""
    try:
        return await work
    except (anyio.get_cancelled_exc_class(), asyncio.CancelledError) as error:
        if isinstance(error, anyio.get_cancelled_exc_class()) and _is_cancelled():
            raise
        raise RuntimeError("what it waited for was cancelled") from error


def _is_cancelled() -> bool:
    """Whether a scope around the caller was cancelled, or its task was, which only asyncio can do."""
    if anyio.current_effective_deadline() == -math.inf:
        return True
    task = asyncio.current_task() if asyncio_runs() else None
    return task is not None and task.cancelling() > 0


def _whole(tool: Tool, checked: BaseModel) -> dict[str, Any]:
    """Every argument, for who decides about the call: a default can do as much harm as what the model wrote. A tool
    that was declared has its defaults in its schema."""
    properties = tool.schema.get("properties")
    declared = {name: given["default"] for name, given in properties.items()
                if isinstance(given, dict) and "default" in given} if isinstance(properties, dict) else {}
    named = {parameter_of(name): getattr(checked, name) for name in type(checked).model_fields}
    return {**declared, **named, **(checked.model_extra or {})}


def _passed(checked: BaseModel) -> dict[str, Any]:
    """Only what the model gave, so that the function's own defaults hold for the rest."""
    named = {parameter_of(name): getattr(checked, name) for name in type(checked).model_fields
             if name in checked.model_fields_set}
    return {**named, **(checked.model_extra or {})}
