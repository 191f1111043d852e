"""Carries out the agent loop on a session: turns, then their tools under a lease, until the model has answered."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Literal, TypeVar, final, get_args
from weakref import WeakKeyDictionary

import anyio
import msgspec

from agentspeed import errors, events, loop
from agentspeed.asking import TurnOptions, ask
from agentspeed.checking import check_count, check_seconds
from agentspeed.front import transcript
from agentspeed.messages import Message, ToolCall, ToolMessage
from agentspeed.session import Session, _beside
from agentspeed.tools import CANCELLED, Approve, OnError, Tool, ToolBatch, ToolResult, content_of, tools_from
from agentspeed.tools.running import told_of
from agentspeed.turn import Reply, Turn
from agentspeed.usage import Usage
from agentspeed.whole import whole

T = TypeVar("T")
_LOG = logging.getLogger("agentspeed.session")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Generic[T]):
    """What a run came to: its last turn, and what all of it cost."""

    text: str
    output: T
    """The text, or what `output=` asked for."""
    reason: Literal["answered", "forced", "cut", "max_turns"]
    """"answered": by itself. "forced": in the last of `max_turns` turns, in which it could call no tool any more.
    "cut": `max_tokens` ended its answer. "max_turns": that last turn was a call, in a session without tools."""
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
        on_event: Callable[[events.AnyEvent], object] | None, options: TurnOptions,
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
        self._forced = False

    async def drive(self, prompt: tuple[Message, ...], max_turns: int, output_retries: int) -> Result[Any]:
        """Raises `OutputError` when the answer was still not an `output` after the retries, or a turn was cut inside a
        call; and what a tool with `on_error="raise"` raised, once every call has its result in the log."""
        check_count("max_turns", max_turns)
        check_count("output_retries", output_retries, least=0)
        check_seconds("expect", self._expect, zero=True)
        for name, call in (("on_event", self._on_event), ("approve", self._approve)):
            if call is not None and not callable(call):
                raise errors.InvalidRequest(f"{name} is {call!r}; it must be a function, or None.")
        if inspect.iscoroutinefunction(self._on_event):
            raise _on_event_is_async()
        before = self._session.usage
        steps = loop.agent_loop(*prompt, max_turns=max_turns, output_retries=output_retries)
        step = next(steps)
        await self._serve_open_calls(prompt)
        while True:
            answer = await self._carry_out(step)
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
        return Result(text=reply.text, output=reply.output, reason=self._reason(outcome.reason, reply),
                      turns=outcome.turns, tools=tuple(self._results), usage=self._session.usage - before, reply=reply)

    async def _carry_out(self, step: loop.Step) -> loop.Answer:
        if isinstance(step, loop.Generate):
            return await self._speak(step)
        return await self._use_tools(step.calls, self._tools)

    def _reason(self, reason: Literal["answered", "max_turns"], reply: Reply[Any],
                ) -> Literal["answered", "forced", "cut", "max_turns"]:
        if reason == "answered" and reply.finish_reason == "max_tokens":
            return "cut"
        return "forced" if reason == "answered" and self._forced else reason

    async def _serve_open_calls(self, prompt: tuple[Message, ...]) -> None:
        """Calls that an earlier turn left are run first, unless the prompt has results or the model goes on with that
        very message."""
        session = self._session
        calls = transcript.unanswered(session._mirror)
        by_hand = any(isinstance(message, ToolMessage) for message in prompt)
        goes_on = not prompt and session._mirror.open_at is not None
        if session._state == "open" and session._pausing.waits(calls) and not by_hand and not goes_on:
            # What the turn would be refused for is refused before any of them runs.
            _ = ask(prompt, self._output, self._options, session.defaults, session.codec)
            tools = {tool.name: tool for tool in (*session.tools, *self._tools)}
            _ = await self._use_tools(calls, tuple(tools.values()))

    async def _speak(self, step: loop.Generate) -> loop.Answer:
        self._forced = step.last and bool(self._tools) and self._choice != "none"
        choice = "none" if self._forced else self._choice
        if self._choice != "none":
            self._choice = "auto"  # a forced choice is for the first turn: forced again, the run could not end
        options: TurnOptions = {**self._options, "tool_choice": choice}
        async with self._session.stream(step.messages or None, output=self._output, **options) as turn:
            async for event in turn:
                self._tell(event)
            if (cut := turn._cut()) is not None:
                raise cut
            try:
                self._reply = turn.result()
            except errors.OutputError as problem:
                self._problem = problem
                return loop.Rejected(problem=problem.message)
        return loop.Spoke(calls=self._reply.tool_calls)

    async def _use_tools(self, calls: tuple[ToolCall, ...], tools: tuple[Tool, ...]) -> loop.Answer:
        """One result for each call: of `tools`, or what a `tool_call` block left that ended during the turn."""
        session = self._session
        left = session._pausing.waits(calls)
        failures: list[Exception] = []

        def tell(event: events.AnyEvent) -> None:
            try:
                self._tell(session._stamped(event))
            except Exception as error:  # noqa: BLE001 - raised below: here it would cancel the other tools
                failures.append(error)

        def arrived(index: int, result: ToolResult) -> None:
            session._pausing.took(left[index].name, result.seconds)
            tell(events.ToolFinished(call=left[index], content=result.content, ok=result.ok, seconds=result.seconds))

        batch = ToolBatch(tools, left, session=session, data=self._tool_data, approve=self._approve, arrived=arrived)
        messages: tuple[ToolMessage, ...] = ()
        with session._doing("a tool"):  # what it says meanwhile would come between a call and its result
            try:
                if left:
                    await pause(session, left, self._expect, self._tell)
                for call in left:
                    self._tell(session._stamped(events.ToolStarted(call=call)))
                session._branch.on_lease = lambda lease: tell(events.LeaseChanged(lease=lease))
                await batch.run()
            finally:
                session._branch.on_lease = None
                for call, result in zip(left, batch.results(), strict=True):
                    session._pausing.arrived(_message(call, result))
                messages = await resume(session, session._pausing.take(calls))
        self._results.extend(messages)
        if failures:
            raise failures[0]
        if (error := batch.to_raise()) is not None:
            raise error
        return loop.Ran(results=messages)

    def _tell(self, event: events.AnyEvent) -> None:
        if self._on_event is None:
            return
        told = self._on_event(event)
        if inspect.iscoroutine(told):
            told.close()
            raise _on_event_is_async()


def _on_event_is_async() -> errors.InvalidRequest:
    return errors.InvalidRequest("on_event is async; it must be a plain function, which nobody waits for.",
                                 remedy="Put the events into a queue or a memory object stream, and await there.")


async def pause(session: Session, calls: tuple[ToolCall, ...], expect: float | None,
                tell: Callable[[events.AnyEvent], None]) -> None:
    """The branch is held under a lease. The pause is as long as the slowest of the tools, so that is the one the engine
    learns it of. A hint is only what somebody knows: a last time would hide what the engine learnt. Whoever asks has
    made the session busy."""
    lease = await session._branch.expect(expect, "soft", session._pausing.slowest(calls))
    session._pausing.begin()
    tell(session._stamped(events.Paused(lease=lease)))


async def resume(session: Session, results: tuple[ToolMessage, ...]) -> tuple[ToolMessage, ...]:
    """The results enter the log whatever ended the tools: a call without one could not be rendered. Gives them as the
    model reads them. Whoever asks has made the session busy."""
    if (seconds := session._pausing.end()) is not None:
        session.usage = session.usage + Usage(pauses=1, pause_seconds=seconds)
    return await whole(lambda: _write(session, results)) if session._state == "open" else results


async def _write(session: Session, results: tuple[ToolMessage, ...]) -> tuple[ToolMessage, ...]:
    """Results that leave no room in the context give way to an error, the longest first, until the rest fits.

    Raises `ContextOverflow` when not even the errors do."""
    told = list(results)
    by_length = sorted(range(len(told)), key=lambda index: len(told[index].text))
    while True:
        try:
            await _append(session, told)
        except errors.ContextOverflow:
            if not by_length:
                raise
            index = by_length.pop()
            size, name = len(told[index].text), told[index].name
            text = f"error: {name}: its result of {size} characters does not fit into the context"
            told[index] = msgspec.structs.replace(told[index], text=text, ok=False)
        else:
            return tuple(told)


async def _append(session: Session, results: list[ToolMessage]) -> None:
    mirror, codec = session._branch.mirror, session.codec
    await session._revise(results)
    await session._branch.append(lambda: _beside(results, lambda: transcript.write(mirror, codec, results)))
    session._moves += 1


def _message(call: ToolCall, result: ToolResult) -> ToolMessage:
    return ToolMessage(call_id=call.id, name=call.name, text=result.content, ok=result.ok)


# ---- one call by hand -----------------------------------------------------------------------------------------------
_NOTHING: Final = object()
_SERVING: Final = "a tool call"
_served: WeakKeyDictionary[Session, set[str]] = WeakKeyDictionary()
"""The ids of each session's calls whose blocks are open."""


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
    _check_serving(session, call, timeout, expect, on_error)
    pending = Pending(call)
    try:
        with _block(session, call) as first:
            if first and not session._pausing.on:
                await pause(session, transcript.unanswered(session._mirror), expect, lambda event: None)
            started = anyio.current_time()
            outcome = CANCELLED
            try:
                with anyio.move_on_after(timeout) as scope:
                    yield pending
                if scope.cancelled_caught:
                    raise errors.ToolTimeout(f"{call.name}: no result after {timeout} s", tool=call.name)
                outcome = ToolResult(content=_content(pending), ok=True)
            except Exception as error:
                told = error if isinstance(error, errors.ToolError) else f"{call.name}: {told_of(error)}"
                outcome = ToolResult(content=f"error: {told}", ok=False)
                _LOG.info("tool call %s failed", call.name, exc_info=error)
                if on_error == "raise":
                    raise
            finally:
                seconds = anyio.current_time() - started
                session._pausing.took(call.name, seconds)
                session._pausing.arrived(_message(call, replace(outcome, seconds=seconds)))
    finally:
        await _deliver(session)


def _check_serving(session: Session, call: ToolCall, timeout: float | None, expect: float | None,
                   on_error: OnError) -> None:
    if not isinstance(call, ToolCall):
        raise errors.InvalidRequest(f"call is {call!r}; it must be a ToolCall.",
                                    remedy="Serve what reply.tool_calls or a ToolCallReady event holds.")
    check_seconds("timeout", timeout)
    check_seconds("expect", expect, zero=True)
    if on_error not in get_args(OnError):
        raise errors.InvalidRequest(f"on_error is {on_error!r}; it must be 'return' or 'raise'.")
    busy = session._busy
    if busy not in (None, _SERVING) and not isinstance(busy, Turn):
        session._must_be_idle()
    calls = busy._calls if isinstance(busy, Turn) else transcript.unanswered(session._mirror)
    if call.id not in [one.id for one in calls]:
        raise errors.InvalidRequest(f"Session {session.id} has no open call {call.id!r} of {call.name}.",
                                    remedy="Serve the calls of its last reply, before anything else is said.")
    if call.id in _served.get(session, ()):
        raise errors.InvalidRequest(f"The call {call.id!r} of {call.name} is being served already.")


@contextmanager
def _block(session: Session, call: ToolCall) -> Iterator[bool]:
    """While blocks are open the session is busy: whatever it said would come between a call and its result. Gives
    whether this is the first of them."""
    served = _served.setdefault(session, set())
    served.add(call.id)
    first = session._busy is None
    go_on_serving(session)
    try:
        yield first
    finally:
        served.discard(call.id)
        if not served and session._busy == _SERVING:
            session._busy = None


def go_on_serving(session: Session) -> None:
    """Also at the end of a turn during which blocks were opened that are open still."""
    if session._busy is None and _served.get(session):
        session._busy = _SERVING


def _content(pending: Pending) -> str:
    if pending.result is _NOTHING:
        raise errors.ToolFailed(f"{pending.name}: its block gave no result", tool=pending.name)
    try:
        return content_of(pending.result)
    except ValueError as error:  # no JSON type, or a value that holds itself
        raise errors.ToolFailed(f"{pending.name}: its result cannot be written as JSON: {error}",
                                tool=pending.name) from error


async def _deliver(session: Session) -> None:
    """Once every call of the turn has its result, they enter the log in call order. While the turn still runs, or
    another block is open, they wait for its end."""
    if session._busy is not None or session._state != "open":
        return
    calls = transcript.unanswered(session._mirror)
    if calls and not session._pausing.waits(calls):
        with session._doing(_SERVING):
            _ = await resume(session, session._pausing.take(calls))
