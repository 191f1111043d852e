"""A call that is served by hand: the session waits for it, wrong input is named, and every end leaves a result."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from agentspeed import Session, System, ToolCall, ToolMessage, errors, events, tool
from agentspeed.chat.transcript import NO_RESULT
from agentspeed.testing import ScriptedEngine, say, tool_call

pytestmark = pytest.mark.anyio
CALL = tool_call("f", a=1)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def f(a: int) -> int:
    """Doubles."""
    return 2 * a


def results(s: Session) -> list[str]:
    return [message.text for message in s.messages if type(message).__name__ == "ToolMessage"]


# ---- the session waits ----------------------------------------------------------------------------------------------
async def test_a_session_says_nothing_while_a_call_is_being_served() -> None:
    async with ScriptedEngine([CALL, "2."]) as engine, engine.session(tools=[f]) as s:
        (call,) = (await s.generate("go")).tool_calls
        async with s.tool_call(call) as pending:
            assert "held" in repr(s)
            for refused in (s.generate("inside"), s.add("inside"), s.run("inside"), s.expect(1), s.rewind(0)):
                with pytest.raises(errors.SessionBusy, match="a tool call has not ended"):
                    _ = await refused  # type: ignore[func-returns-value]
            async with s.fork() as (child,):
                assert child.tokens == s.tokens
            pending.result = 2
        assert results(s) == ["2"]
        assert (await s.generate()).text == "2."


async def test_several_calls_are_served_at_once_and_the_session_waits_for_the_last() -> None:
    async with ScriptedEngine([CALL + tool_call("f", a=2), "Ok."]) as engine, engine.session(tools=[f]) as s:
        one, two = (await s.generate("go")).tool_calls
        async with s.tool_call(one) as first:
            async with s.tool_call(two) as second:
                second.result = "second"
            with pytest.raises(errors.SessionBusy):
                _ = await s.generate("inside")
            with pytest.raises(errors.InvalidRequest, match="is being served already"):
                async with s.tool_call(one):
                    raise AssertionError("served twice")
            first.result = "first"
        assert results(s) == ["first", "second"] and s.usage.pauses == 1
        assert (await s.generate()).text == "Ok."


async def test_a_call_that_is_served_beyond_the_end_of_its_turn_is_waited_for() -> None:
    script = [say(CALL + tool_call("f", a=2), seconds=0.001), "Ok."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        done = anyio.Event()

        async def serve(call: ToolCall) -> None:
            async with s.tool_call(call, expect=20.0 if '"a":1' in call.arguments else 30.0) as pending:
                await done.wait()
                pending.result = call.arguments

        async with anyio.create_task_group() as group:
            async with s.stream("go") as turn:
                async for event in turn:
                    if isinstance(event, events.ToolCallReady):
                        _ = group.start_soon(serve, event.call)
            await anyio.wait_all_tasks_blocked()
            assert s.lease is not None and s.lease.seconds == 30.0
            with pytest.raises(errors.SessionBusy, match="a tool call has not ended"):
                _ = await s.generate("too soon")
            done.set()
        assert results(s) == ['{"a":1}', '{"a":2}'] and s.usage.pauses == 1
        assert (await s.generate()).text == "Ok."


async def test_a_block_that_is_cancelled_gives_the_session_back() -> None:
    async with ScriptedEngine([CALL, "Ok."]) as engine, engine.session(tools=[f]) as s:
        (call,) = (await s.generate("go")).tool_calls
        with anyio.move_on_after(0.05):
            async with s.tool_call(call):
                await anyio.sleep(60)
        assert results(s) == ["error: cancelled before it finished"]
        assert (await s.generate()).text == "Ok."


async def test_a_session_that_is_closed_meanwhile_takes_no_result_and_raises_nothing() -> None:
    async with ScriptedEngine([CALL]) as engine, engine.session(tools=[f]) as s:
        (call,) = (await s.generate("go")).tool_calls
        async with s.tool_call(call) as pending:
            await s.close()
            pending.result = 2
        assert results(s) == []


# ---- calls of which only some were served ---------------------------------------------------------------------------
@pytest.fixture
def half_served() -> list[str]:
    return [CALL + tool_call("f", a=2), tool_call("f", a=5), "10."]


async def serve_the_second(s: Session) -> None:
    calls = (await s.generate("go")).tool_calls
    async with s.tool_call(calls[1]) as pending:
        pending.result = "of the second"
    assert "held" in repr(s)


@pytest.mark.parametrize("way", ["rewind", "say", "add", "adopt"])
async def test_a_pause_that_was_left_ends_with_what_it_waited_for(half_served: list[str], way: str) -> None:
    async with ScriptedEngine(half_served) as engine, engine.session(tools=[f]) as s:
        start = await s.mark()
        await serve_the_second(s)
        match way:
            case "rewind":
                await s.rewind(start)
            case "add":
                _ = await s.add("never mind")
            case "adopt":
                async with s.fork() as (child,):
                    await child.rewind(start)
                    await s.adopt(child)
            case _:
                pass
        await anyio.sleep(0.3)
        (call,) = (await s.generate("again")).tool_calls
        assert s.lease is None
        async with s.tool_call(call) as pending:
            assert s.lease is not None  # asked for anew
            pending.result = 10
        assert results(s)[-1] == "10"
        assert s.usage.pauses == 1 and s.usage.pause_seconds < 0.2


async def test_a_session_that_speaks_again_is_not_held_by_the_pause_it_left() -> None:
    script = [CALL + tool_call("f", a=2), say("A few words.", seconds=0.01)]
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        await serve_the_second(s)
        async with s.stream("go on") as turn:
            async for event in turn:
                assert isinstance(event, events.TurnFinished) or "running" in repr(s)
        assert results(s) == [NO_RESULT, "of the second"]


async def test_a_turn_that_is_taken_back_leaves_the_results_for_the_calls_that_are_open_again() -> None:
    script = [CALL + tool_call("f", a=2), say("Never read.", seconds=0.05), "Ok."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        await serve_the_second(s)
        async with s.stream("go on"):
            pass
        assert results(s) == []
        async with s.tool_call(s.open_calls[0]) as pending:
            pending.result = "of the first"
        assert results(s) == ["of the first", "of the second"]
        assert (await s.generate()).text == "Ok."


async def test_what_was_served_enters_before_what_is_added_unless_it_is_added_by_hand() -> None:
    script = [CALL + tool_call("f", a=2)] * 2
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        await serve_the_second(s)
        _ = await s.add("Well?")
        assert results(s) == [NO_RESULT, "of the second"]
        await serve_the_second(s)
        left = s.open_calls
        _ = await s.add(*(ToolMessage(call_id=call.id, name="f", text="by hand") for call in left), "Well?")
        assert results(s)[2:] == ["by hand"] * 2


async def test_rewinding_to_where_the_session_is_keeps_what_was_served(half_served: list[str]) -> None:
    async with ScriptedEngine(half_served) as engine, engine.session(tools=[f]) as s:
        await serve_the_second(s)
        await s.rewind(s.tokens)
        assert [message.text for message in (await s.run()).tools] == ["2", "of the second", "10"]


async def test_a_run_that_serves_the_rest_counts_the_whole_pause_once() -> None:
    async with ScriptedEngine([CALL + tool_call("f", a=2), "Ok."]) as engine, engine.session(tools=[f]) as s:
        await serve_the_second(s)
        await anyio.sleep(0.2)
        _ = await s.run()
        assert s.usage.pauses == 1 and s.usage.pause_seconds >= 0.2


# ---- wrong input ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"timeout": "x"}, "timeout is 'x'"),
        ({"timeout": 0}, "timeout is 0"),
        ({"expect": -1}, "expect is -1"),
        ({"on_error": "explode"}, "on_error is 'explode'"),
    ],
)
async def test_a_wrong_option_of_a_call_is_named_and_the_call_stays_open(options: Any, told: str) -> None:
    async with ScriptedEngine([CALL, "Ok."]) as engine, engine.session(tools=[f]) as s:
        (call,) = (await s.generate("go")).tool_calls
        with pytest.raises(errors.InvalidRequest, match=told):
            async with s.tool_call(call, **options):
                raise AssertionError("served")
        async with s.tool_call(call) as pending:
            pending.result = 2
        assert results(s) == ["2"]


@pytest.mark.parametrize("call", ["nope", None, 5])
async def test_what_is_no_call_cannot_be_served(call: Any) -> None:
    async with ScriptedEngine(["Ok."]) as engine, engine.session() as s:
        with pytest.raises(errors.InvalidRequest, match="must be a ToolCall"):
            async with s.tool_call(call):
                raise AssertionError("served")
        assert (await s.generate("go")).text == "Ok."


@pytest.mark.parametrize("on_error", ["return", "raise"])
async def test_a_result_that_is_no_json_is_a_failed_tool(on_error: Any) -> None:
    endless: list[Any] = []
    endless.append(endless)
    for result in (object(), endless):
        async with ScriptedEngine([CALL]) as engine, engine.session(tools=[f]) as s:
            (call,) = (await s.generate("go")).tool_calls
            failed = False
            try:
                async with s.tool_call(call, on_error=on_error) as pending:
                    pending.result = result
            except errors.ToolFailed:
                failed = True
            assert failed == (on_error == "raise")
            assert results(s)[0].startswith("error: f: its result cannot be written as JSON")


async def test_what_a_group_of_exceptions_holds_is_told_to_the_model() -> None:
    async with ScriptedEngine([CALL]) as engine, engine.session(tools=[f]) as s:
        (call,) = (await s.generate("go")).tool_calls
        async with s.tool_call(call):
            raise ExceptionGroup("some", [LookupError("no disk"), ExceptionGroup("more", [OSError("no net")])])
        assert results(s) == ["error: f: LookupError: no disk; OSError: no net"]


# ---- whoever listens ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [events.Paused, events.ToolStarted, events.ToolFinished])
async def test_a_listener_that_raises_leaves_a_result_for_every_call(kind: type[events.Event]) -> None:
    def listen(event: events.AnyEvent) -> None:
        if isinstance(event, kind):
            raise LookupError("not today")

    async with ScriptedEngine([CALL + tool_call("f", a=2), "Ok."]) as engine, engine.session(tools=[f]) as s:
        with pytest.raises(LookupError, match="not today"):
            _ = await s.run("go", on_event=listen)
        ran = kind is events.ToolFinished
        assert results(s) == (["2", "4"] if ran else ["error: cancelled before it finished"] * 2)
        assert (await s.run()).text == "Ok."


async def test_an_async_listener_is_refused_by_name() -> None:
    heard: list[events.AnyEvent] = []

    async def listen(event: events.AnyEvent) -> None:
        heard.append(event)

    async with ScriptedEngine(["Ok.", "Ok."]) as engine, engine.session() as s:
        for given in (listen, lambda event: listen(event)):
            with pytest.raises(errors.InvalidRequest, match="on_event is async") as refused:
                _ = await s.run("go", on_event=given)  # type: ignore[arg-type]
            assert refused.value.remedy
        assert (s.messages, heard) == ((), [])


# ---- what a tool raises ---------------------------------------------------------------------------------------------
async def test_a_tool_that_exits_is_a_failed_tool() -> None:
    @tool
    def exits(code: int) -> None:
        """Exits in a thread."""
        raise SystemExit(code)

    @tool
    async def exits_too(code: int) -> None:
        """Exits on the loop."""
        raise SystemExit(code)

    script = [tool_call("exits", code=2) + tool_call("exits_too", code=3), "Ok."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[exits, exits_too]) as s:
        assert (await s.run("go")).text == "Ok."
        assert results(s) == ["error: exits: SystemExit: 2", "error: exits_too: SystemExit: 3"]


async def test_what_went_wrong_in_a_tools_own_task_group_is_told_to_the_model() -> None:
    @tool
    async def groups() -> None:
        """Fails in a task."""

        async def fail() -> None:
            raise LookupError("no disk")

        async with anyio.create_task_group() as group:
            _ = group.start_soon(fail)

    async with ScriptedEngine([tool_call("groups"), "Ok."]) as engine, engine.session(tools=[groups]) as s:
        _ = await s.run("go")
        assert results(s) == ["error: groups: LookupError: no disk"]


# ---- system messages ------------------------------------------------------------------------------------------------
async def test_a_system_message_is_the_first_or_is_refused() -> None:
    async with ScriptedEngine(["Ok."]) as engine:
        async with engine.session() as s:
            _ = await s.add(System("Be brief."), "go")
            with pytest.raises(errors.InvalidRequest, match="A system message stands above") as refused:
                _ = await s.add(System("Be long."))
            assert "Session(system=...)" in refused.value.remedy
            assert (await s.generate()).text == "Ok."
        async with engine.session(system="Be brief.") as s:
            with pytest.raises(errors.InvalidRequest, match="A system message"):
                _ = await s.generate(System("Be long."))
            assert s.messages == ()
