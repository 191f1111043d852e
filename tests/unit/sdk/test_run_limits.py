"""What a whole run may spend: tokens, seconds and calls; the result names the limit that ended it."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from agentspeed import Limits, errors, events, tool
from agentspeed.testing import ScriptedEngine, ScriptedText, say, tool_call
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio
ran: list[int] = []
ADD = tool_call("add", x=1)


@tool
async def add(x: int) -> str:
    """Takes `x` milliseconds."""
    await anyio.sleep(x / 1000)
    ran.append(x)
    return "added"


@pytest.mark.parametrize("limits", [{"tokens": 0}, {"seconds": 0}, {"tool_calls": -1}, {"tokens": True}])
def test_a_limit_out_of_range_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"limits.{next(iter(limits))}"):
        _ = Limits(**limits)


async def test_anything_but_limits_is_refused() -> None:
    given: Any = {"tokens": 4}
    async with ScriptedEngine([]) as engine, engine.session() as s:
        with pytest.raises(errors.InvalidRequest, match="limits is"):
            _ = await s.run("Go.", limits=given)


async def test_a_run_within_its_limits_is_as_one_without() -> None:
    async with ScriptedEngine([ADD, "Done."]) as engine, engine.session(tools=[add]) as s:
        result = await s.run("Go.", limits=Limits(tokens=500, seconds=60, tool_calls=2))
        assert (result.text, result.reason, result.limit) == ("Done.", "answered", None)


async def test_the_tokens_of_all_turns_count_and_the_last_is_cut_at_them() -> None:
    async with ScriptedEngine([ADD, "One two three four five six."]) as engine, engine.session(tools=[add]) as s:
        first = await s.generate("Go.", tool_choice="required")
    async with ScriptedEngine([ADD, "One two three four five six."]) as engine, engine.session(tools=[add]) as s:
        most = first.usage.drawn + 3
        result = await s.run("Go.", limits=Limits(tokens=most))
        assert (result.reason, result.limit, result.usage.drawn) == ("limit", "tokens", most)
        assert "One two three four five six.".startswith(result.text)
        assert result.text


async def test_a_smaller_max_tokens_of_each_turn_is_its_own_reason() -> None:
    async with ScriptedEngine(["One two three four five six."]) as engine, engine.session() as s:
        result = await s.run("Go.", max_tokens=2, limits=Limits(tokens=100))
        assert (result.reason, result.limit, result.usage.drawn) == ("cut", None, 2)


async def test_calls_whose_results_nobody_could_read_stay_open_and_the_next_run_serves_them() -> None:
    ran.clear()
    async with ScriptedEngine([ADD]) as engine, engine.session(tools=[add]) as s:
        drawn = (await s.generate("Go.", tool_choice="required")).usage.drawn
    async with ScriptedEngine([ADD, "Done."]) as engine, engine.session(tools=[add]) as s:
        result = await s.run("Go.", limits=Limits(tokens=drawn))
        assert (result.reason, result.limit, ran) == ("limit", "tokens", [])
        assert s.open_calls == result.reply.tool_calls
        assert (await s.run()).text == "Done."
        assert ran == [1]


async def test_tokens_that_end_inside_a_call_end_the_run_with_what_there_is() -> None:
    async with ScriptedEngine([ADD]) as engine, engine.session(tools=[add]) as s:
        result = await s.run("Go.", limits=Limits(tokens=4))
        assert (result.reason, result.limit, result.reply.tool_calls) == ("limit", "tokens", ())
        assert result.reply.partial_call is not None


async def test_an_output_that_is_cut_is_none() -> None:
    async with ScriptedEngine(["[1,2,3,4,5,6,7,8,9]"]) as engine, engine.session() as s:
        with pytest.raises(errors.OutputError, match="cut inside its output"):
            _ = await s.run("Go.", output=list[int], limits=Limits(tokens=3))


async def test_calls_beyond_the_limit_are_told_so_and_the_model_answers() -> None:
    ran.clear()
    told: list[events.AnyEvent] = []
    script = [ADD + tool_call("add", x=2), "Enough."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add]) as s:
        result = await s.run("Go.", limits=Limits(tool_calls=1), on_event=told.append)
        assert (result.text, result.reason, result.limit) == ("Enough.", "limit", "tool_calls")
        assert ran == [1]
        assert [(one.ok, "limits.tool_calls=1" in one.text) for one in result.tools] == [(True, False), (False, True)]
        assert [one.ok for one in told if isinstance(one, events.ToolFinished)] == [False, True]


async def test_the_seconds_of_a_run_end_a_turn_that_leaves_no_trace() -> None:
    script: list[str | ScriptedText] = [ADD, say("A long answer indeed.", seconds=0.2), "Fine."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add]) as s:
        with anyio.fail_after(20):
            result = await s.run("Go.", limits=Limits(seconds=0.4))
        assert (result.reason, result.limit, result.turns) == ("limit", "seconds", 1)
        assert [one.text for one in s.messages] == ["Go.", "", "added"]
        assert (await s.generate()).text == "Fine."


async def test_the_seconds_of_a_run_cancel_a_tool_whose_call_gets_a_result() -> None:
    ran.clear()
    async with ScriptedEngine([tool_call("add", x=60_000), "Fine."]) as engine, engine.session(tools=[add]) as s:
        with anyio.fail_after(20):
            result = await s.run("Go.", limits=Limits(seconds=0.4))
        assert (result.reason, result.limit, ran) == ("limit", "seconds", [])
        assert [one.text for one in result.tools] == ["error: cancelled before it finished"]
        assert s.open_calls == ()
        assert (await s.generate()).text == "Fine."


@pytest.mark.parametrize("on_event", [None, lambda event: None], ids=["unheard", "heard"])
async def test_seconds_that_go_before_the_first_turn_ended_are_a_timeout_with_its_text(on_event: Any) -> None:
    text = "A long answer indeed. " * 20
    async with ScriptedEngine([say(text, seconds=0.02)]) as engine, engine.session() as s:
        with anyio.fail_after(20), pytest.raises(errors.TurnTimeout, match="limit of 0") as caught:
            _ = await s.run("Go.", limits=Limits(seconds=0.35), on_event=on_event)
        assert caught.value.partial and text.startswith(caught.value.partial)
        assert s.messages == ()


async def test_a_streamed_run_has_them_too() -> None:
    async with ScriptedEngine([ADD, "Enough."]) as engine, engine.session(tools=[add]) as s:
        async with s.stream_run("Go.", limits=Limits(tool_calls=1)) as run:
            _ = [event async for event in run]
        assert (run.result().text, run.result().limit) == ("Enough.", "tool_calls")


async def test_who_raises_at_a_call_beyond_the_limit_leaves_no_call_without_its_result() -> None:
    def hear(event: events.AnyEvent) -> None:
        if isinstance(event, events.ToolFinished):
            raise KeyError("not wanted")

    async with ScriptedEngine([ADD + ADD]) as engine, engine.session(tools=[add]) as s:
        with pytest.raises(KeyError, match="not wanted"):
            _ = await s.run("Go.", limits=Limits(tool_calls=1), on_event=hear)
        assert s.open_calls == ()
