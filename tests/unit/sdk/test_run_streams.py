"""A whole run as a block: every event of its turns and tools, safe to leave at any of them."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator

import anyio
import pytest

from agentspeed import Session, errors, events, tool
from agentspeed._base.background import Background
from agentspeed.testing import ScriptedEngine, ScriptedText, say, tool_call
from agentspeed.testing.scripted import Turn
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio
CALL = tool_call("slow", x=1)
SLOWER = tool_call("slow", x=300)
ended: list[str] = []


@tool
async def slow(x: int) -> str:
    """Takes `x` milliseconds."""
    try:
        await anyio.sleep(x / 1000)
        ended.append("done")
        return f"got {x}"
    except BaseException:
        ended.append("cancelled")
        raise


def call_then_answer(turn: Turn) -> str:
    """A call, and an answer to whatever came of it."""
    return "Done." if "got" in turn.log[-120:] else CALL


async def test_it_tells_the_turns_and_the_tools_in_order_and_gives_what_run_gives() -> None:
    async with ScriptedEngine([CALL, "Done."]) as engine, engine.session(tools=[slow]) as s:
        async with s.stream_run("Go.") as run:
            told = [event async for event in run]
            result = run.result()
        names = [type(event).__name__ for event in told]
        assert [name for name in names if not name.endswith("Delta")] == [
            "TurnStarted",
            "ToolCallStarted",
            "ToolCallReady",
            "TurnFinished",
            "Paused",
            "ToolStarted",
            "ToolFinished",
            "TurnStarted",
            "Resumed",
            "TurnFinished",
        ]
        assert [event.seq for event in told] == list(range(1, len(told) + 1))
        assert (result.text, result.turns, [one.text for one in result.tools]) == ("Done.", 2, ["got 1"])


@pytest.mark.parametrize(
    ("at", "messages", "tools"),
    [
        (events.TurnStarted, [], []),
        (events.ToolCallReady, [], []),
        (events.TurnFinished, ["Go.", ""], []),
        (events.ToolStarted, ["Go.", "", "error: cancelled before it finished"], ["cancelled"]),
        (events.ToolFinished, ["Go.", "", "got 300"], ["done"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_left_at_any_event_it_runs_nothing_more_and_the_session_goes_on(
    at: type[events.Event], messages: list[str], tools: list[str]
) -> None:
    ended.clear()
    async with ScriptedEngine([SLOWER, "Never read.", "Fine."]) as engine, engine.session(tools=[slow]) as s:
        with anyio.fail_after(20):
            async with s.stream_run("Go.") as run:
                async for event in run:
                    if isinstance(event, at):
                        break
        assert ended == tools
        assert [message.text for message in s.messages] == messages
        await anyio.sleep(0.05)
        assert ended == tools, "something ran on"
        with pytest.raises(errors.SessionError, match="has not ended"):
            _ = run.result()
        assert (await s.generate("And now?")).text in ("Never read.", "Fine.")
    assert engine.live_branches == 0


async def test_between_two_steps_it_waits_for_its_reader() -> None:
    ended.clear()
    async with ScriptedEngine([CALL, "Done."]) as engine, engine.session(tools=[slow]) as s:
        async with s.stream_run("Go.") as run:
            async for event in run:
                if isinstance(event, events.TurnFinished) and not ended:
                    await anyio.sleep(0.1)
                    assert ended == [], "a tool began whose call was not read yet"
                    with pytest.raises(errors.SessionBusy, match="a run has not ended"):
                        _ = await s.generate("Between?")
        assert run.result().text == "Done."


async def test_what_the_run_raises_comes_where_its_events_end() -> None:
    @tool(on_error="raise")
    async def breaks() -> str:
        """Breaks."""
        raise ValueError("broken")

    async with ScriptedEngine([tool_call("breaks"), "Fine."]) as engine, engine.session(tools=[breaks]) as s:
        seen = []
        with pytest.raises(errors.ToolFailed, match="broken"):
            async with s.stream_run("Go.") as run:
                async for event in run:
                    seen.append(type(event).__name__)
        assert seen[-1] == "ToolFinished"
        assert (await s.generate("And now?")).text == "Fine."


async def test_wrong_arguments_are_refused_before_anything_begins() -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        with pytest.raises(errors.InvalidRequest, match="max_turns"):
            _ = s.stream_run("Go.", max_turns=0)
        with pytest.raises(errors.InvalidRequest, match="max_tokens"):
            _ = s.stream_run("Go.", max_tokens=0)
        async with s.stream("Go.") as turn:
            with pytest.raises(errors.SessionBusy):
                async with s.stream_run("Go."):
                    pass
            _ = await turn.reply()
        with pytest.raises(errors.SessionError, match="inside its own block"):
            _ = await anext(s.stream_run("Go."))


async def test_a_reader_that_is_cancelled_leaves_a_session_that_goes_on() -> None:
    script: list[str | ScriptedText] = [say("A long answer indeed.", seconds=0.05), "Fine."]
    async with ScriptedEngine(script) as engine, engine.session() as s:
        with anyio.move_on_after(0.1) as scope:
            async with s.stream_run("Go.") as run:
                async for _ in run:
                    pass
        assert scope.cancelled_caught
        assert s.messages == ()
        assert (await s.generate("And now?")).text == "Fine."


async def test_a_session_that_is_closed_meanwhile_says_so_to_the_reader() -> None:
    async with ScriptedEngine([say("A long answer indeed.", seconds=0.05)]) as engine, engine.session() as s:
        with anyio.fail_after(20), pytest.raises(errors.SessionClosed):
            async with s.stream_run("Go.") as run:
                async for _ in run:
                    await s.close()


async def _pieces(session: Session, prompt: str) -> AsyncGenerator[str, None]:
    """As the body of a streamed response is written."""
    async with session.stream_run(prompt) as run:
        async for event in run:
            yield type(event).__name__


async def _busy(session: Session) -> bool:
    try:
        _ = await session.mark()
    except errors.SessionBusy:
        return True
    return False


async def test_left_early_200_times_beside_other_work_it_cancels_nothing_and_leaks_nothing() -> None:
    beats = 0

    async def other_work() -> None:
        nonlocal beats
        while True:
            await anyio.sleep(0.001)
            beats += 1

    async with ScriptedEngine(call_then_answer) as engine, engine.session(tools=[slow]) as s:
        with anyio.fail_after(100):
            async with anyio.create_task_group() as group:
                group.start_soon(other_work)
                start = await s.mark()
                for turn in range(200):
                    body = _pieces(s, "Go.")
                    for _ in range(1 + turn % 8):
                        _ = await anext(body)
                    await body.aclose()  # what a server does when the client has gone
                    assert s.messages == () or turn % 8 > 2
                    await s.rewind(start)
                assert beats > 0
                assert not group.cancel_scope.cancel_called
                group.cancel_scope.cancel()
            assert (await s.run("Go.")).text == "Done."
        assert engine.live_branches == 1
        _ = gc.collect()
        assert not [one for one in gc.get_objects() if type(one) is Background and not one.ended]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_generator_that_nobody_closes_ends_its_run_when_it_is_collected() -> None:
    ended.clear()
    script = [tool_call("slow", x=60_000), "Fine."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[slow]) as s:
        body = _pieces(s, "Go.")
        while await anext(body) != "ToolStarted":
            pass
        del body
        with anyio.fail_after(20):
            while await _busy(s):  # noqa: ASYNC110 - nobody tells when it ends
                await anyio.sleep(0.001)
        assert ended == ["cancelled"]
        assert (await s.generate("And now?")).text == "Fine."
