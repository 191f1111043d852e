"""Runs tool calls: checks arguments, asks for approval, keeps time, leaves a result for every call whatever happens.

The border where user code is called: what a tool raises becomes a result that the model reads. A cancellation of the
run passes, and a call that did not finish has a result that says so; one that only the tool met is its own failure.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar, cast, final

import anyio
import anyio.from_thread
import anyio.lowlevel
from msgspec.structs import replace
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from agentspeed._base.validate import shown
from agentspeed.errors import BadArguments, ToolDenied, ToolError, ToolFailed, ToolTimeout, UnknownTool
from agentspeed.messages import ToolCall, ToolMessage
from agentspeed.observing import Ending, Watched
from agentspeed.tools.approval import Approval, Approve
from agentspeed.tools.context import Report, ToolContext, ToolSession
from agentspeed.tools.signature import parameter_of
from agentspeed.tools.threads import asyncio_runs, in_thread
from agentspeed.tools.tool import Tool

_LOG: Final = logging.getLogger("agentspeed.tools")
T = TypeVar("T")
_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 8.0
"""Seconds before a tool that raised is called again: twice as long each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What goes back to the model, and the error when the call did not succeed. Half a character in `content` (a lone
    surrogate, as in odd file names) becomes a replacement character: no tokenizer takes it."""

    content: str
    ok: bool
    error: ToolError | None = None
    seconds: float = 0.0
    later: bool = False
    """Nobody has decided whether it may run: the call stays open, and the model is told nothing."""

    def __post_init__(self) -> None:
        if not self.content.isascii():
            whole = self.content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            object.__setattr__(self, "content", whole)


def message_of(call: ToolCall, result: ToolResult) -> ToolMessage:
    """The result as the log holds it."""
    return ToolMessage(call_id=call.id, name=call.name, text=result.content, ok=result.ok)


CANCELLED: Final = ToolResult(content="error: cancelled before it finished", ok=False)
"""The result of a call that was cancelled."""


async def execute(
    tool: Tool,
    arguments: str | Mapping[str, Any],
    *,
    context: ToolContext[Any] | None = None,
    approve: Approve | None = None,
    questions: Question | None = None,
    started: Callable[[str | Mapping[str, Any]], None] | None = None,
) -> ToolResult:
    """One call. Never raises for what the tool does, only for cancellation; `ToolResult.error` says what went wrong.

    `questions` holds the question to `approve` back until it is this call's turn. `started` is told the arguments when
    the tool begins to run, which a call that is wrong or denied never does."""
    began = anyio.current_time()
    try:
        checked = check_arguments(tool, arguments)
        approval = await _approval(tool, checked, context, approve, questions)
        if approval.arguments is not None:
            checked = _changed(tool, approval.arguments)
        if started is not None:
            started(arguments if approval.arguments is None else approval.arguments)
            await anyio.lowlevel.checkpoint_if_cancelled()  # who was told may have cancelled it
        content = await _timed(tool, checked, context)
    except _Later:
        return ToolResult(content=f"error: {tool.name}: nobody has decided about it", ok=False, later=True)
    except ToolError as error:
        return ToolResult(content=f"error: {error}", ok=False, error=error, seconds=anyio.current_time() - began)
    if approval.arguments is not None:
        content = f"(run with other arguments, as the user decided: {_written(tool, checked)})\n{content}"
    return ToolResult(content=content, ok=True, seconds=anyio.current_time() - began)


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
            f"{tool.name}: its arguments could not be checked: {told_of(error)}", tool=tool.name
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
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as broken:  # noqa: BLE001 - whatever `__str__` does: the model is told of the tool's error
        name = type(error).__name__
        _LOG.warning("an exception of type %s raised %s when it was to be written", name, type(broken).__name__)
        return f"{type(error).__name__} (its text cannot be had)"


_GRANTED: Final = Approval(allow=True)


@final
class Questions:
    """The questions to an approver about one batch, one after the other, in call order."""

    def __init__(self, calls: int) -> None:
        self._settled = [anyio.Event() for _ in range(calls)]

    def of(self, index: int) -> Question:
        """The turn of one call."""
        return Question(self._settled, index)

    def settled(self, index: int) -> None:
        """There is nothing to ask about this call any more."""
        self._settled[index].set()


@final
class Question:
    """The turn of one call to be asked about."""

    def __init__(self, settled: Sequence[anyio.Event], index: int) -> None:
        self._earlier, self._own = settled[:index], settled[index]

    async def wait(self) -> None:
        """Until every earlier call was asked about or needs no question."""
        for event in self._earlier:
            await event.wait()

    def done(self) -> None:
        self._own.set()


@final
class ToolBatch:
    """The calls of one turn, run at once, with their results in call order.

    `results()` is complete at any moment: a call that is not finished has the result "cancelled". So the caller appends
    results to its log in a `finally`, and the log stays well formed when the run is cancelled."""

    def __init__(
        self,
        tools: Sequence[Tool],
        calls: Sequence[ToolCall],
        *,
        session: ToolSession | None = None,
        data: object = None,
        approve: Approve | None = None,
        approve_at_once: bool = False,
        started: Callable[[ToolCall], None] | None = None,
        arrived: Callable[[int, ToolResult], None] | None = None,
        watch: Callable[[ToolCall], Watched] | None = None,
        reported: Callable[[ToolCall, Report], None] | None = None,
    ) -> None:
        """`approve` is asked about one call after the other, in call order, unless `approve_at_once`. `started` is told
        each call that runs, with the arguments it runs with where the approver changed them; `reported` what it says
        meanwhile; `arrived` each result."""
        self._tools = {tool.name: tool for tool in tools}
        self._calls = tuple(calls)
        self._session = session
        self._data = data
        self._approve = approve
        self._questions = None if approve_at_once else Questions(len(self._calls))
        self._started = started
        self._arrived = arrived
        self._watch = watch
        self._reported = reported
        self._thread = threading.get_ident()
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
        if self._watch is None:
            await self._carried_out(index)
            return
        watched = self._watch(self._calls[index])
        try:
            await self._carried_out(index)
        finally:
            result = self._results[index] or CANCELLED
            watched.ended(
                lambda: Ending(
                    reason="ok" if result.ok else "later" if result.later else "error",
                    error=result.error,
                    content=lambda: result.content,
                )
            )

    async def _carried_out(self, index: int) -> None:
        call = self._calls[index]
        tool = self._tools.get(call.name)
        if tool is None:
            unknown = UnknownTool(
                f"there is no tool {call.name!r}; the tools are: {', '.join(self._tools) or 'none'}", tool=call.name
            )
            result = ToolResult(content=f"error: {unknown}", ok=False, error=unknown)
        else:
            # A batch without a session has none to give: who runs tools by hand writes tools that need none.
            context = ToolContext(
                call_id=call.id,
                tool=call.name,
                session=cast("ToolSession", self._session),
                data=self._data,
                reports=partial(self._tell_report, index),
            )
            result = await execute(
                tool,
                call.arguments,
                context=context,
                approve=self._approve,
                questions=None if self._questions is None else self._questions.of(index),
                started=partial(self._tell_started, index),
            )
        if self._questions is not None:
            self._questions.settled(index)
        self._results[index] = result
        if self._arrived is not None:
            self._arrived(index, result)

    def _tell_report(self, index: int, report: Report) -> None:
        """From a tool's own thread, on the event loop; of a tool that was given up, nobody hears."""
        if threading.get_ident() != self._thread:
            anyio.from_thread.run_sync(self._tell_report, index, report)
        elif self._reported is not None and self._results[index] is None:
            self._reported(self._calls[index], report)

    def _tell_started(self, index: int, arguments: str | Mapping[str, Any]) -> None:
        if self._started is not None:
            text = arguments if isinstance(arguments, str) else content_of(arguments)
            self._started(replace(self._calls[index], arguments=text))


def _problem(place: tuple[int | str, ...], message: str) -> str:
    where = ".".join(str(part) for part in place)
    return f"{where}: {message}" if where else message


async def _approval(
    tool: Tool,
    checked: BaseModel,
    context: ToolContext[Any] | None,
    approve: Approve | None,
    questions: Question | None,
) -> Approval:
    """Fails closed: no approver, a predicate that raises and an answer that is no clear yes all deny."""
    try:
        needed = await _own(_answer(tool.needs_approval, _whole(tool, checked)))
    except Exception as error:
        _LOG.warning("needs_approval of tool %s raised; the call is denied", tool.name, exc_info=error)
        raise ToolDenied(f"{tool.name}: not approved: the check failed", tool=tool.name) from error
    if needed is False:
        return _GRANTED
    if approve is None:
        raise ToolDenied(f"{tool.name}: not approved: nobody was asked (pass approve= to run)", tool=tool.name)
    request = ToolCall(id=context.call_id if context else "", name=tool.name, arguments=_written(tool, checked))
    if questions is not None:
        await questions.wait()
    try:
        answer = await _own(_answer(approve, request))
    except Exception as error:
        _LOG.warning("approve raised for tool %s; the call is denied", tool.name, exc_info=error)
        raise ToolDenied(f"{tool.name}: not approved: the approver failed", tool=tool.name) from error
    finally:
        if questions is not None:
            questions.done()
    if answer is True:
        return _GRANTED
    if isinstance(answer, Approval) and answer.allow is False and answer.later is True:
        raise _Later
    if not isinstance(answer, Approval) or answer.allow is not True:
        reason = answer.reason if isinstance(answer, Approval) else ""
        raise ToolDenied(f"{tool.name}: not approved by the user{f': {reason}' if reason else ''}", tool=tool.name)
    return answer


class _Later(Exception):
    """The approver does not decide now."""


def _changed(tool: Tool, arguments: Mapping[str, Any]) -> BaseModel:
    """The arguments that the approver gave, checked as the model's are: what does not fit them denies the call."""
    try:
        if not isinstance(arguments, Mapping):
            raise TypeError(f"they are {shown(arguments)}, not a mapping")
        return check_arguments(tool, content_of(arguments))
    except (ToolError, ValueError, TypeError) as error:
        _LOG.warning("approve gave tool %s arguments that do not fit; the call is denied", tool.name, exc_info=error)
        raise ToolDenied(
            f"{tool.name}: not approved: the approver's own arguments do not fit: {told_of(error)}", tool=tool.name
        ) from error


def _written(tool: Tool, checked: BaseModel) -> str:
    """All arguments as JSON. A default that is no JSON value, which no model could write either, is shown as Python
    writes it."""
    return to_json(_whole(tool, checked), inf_nan_mode="strings", fallback=shown).decode()


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
    attempt = 0
    while True:
        try:
            return content_of(await _own(_value(tool, arguments)))
        except PydanticSerializationError as error:
            raise ToolFailed(f"{tool.name}: its result cannot be written as JSON: {error}", tool=tool.name) from error
        except (Exception, SystemExit) as error:  # a command line's parser exits where a function would raise
            _LOG.info("tool %s raised", tool.name, exc_info=error)
            if attempt == tool.retries:
                told = str(error) if isinstance(error, ToolError) else told_of(error)  # ours is written for the model
                raise ToolFailed(f"{tool.name}: {told}", tool=tool.name) from error
        await anyio.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
        attempt += 1


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
    declared = (
        {name: given["default"] for name, given in properties.items() if isinstance(given, dict) and "default" in given}
        if isinstance(properties, dict)
        else {}
    )
    named = {parameter_of(name): getattr(checked, name) for name in type(checked).model_fields}
    given = {**declared, **named, **(checked.model_extra or {})}
    order = [name for name in properties if name in given] if isinstance(properties, dict) else []
    return {name: given[name] for name in (*order, *given)}


def _passed(checked: BaseModel) -> dict[str, Any]:
    """Only what the model gave, so that the function's own defaults hold for the rest."""
    named = {
        parameter_of(name): getattr(checked, name)
        for name in type(checked).model_fields
        if name in checked.model_fields_set
    }
    return {**named, **(checked.model_extra or {})}
