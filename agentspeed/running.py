"""Carries out the agent loop on a session: turns, then their tools under a lease, until the model has answered."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, final

import anyio
import msgspec

from agentspeed import errors, events, loop
from agentspeed.asking import TurnOptions
from agentspeed.checking import check_count, check_seconds
from agentspeed.front import transcript
from agentspeed.messages import Message, ToolCall, ToolMessage
from agentspeed.tools import CANCELLED, Approve, OnError, Tool, ToolBatch, ToolResult, content_of, tools_from
from agentspeed.turn import Reply
from agentspeed.usage import Usage

if TYPE_CHECKING:
    from agentspeed.session import Session

T = TypeVar("T")
_LOG = logging.getLogger("agentspeed.session")
_FIRST_PAUSE_SECONDS = 1.0
"""What is expected of a tool that never ran in this session."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Generic[T]):
    """What a run came to: its last turn, and what all of it cost."""

    text: str
    output: T
    """The text, or what `output=` asked for."""
    reason: Literal["answered", "max_turns"]
    turns: int
    tools: tuple[ToolMessage, ...]
    """Every tool result, in the order in which the model read them."""
    usage: Usage
    reply: Reply[T]


@final
class Run:
    """One call of `Session.run`."""

    def __init__(
        self, session: Session, *, output: Any, approve: Approve | None, tool_data: object, expect: float | None,
        on_event: Callable[[events.AnyEvent], None] | None, options: TurnOptions,
    ) -> None:
        self._session = session
        self._output = output
        self._approve = approve
        self._tool_data = tool_data
        self._expect = expect
        self._on_event = on_event
        self._options = options
        given = options.get("tools")
        self._tools: tuple[Tool, ...] = session.tools if given is None else tools_from(given)
        self._reply: Reply[Any] | None = None
        self._problem: errors.OutputError | None = None
        self._results: list[ToolMessage] = []
        self._choice = options.get("tool_choice", "auto")

    async def drive(self, prompt: tuple[Message, ...], max_turns: int, output_retries: int) -> Result[Any]:
        """Raises `OutputError` when the answer was still not an `output` after the retries, and what a tool with
        `on_error="raise"` raised, once every call has its result in the log."""
        check_count("max_turns", max_turns)
        check_count("output_retries", output_retries, least=0)
        check_seconds("expect", self._expect, zero=True)
        for name, call in (("on_event", self._on_event), ("approve", self._approve)):
            if call is not None and not callable(call):
                raise errors.InvalidRequest(f"{name} is {call!r}; it must be a function, or None.")
        before = self._session.usage
        steps = loop.agent_loop(*prompt, max_turns=max_turns, output_retries=output_retries)
        step = next(steps)
        while True:
            answer = await (self._speak(step) if isinstance(step, loop.Generate) else self._use_tools(step.calls))
            try:
                step = steps.send(answer)
            except StopIteration as end:
                outcome: loop.Outcome = end.value
                break
        if outcome.reason == "rejected" and self._problem is not None:
            raise self._problem
        reply = self._reply
        if reply is None or outcome.reason == "rejected":
            raise errors.InternalError("A run ended without a turn.")
        return Result(text=reply.text, output=reply.output, reason=outcome.reason, turns=outcome.turns,
                      tools=tuple(self._results), usage=self._session.usage - before, reply=reply)

    async def _speak(self, step: loop.Generate) -> loop.Answer:
        choice = "none" if step.last and self._tools else self._choice
        self._choice = "auto"  # a forced choice is for the first turn: forced again, the run could not end
        options: TurnOptions = {**self._options, "tool_choice": choice}
        async with self._session.stream(step.messages or None, output=self._output, **options) as turn:
            async for event in turn:
                self._tell(event)
            try:
                self._reply = turn.result()
            except errors.OutputError as problem:
                self._problem = problem
                return loop.Rejected(problem=problem.message)
        return loop.Spoke(calls=self._reply.tool_calls)

    async def _use_tools(self, calls: tuple[ToolCall, ...]) -> loop.Answer:
        session = self._session
        await pause(session, calls, self._expect, self._tell)
        for call in calls:
            self._tell(session._stamped(events.ToolStarted(call=call)))

        def arrived(index: int, result: ToolResult) -> None:
            session._seconds_of[calls[index].name] = result.seconds
            self._tell(session._stamped(events.ToolFinished(call=calls[index], content=result.content, ok=result.ok,
                                                            seconds=result.seconds)))

        batch = ToolBatch(self._tools, calls, session=session, data=self._tool_data, approve=self._approve,
                          arrived=arrived)
        messages: tuple[ToolMessage, ...] = ()
        try:
            with session._doing("a tool"):  # what it says meanwhile would come between a call and its result
                await batch.run()
        finally:
            messages = tuple(_message(call, result) for call, result in zip(calls, batch.results(), strict=True))
            messages = await resume(session, messages)
        self._results.extend(messages)
        if (error := batch.to_raise()) is not None:
            raise error
        return loop.Ran(results=messages)

    def _tell(self, event: events.AnyEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)


async def pause(session: Session, calls: tuple[ToolCall, ...], expect: float | None,
                tell: Callable[[events.AnyEvent], None]) -> None:
    """The branch is held under a lease for as long as the slowest of the tools took the last time."""
    seconds = expect
    if seconds is None:
        seconds = max(session._seconds_of.get(call.name, _FIRST_PAUSE_SECONDS) for call in calls)
    lease = await session.expect(seconds, tool=calls[0].name)
    session._paused_at = anyio.current_time()
    tell(session._stamped(events.Paused(lease=lease)))


async def resume(session: Session, results: tuple[ToolMessage, ...]) -> tuple[ToolMessage, ...]:
    """The results enter the log whatever ended the tools: a call without one could not be rendered. Gives them as the
    model reads them."""
    if session._paused_at is not None:
        seconds, session._paused_at = anyio.current_time() - session._paused_at, None
        session.usage = session.usage + Usage(pauses=1, pause_seconds=seconds)
        session._resumes = True
    with anyio.CancelScope(shield=True):
        if session._state == "open":
            results = await _write(session, results)
    return results


async def _write(session: Session, results: tuple[ToolMessage, ...]) -> tuple[ToolMessage, ...]:
    """Results that leave no room in the context give way to an error, the longest first, until the rest fits.

    Raises `ContextOverflow` when not even the errors do."""
    told = list(results)
    by_length = sorted(range(len(told)), key=lambda index: len(told[index].text))
    while True:
        try:
            _ = await session.add(*told)
        except errors.ContextOverflow:
            if not by_length:
                raise
            index = by_length.pop()
            size, name = len(told[index].text), told[index].name
            text = f"error: {name}: its result of {size} characters does not fit into the context"
            told[index] = msgspec.structs.replace(told[index], text=text, ok=False)
        else:
            return tuple(told)


def _message(call: ToolCall, result: ToolResult) -> ToolMessage:
    return ToolMessage(call_id=call.id, name=call.name, text=result.content, ok=result.ok)


# ---- one call by hand -----------------------------------------------------------------------------------------------
_NOTHING = object()


@final
class Pending:
    """A call that is being served: set `result`."""

    def __init__(self, call: ToolCall) -> None:
        self.call = call
        self.name = call.name
        self.result: object = _NOTHING

    @property
    def arguments(self) -> dict[str, Any]:
        """As the model wrote them. Raises `BadArguments` when they are not a JSON object."""
        try:
            found = json.loads(self.call.arguments or "{}")
        except ValueError as error:
            raise errors.BadArguments(f"{self.name}: its arguments are not JSON: {error}", tool=self.name) from error
        if not isinstance(found, dict):
            raise errors.BadArguments(f"{self.name}: its arguments are not an object", tool=self.name)
        return found


@asynccontextmanager
async def tool_call(session: Session, call: ToolCall, *, timeout: float | None, expect: float | None,
                    on_error: OnError) -> AsyncIterator[Pending]:
    """See `Session.tool_call`."""
    pending = Pending(call)
    if session._busy is None and call.id not in [one.id for one in transcript.unanswered(session._mirror)]:
        raise errors.InvalidRequest(f"Session {session.id} has no open call {call.id!r} of {call.name}.",
                                    remedy="Serve the calls of its last reply, before anything else is said.")
    if session._busy is None and session._paused_at is None:
        await pause(session, (call,), expect, lambda event: None)
    started = anyio.current_time()
    outcome = CANCELLED
    try:
        with anyio.move_on_after(timeout) as scope:
            yield pending
        if scope.cancelled_caught:
            raise errors.ToolTimeout(f"{call.name}: no result after {timeout} s", tool=call.name)
        if pending.result is _NOTHING:
            raise errors.ToolFailed(f"{call.name}: its block gave no result", tool=call.name)
        outcome = ToolResult(content=content_of(pending.result), ok=True)
    except Exception as error:
        told = error if isinstance(error, errors.ToolError) else f"{call.name}: {type(error).__name__}: {error}"
        outcome = ToolResult(content=f"error: {told}", ok=False)
        _LOG.info("tool call %s failed", call.name, exc_info=error)
        if on_error == "raise":
            raise
    finally:
        session._seconds_of[call.name] = anyio.current_time() - started
        session._results[call.id] = _message(call, replace(outcome, seconds=session._seconds_of[call.name]))
        await _deliver(session)


async def _deliver(session: Session) -> None:
    """Once every call of the turn has its result, they enter the log in call order. While the turn still runs they
    wait for its end."""
    if session._busy is not None:
        return
    calls = transcript.unanswered(session._mirror)
    if calls and all(call.id in session._results for call in calls):
        _ = await resume(session, tuple(session._results.pop(call.id) for call in calls))
