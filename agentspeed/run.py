"""Carries out the agent loop on a session: turns, then their tools under a lease, until the model has answered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, cast, final

import anyio

from agentspeed import agent_loop, errors, events
from agentspeed._base.validate import check_count, check_seconds, shown
from agentspeed._core.options import TurnOptions, build_request
from agentspeed._core.session_core import SessionCore
from agentspeed.messages import Message, ToolCall, ToolMessage
from agentspeed.replies import Reply
from agentspeed.replies import Result as Result
from agentspeed.tools import Approve, Tool, ToolBatch, ToolResult, ToolSession, tools_from
from agentspeed.tools.execution import message_of
from agentspeed.turn import Turn


@final
class Run:
    """One call of `Session.run`."""

    def __init__(
        self,
        core: SessionCore,
        *,
        output: Any,
        approve: Approve | None,
        approve_at_once: bool,
        tool_data: object,
        expect: float | None,
        on_event: Callable[[events.AnyEvent], object] | None,
        options: TurnOptions,
    ) -> None:
        self._core = core
        self._output = output
        self._approve = approve
        self._approve_at_once = approve_at_once
        self._tool_data = tool_data
        self._expect = expect
        self._on_event = on_event
        self._options = options
        given = options.get("tools")
        self._tools: tuple[Tool, ...] = core.defaults.tools if given is None else tools_from(given)
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
                raise errors.InvalidRequest(f"{name} is {shown(call)}; it must be a function, or None.")
        if inspect.iscoroutinefunction(self._on_event):
            raise _on_event_is_async()
        before = self._core.usage
        steps = agent_loop.agent_loop(*prompt, max_turns=max_turns, output_retries=output_retries)
        step = next(steps)
        await self._serve_open_calls(prompt)
        while True:
            answer = await self._carry_out(step)
            try:
                step = steps.send(answer)
            except StopIteration as end:
                outcome: agent_loop.Outcome = end.value
                break
        if outcome.reason == "rejected" and self._problem is not None:
            raise self._problem
        reply = self._reply
        if reply is None or outcome.reason == "rejected":
            raise errors.InternalError("A run ended without a turn.")
        return Result(
            text=reply.text,
            output=reply.output,
            reason=self._reason(outcome.reason, reply),
            turns=outcome.turns,
            tools=tuple(self._results),
            usage=self._core.usage - before,
            reply=reply,
        )

    async def _carry_out(self, step: agent_loop.Step) -> agent_loop.Answer:
        if isinstance(step, agent_loop.Generate):
            return await self._speak(step)
        return await self._use_tools(step.calls, self._tools)

    def _reason(
        self,
        reason: Literal["answered", "max_turns"],
        reply: Reply[Any],
    ) -> Literal["answered", "forced", "cut", "max_turns"]:
        if reason == "answered" and reply.finish_reason == "max_tokens":
            return "cut"
        return "forced" if reason == "answered" and self._forced else reason

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
        self._forced = step.last and bool(self._tools) and self._choice != "none"
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
            async for event in turn:
                self._tell(event)
            if (cut := turn.cut()) is not None:
                raise cut
            try:
                self._reply = turn.result()
            except errors.OutputError as problem:
                self._problem = problem
                return agent_loop.Rejected(problem=problem.message)
        return agent_loop.Spoke(calls=self._reply.tool_calls)

    async def _use_tools(self, calls: tuple[ToolCall, ...], tools: tuple[Tool, ...]) -> agent_loop.Answer:
        """One result for each call: of `tools`, or what a `tool_call` block left that ended during the turn."""
        core = self._core
        left = core.pending.waits(calls)
        failures: list[Exception] = []

        def tell(event: events.AnyEvent) -> None:
            try:
                self._tell(core.stamp(event))
            except Exception as error:  # noqa: BLE001 - raised below: here it would cancel the other tools
                failures.append(error)

        scope = anyio.CancelScope()

        def started(call: ToolCall) -> None:
            tell(events.ToolStarted(call=call))
            if failures:  # who was told does not want it: no tool begins any more
                scope.cancel()

        def arrived(index: int, result: ToolResult) -> None:
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
        )
        messages: tuple[ToolMessage, ...] = ()
        with core.doing("a tool"):  # what it says meanwhile would come between a call and its result
            try:
                if left:
                    await core.pause(left, self._expect, self._tell)
                core.pending.served.update(call.id for call in left)
                core.branch.on_lease = lambda lease: tell(events.LeaseChanged(lease=lease))
                with scope:
                    await batch.run()
            finally:
                core.branch.on_lease = None
                core.pending.served.clear()
                for call, result in zip(left, batch.results(), strict=True):
                    core.pending.arrived(message_of(call, result))
                messages = await core.resume(calls)
        self._results.extend(messages)
        if failures:
            raise failures[0]
        if (error := batch.to_raise()) is not None:
            raise error
        return agent_loop.Ran(results=messages)

    def _tell(self, event: events.AnyEvent) -> None:
        if self._on_event is None:
            return
        told = self._on_event(event)
        if inspect.iscoroutine(told):
            told.close()
            raise _on_event_is_async()


def _on_event_is_async() -> errors.InvalidRequest:
    return errors.InvalidRequest(
        "on_event is async; it must be a plain function, which nobody waits for.",
        remedy="Put the events into a queue or a memory object stream, and await there.",
    )
