"""What a session promises about tools, on every event loop: a scripted model under the real grammar and parser."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from pydantic import BaseModel, field_validator

from agentspeed import Assistant, Session, ToolCall, ToolContext, ToolMessage, User, errors, events, tool
from agentspeed.chat.transcript import NO_RESULT
from agentspeed.testing import ScriptedEngine, say, tool_call
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


@tool
async def add(a: int, b: int) -> int:
    """Adds two numbers."""
    await anyio.sleep(0.01 * a)
    return a + b


@tool(timeout=0.05)
async def slow(city: str) -> str:
    """Takes its time."""
    await anyio.sleep(60)
    return city


@tool
def broken(city: str) -> str:
    """Never works."""
    raise LookupError(f"no {city}")


@tool(needs_approval=True)
def delete(path: str) -> str:
    """Deletes a file."""
    return f"deleted {path}"


class Even(BaseModel):
    value: int

    @field_validator("value")
    @classmethod
    def even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


def texts(s: Session) -> list[tuple[str, str]]:
    return [(type(message).__name__, message.text) for message in s.messages]


async def test_a_run_calls_tools_and_answers() -> None:
    async with ScriptedEngine([tool_call("add", a=17, b=25), "It is 42."]) as engine:
        async with engine.session(tools=[add]) as s:
            seen: list[events.AnyEvent] = []
            result = await s.run("What is 17 plus 25?", on_event=seen.append)
            assert (result.text, result.reason, result.turns) == ("It is 42.", "answered", 2)
            assert [message.text for message in result.tools] == ["42"]
            assert [type(message) for message in s.messages] == [User, Assistant, ToolMessage, Assistant]
            assert result.usage.turns == 2 and result.usage.pauses == 1 and result.usage.pause_seconds >= 0.1
            kinds = [type(event) for event in seen]
            order = [events.ToolCallReady, events.Paused, events.ToolStarted, events.ToolFinished, events.Resumed]
            assert [kind for kind in kinds if kind in order] == order
            assert [event.seq for event in seen] == sorted(event.seq for event in seen)
        assert engine.live_branches == 0


async def test_parallel_calls_run_at_once_and_their_results_are_in_call_order() -> None:
    calls = tool_call("add", a=20, b=1) + tool_call("add", a=1, b=1) + tool_call("broken", city="Oslo")
    async with ScriptedEngine([calls, "Done."]) as engine, engine.session(tools=[add, broken]) as s:
        finished: list[str] = []

        def note(event: events.AnyEvent) -> None:
            if isinstance(event, events.ToolFinished):
                finished.append(event.content)

        result = await s.run("Go.", on_event=note)
        assert [message.text for message in result.tools] == ["21", "2", "error: broken: LookupError: no Oslo"]
        assert [message.ok for message in result.tools] == [True, True, False]
        assert finished[-1] == "21"
        assert result.usage.pause_seconds < 0.5


async def test_a_tool_that_takes_too_long_is_told_to_the_model() -> None:
    script = [tool_call("slow", city="Lima"), "Too slow."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[slow]) as s:
        result = await s.run("Go.")
        assert result.tools[0].text.startswith("error: slow: no result after 0.05 s")
        assert result.text == "Too slow."


async def test_wrong_arguments_are_told_to_the_model_which_may_try_again() -> None:
    @tool
    def halve(number: Even) -> int:
        """Halves an even number."""
        return number.value // 2

    script = [tool_call("halve", number={"value": 3}), tool_call("halve", number={"value": 4}), "2"]
    async with ScriptedEngine(script) as engine, engine.session(tools=[halve]) as s:
        result = await s.run("Halve it.")
        assert "must be even" in result.tools[0].text and result.tools[1].text == "2"


@pytest.mark.parametrize(
    ("approve", "told"),
    [
        (None, "nobody was asked"),
        (lambda call: False, "not approved by the user"),
        (lambda call: 1 / 0, "the approver failed"),
        (lambda call: True, "deleted x"),
    ],
)
async def test_approval_fails_closed(approve: Any, told: str) -> None:
    script = [tool_call("delete", path="x"), "Well."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[delete]) as s:
        result = await s.run("Delete x.", approve=approve)
        assert told in result.tools[0].text


def is_result(event: events.AnyEvent) -> bool:
    return isinstance(event, events.ToolFinished)


async def test_a_cancelled_run_leaves_a_result_for_every_call_and_the_session_goes_on() -> None:
    calls = tool_call("add", a=1, b=1) + tool_call("add", a=5000, b=1)
    async with ScriptedEngine([calls, "Never mind."]) as engine, engine.session(tools=[add]) as s:
        with anyio.CancelScope() as scope:
            _ = await s.run("Go.", on_event=lambda event: scope.cancel() if is_result(event) else None)
        assert scope.cancelled_caught
        assert texts(s)[2:] == [("ToolMessage", "2"), ("ToolMessage", "error: cancelled before it finished")]
        assert (await s.generate()).text == "Never mind."


async def test_a_tool_that_is_to_raise_raises_once_its_result_is_in_the_log() -> None:
    @tool(on_error="raise")
    def fatal(city: str) -> str:
        """Never works."""
        raise LookupError(city)

    async with ScriptedEngine([tool_call("fatal", city="Rome")]) as engine, engine.session(tools=[fatal]) as s:
        with pytest.raises(errors.ToolFailed, match="Rome"):
            _ = await s.run("Go.")
        assert isinstance(s.messages[-1], ToolMessage)


async def test_the_last_turn_of_a_run_has_no_tools_to_call() -> None:
    script = [tool_call("add", a=1, b=1), tool_call("add", a=1, b=1), "Enough."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add]) as s:
        result = await s.run("Go.", max_turns=3)
        assert (result.text, result.reason) == ("Enough.", "forced")
        starts = [turn.grammar.source.split("start:")[1].splitlines()[0] for turn in engine.turns if turn.grammar]
        assert ["calls" in start for start in starts] == [True, True, False]
        with pytest.raises(errors.InvalidRequest, match="max_turns"):
            _ = await s.run("Go.", max_turns=0)


async def test_a_tool_finds_its_session_and_the_users_own_data() -> None:
    @tool
    async def whoami(ctx: ToolContext[str]) -> str:
        """Tells who asks."""
        assert isinstance(ctx.session, Session)
        async with ctx.session.fork(2) as children:
            return f"{ctx.data} in {ctx.session.id} with {len(children)}"

    async with ScriptedEngine([tool_call("whoami"), "You."]) as engine:
        async with engine.session(tools=[whoami], name="s1") as s:
            result = await s.run("Who?", tool_data="Ada")
            assert result.tools[0].text == "Ada in s1 with 2"
        assert engine.live_branches == 0


async def test_output_that_no_grammar_can_check_is_asked_for_again() -> None:
    class Answer(BaseModel):
        value: int

        @field_validator("value")
        @classmethod
        def small(cls, value: int) -> int:
            if value > 10:
                raise ValueError("must be small")
            return value

    script = ['{"value":99}', '{"value":9}', '{"value":98}', '{"value":97}']
    async with ScriptedEngine(script) as engine, engine.session() as s:
        result = await s.run("A number.", output=Answer)
        assert result.output == Answer(value=9)
        with pytest.raises(errors.OutputError, match="must be small"):
            _ = await s.run("Another.", output=Answer)


async def test_calls_can_be_served_by_hand_while_the_turn_still_runs() -> None:
    calls = tool_call("add", a=1, b=2) + tool_call("add", a=3, b=4)
    async with ScriptedEngine([say(calls, seconds=0.001), "3 and 7."]) as engine, engine.session(tools=[add]) as s:
        async with s.stream("Go.") as turn:
            async for event in turn:
                if isinstance(event, events.ToolCallReady):
                    async with s.tool_call(event.call) as pending:
                        pending.result = pending.arguments["a"] + pending.arguments["b"]
        assert (await s.generate()).text == "3 and 7."
        assert texts(s)[2:4] == [("ToolMessage", "3"), ("ToolMessage", "7")]


async def test_calls_served_by_hand_enter_in_call_order_whenever_they_end() -> None:
    calls = "".join(tool_call("add", a=number, b=0) for number in range(4))
    async with ScriptedEngine([calls, "Done."]) as engine, engine.session(tools=[add]) as s:
        reply = await s.generate("Go.")

        async def serve(call: ToolCall, number: int) -> None:
            timeout = 0.05 if number == 2 else None
            async with s.tool_call(call, timeout=timeout) as pending:
                await anyio.sleep(60 if number == 2 else 0.02 * (4 - number))
                if number == 1:
                    raise LookupError("no")
                pending.result = {"number": number}

        async with anyio.create_task_group() as group:
            for number, call in enumerate(reply.tool_calls):
                _ = group.start_soon(serve, call, number)
        assert [text for _, text in texts(s)[2:]] == [
            '{"number":0}',
            "error: add: LookupError: no",
            "error: add: no result after 0.05 s",
            '{"number":3}',
        ]
        assert s.usage.pauses == 1
        assert (await s.generate()).text == "Done."


async def test_a_call_nobody_served_gets_a_result_that_says_so() -> None:
    calls = tool_call("add", a=1, b=2) + tool_call("add", a=3, b=4)
    async with ScriptedEngine([calls, "Oh."]) as engine, engine.session(tools=[add]) as s:
        reply = await s.generate("Go.")
        _ = await s.add(ToolMessage(call_id=reply.tool_calls[0].id, name="add", text="3"))
        _ = await s.generate("And now?")
        assert [text for kind, text in texts(s) if kind == "ToolMessage"] == ["3", NO_RESULT]
        kinds = [kind for kind, _ in texts(s)]
        assert kinds == ["User", "Assistant", "ToolMessage", "ToolMessage", "User", "Assistant"]


async def test_a_tool_the_session_was_not_given_cannot_be_offered() -> None:
    async with ScriptedEngine(["x"]) as engine, engine.session(tools=[add]) as s:
        with pytest.raises(errors.InvalidRequest, match="does not describe the tools slow"):
            _ = await s.generate("Go.", tools=[slow])
