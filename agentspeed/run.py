"""Carries out the agent loop on a session: turns, then their tools under a lease, until the model has answered."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal, cast, final

import anyio

from agentspeed import agent_loop, errors, events
from agentspeed._base.validate import check_count, check_seconds, shown
from agentspeed._core.account import Account
from agentspeed._core.options import RunOptions, TurnOptions, build_request, turn_options
from agentspeed._core.session_core import SessionCore, written
from agentspeed.limits import Limits, Reached
from agentspeed.messages import Message, ToolCall, ToolMessage
from agentspeed.observing import Ending
from agentspeed.replies import Reply
from agentspeed.replies import Result as Result
from agentspeed.tools import Report, Tool, ToolBatch, ToolResult, ToolSession, tools_from
from agentspeed.tools.execution import message_of
from agentspeed.turn import Turn
from agentspeed.usage import Usage

BETWEEN: Final = "a run"
"""What a session is busy with between two steps of a run that waits for its reader."""


@final
class Run:
    """One call of `Session.run` or `Session.stream_run`."""

    def __init__(
        self,
        core: SessionCore,
        *,
        output: Any,
        options: RunOptions,
        on_event: Callable[[events.AnyEvent], object] | None,
        caught_up: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`caught_up` is waited for after every event of a turn, and before every step but the first: a run whose
        reader has gone does nothing more. Raises `InvalidRequest`."""
        max_turns, output_retries = options.get("max_turns", 16), options.get("output_retries", 1)
        approve, limits, expect = options.get("approve"), options.get("limits"), options.get("expect")
        check_count("max_turns", max_turns)
        check_count("output_retries", output_retries, least=0)
        check_seconds("expect", expect, zero=True)
        for name, call in (("on_event", on_event), ("approve", approve)):
            if call is not None and not callable(call):
                raise errors.InvalidRequest(f"{name} is {shown(call)}; it must be a function, or None.")
        if inspect.iscoroutinefunction(on_event):
            raise _on_event_is_async()
        if not isinstance(limits, Limits | None):
            raise errors.InvalidRequest(f"limits is {shown(limits)}; it must be Limits(...), or None.")
        self._core = core
        self._max_turns = max_turns
        self._output_retries = output_retries
        self._limits = limits or Limits()
        self._caught_up = caught_up
        self._output = output
        self._approve = approve
        self._approve_at_once = options.get("approve_at_once", False)
        self._tool_data = options.get("tool_data")
        self._expect = expect
        self._on_event = on_event
        self._options: TurnOptions = turn_options(options)
        given = options.get("tools")
        self._tools: tuple[Tool, ...] = core.defaults.tools if given is None else tools_from(given)
        for tool in core.defaults.tools:  # one that this run may not call yet may be handed over to
            _ = self._handed_over(tool)
        self._reply: Reply[Any] | None = None
        self._problem: errors.OutputError | None = None
        self._results: list[ToolMessage] = []
        self._choice = options.get("tool_choice", "auto")
        self._forced = False
        self._account = Account(self._limits, core.id)
        self._turns = 0
        self._limit: Reached | None = None
        """Which limit ended the run."""
        self._waits = False
        """Calls are open that nobody has decided about."""
        self._partial = ""
        """What the last turn had said."""
        self._before = core.usage

    async def drive(self, prompt: tuple[Message, ...]) -> Result[Any]:
        """Raises `OutputError` when the answer was still not an `output` after the retries, or a turn was cut inside a
        call; `TurnTimeout` when `limits.seconds` went before the first turn had ended; and what a tool with
        `on_error="raise"` raised, once every call has its result in the log."""
        watch = self._core.watch("run", content=lambda: written(prompt))
        try:
            with self._account.entered():
                result = await self._driven(prompt)
        except BaseException as error:
            watch.ended(partial(Ending, usage=self._core.usage - self._before, error=error))
            raise
        watch.ended(lambda: Ending(usage=result.usage, reason=result.reason, content=lambda: result.text))
        return result

    async def _driven(self, prompt: tuple[Message, ...]) -> Result[Any]:
        self._before = self._core.usage
        outcome: agent_loop.Outcome | None = None
        with anyio.CancelScope(deadline=self._deadline()) as scope:
            try:
                outcome = await self._steps(prompt)
            except errors.LimitReached:  # of a run around this one, whose other tools spend too
                self._limit = self._used_up()
                if self._reply is None or self._limit is None:
                    raise
        if scope.cancelled_caught:
            self._limit = self._account.out_of_time()
        if self._reply is None and self._problem is not None:
            raise self._problem
        if self._reply is None:
            raise errors.TurnTimeout(
                f"The run's limit of {self._limits.seconds} s went before its first turn had ended.",
                partial=self._partial,
                remedy="Give it more seconds or fewer tokens.",
            )
        return Result(
            text=self._reply.text,
            output=self._reply.output,
            reason=self._reason(outcome, self._reply),
            limit=None if self._limit is None else self._limit.limit,
            bound=str(self._limit or ""),
            turns=self._turns,
            tools=tuple(self._results),
            usage=self._core.usage - self._before,
            reply=self._reply,
            by_branch=self._account.by_branch,
        )

    def _deadline(self) -> float:
        seconds = self._limits.seconds
        return math.inf if seconds is None else anyio.current_time() + seconds

    async def _steps(self, prompt: tuple[Message, ...]) -> agent_loop.Outcome | None:
        """None when a limit ended it."""
        steps = agent_loop.agent_loop(*prompt, max_turns=self._max_turns, output_retries=self._output_retries)
        step = next(steps)
        await self._serve_open_calls(prompt)
        if self._waits:
            self._reply = _only_calls(self._core.open_calls())
            return None
        while True:
            answer = await self._carry_out(step)
            if self._limit is None and not self._answered(answer):
                self._limit = self._used_up()
            if self._limit is not None or self._waits:
                return None
            try:
                step = steps.send(answer)
            except StopIteration as end:
                outcome: agent_loop.Outcome = end.value
                return outcome
            if self._caught_up is not None:
                with self._core.doing(BETWEEN):
                    await self._caught_up()

    def _answered(self, answer: agent_loop.Answer) -> bool:
        return isinstance(answer, agent_loop.Spoke) and not answer.calls

    def _used_up(self) -> Reached | None:
        """The limit that leaves no token to draw."""
        bound = self._account.left(self._core.id)
        return bound[1] if bound is not None and bound[0] < 1 else None

    def _calls_used_up(self) -> Reached | None:
        bound = self._account.calls_left()
        return bound[1] if bound is not None and bound[0] < 1 else None

    async def _carry_out(self, step: agent_loop.Step) -> agent_loop.Answer:
        if isinstance(step, agent_loop.Generate):
            return await self._speak(step)
        return await self._use_tools(step.calls, self._tools)

    def _reason(
        self, outcome: agent_loop.Outcome | None, reply: Reply[Any]
    ) -> Literal["answered", "forced", "cut", "max_turns", "limit", "approval"]:
        if self._waits and self._limit is None:
            return "approval"
        if outcome is None or outcome.reason == "rejected":  # a rejected answer has been raised
            return "limit"
        if outcome.reason == "max_turns":
            return "max_turns"
        if reply.finish_reason == "max_tokens":
            return "cut"
        if self._forced and (calls := self._calls_used_up()) is not None:
            self._limit = calls
            return "limit"
        return "forced" if self._forced else "answered"

    async def _serve_open_calls(self, prompt: tuple[Message, ...]) -> None:
        """Calls that an earlier turn left are run first, unless the prompt has results or the model goes on with that
        very message."""
        core = self._core
        calls = core.open_calls()
        by_hand = any(isinstance(message, ToolMessage) for message in prompt)
        goes_on = not prompt and core.log.open_at is not None
        if core.state == "open" and core.pending.waits(calls) and not by_hand and not goes_on:
            # What the turn would be refused for is refused before any of them runs.
            _ = build_request(prompt, self._output, self._options, core.defaults, core.tags_for(prompt))
            tools = {tool.name: tool for tool in (*core.defaults.tools, *self._tools)}
            _ = await self._use_tools(calls, tuple(tools.values()))

    async def _speak(self, step: agent_loop.Generate) -> agent_loop.Answer:
        last = step.last or self._calls_used_up() is not None
        self._forced = last and bool(self._tools) and self._choice != "none"
        choice = "none" if self._forced else self._choice
        if self._choice != "none":
            self._choice = "auto"  # a forced choice is for the first turn: forced again, the run could not end
        options: TurnOptions = {**self._options, "tool_choice": choice}
        core = self._core
        core.must_be_open()
        request = build_request(
            step.messages or None, self._output, options, core.defaults, core.tags_for(step.messages)
        )
        async with Turn[Any](core, request) as turn:
            try:
                if self._on_event is None and self._caught_up is None:
                    await turn.follow()
                async for event in turn:
                    self._tell(event)
                    if self._caught_up is not None and not isinstance(event, events.TurnFinished):
                        await self._caught_up()
            finally:
                self._partial = turn.text
            self._turns += 1
            return self._spoken(turn)

    def _spoken(self, turn: Turn[Any]) -> agent_loop.Answer:
        """What the turn came to."""
        cut = turn.cut()
        if cut is not None and (turn.limit is None or self._output is not str):
            raise cut
        self._reply = None
        try:
            reply = turn.result()
        except errors.OutputError as problem:
            self._problem = problem
            return agent_loop.Rejected(problem=problem.message)
        self._reply = reply
        self._limit = turn.limit
        return agent_loop.Spoke(calls=reply.tool_calls)

    async def _use_tools(self, calls: tuple[ToolCall, ...], tools: tuple[Tool, ...]) -> agent_loop.Answer:
        """One result for each call: of `tools`, or what a `tool_call` block left that ended during the turn."""
        core = self._core
        failures: list[Exception] = []

        def tell(event: events.AnyEvent) -> None:
            try:
                self._tell(core.stamp(event))
            except Exception as error:  # noqa: BLE001 - raised below: here it would cancel the other tools
                failures.append(error)

        left = self._within_limit(core.pending.waits(calls), tell)
        scope = anyio.CancelScope()
        if failures:
            scope.cancel()

        def started(call: ToolCall) -> None:
            tell(events.ToolStarted(call=call))
            if failures:  # who was told does not want it: no tool begins any more
                scope.cancel()

        def reported(call: ToolCall, report: Report) -> None:
            tell(events.ToolProgress(call=call, done=report.done, total=report.total, message=report.message))
            if failures:
                scope.cancel()

        def arrived(index: int, result: ToolResult) -> None:
            if result.later:
                return
            core.pending.took(left[index].name, result.seconds)
            tell(events.ToolFinished(call=left[index], content=result.content, ok=result.ok, seconds=result.seconds))

        batch = ToolBatch(
            tools,
            left,
            session=cast("ToolSession", core.face),
            data=self._tool_data,
            approve=self._approve,
            approve_at_once=self._approve_at_once,
            started=started,
            arrived=arrived,
            watch=lambda call: core.watch(
                "tool", tool=call.name, call_id=call.id, content=lambda: call.arguments or "{}"
            ),
            reported=reported,
        )
        messages: tuple[ToolMessage, ...] = ()
        with core.doing("a tool"):  # what it says meanwhile would come between a call and its result
            try:
                if left:
                    await core.pause(left, self._expect, self._tell)
                core.pending.served.update(dict.fromkeys(call.id for call in left))
                core.branch.on_lease = lambda lease: tell(events.LeaseChanged(lease=lease))
                with scope:
                    await batch.run()
            finally:
                core.branch.on_lease = None
                core.pending.served.clear()
                for call, result in zip(left, batch.results(), strict=True):
                    if result.later:
                        self._waits = True
                    else:
                        core.pending.arrived(message_of(call, result))
                messages = core.stay_open() if self._waits else await core.resume(calls)
                self._results.extend(messages)
        if failures:
            raise failures[0]
        if (error := batch.to_raise()) is not None:
            raise error
        by_name = {tool.name: tool for tool in tools}
        for message in messages:
            if message.ok and message.name in by_name:
                self._hand_over(by_name[message.name])
        return agent_loop.Ran(results=messages)

    def _hand_over(self, tool: Tool) -> None:
        """The rest of the run has the tools that `tool` hands over to, if it does."""
        if (tools := self._handed_over(tool)) is not None:
            self._tools = tools
            changed: TurnOptions = {**self._options, "tools": tools}
            self._options = changed

    def _handed_over(self, tool: Tool) -> tuple[Tool, ...] | None:
        if tool.hands_over is None:
            return None
        known = {one.name: one for one in self._core.defaults.tools}
        if unknown := [name for name in tool.hands_over if name not in known]:
            raise errors.InvalidRequest(
                f"{tool.name} hands over to the tools {', '.join(unknown)}, which the session does not have.",
                remedy="Give them to Session(tools=[...]) too; a run may be offered fewer of them.",
            )
        return tuple(known[name] for name in tool.hands_over)

    def _within_limit(
        self, calls: tuple[ToolCall, ...], tell: Callable[[events.AnyEvent], None]
    ) -> tuple[ToolCall, ...]:
        """The calls among `calls` that may still be run; the others have a result that says why they were not."""
        bound = self._account.calls_left()
        most = len(calls) if bound is None else max(0, bound[0])
        run, beyond = calls[:most], calls[most:]
        self._account.take_calls(self._core.id, len(run))
        for call in beyond:
            told = f"error: {call.name}: not run, because all calls are used: {self._calls_used_up()}"
            self._core.pending.arrived(ToolMessage(call_id=call.id, name=call.name, text=told, ok=False))
            tell(events.ToolFinished(call=call, content=told, ok=False, seconds=0.0))
        return run

    def _tell(self, event: events.AnyEvent) -> None:
        if self._on_event is None:
            return
        told = self._on_event(event)
        if inspect.iscoroutine(told):
            told.close()
            raise _on_event_is_async()


def _only_calls(calls: tuple[ToolCall, ...]) -> Reply[Any]:
    return Reply(
        text="",
        new_text="",
        output=None,
        tool_calls=calls,
        reasoning="",
        finish_reason="tool_calls",
        usage=Usage(),
        ids=(),
    )


def _on_event_is_async() -> errors.InvalidRequest:
    return errors.InvalidRequest(
        "on_event is async; it must be a plain function, which nobody waits for.",
        remedy="Put the events into a queue or a memory object stream, and await there.",
    )
