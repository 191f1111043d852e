"""What tools say while they run: events for who listens, from the loop and from threads, and nothing for the model."""

from __future__ import annotations

import time

import anyio
import anyio.lowlevel
import pytest

from agentspeed import ToolContext, events, tool
from agentspeed.testing import ScriptedEngine, tool_call

pytestmark = pytest.mark.anyio


@tool
async def walk(steps: int, context: ToolContext[None]) -> str:
    """Walks."""
    for step in range(steps):
        context.report(step + 1, steps, "a step")
        await anyio.lowlevel.checkpoint()
    return "there"


@tool
def dig(context: ToolContext[None]) -> str:
    """Digs, in a thread."""
    context.report(0.5)
    return "dug"


@tool(timeout=0.05)
def late(context: ToolContext[None]) -> str:
    """Is given up."""
    time.sleep(0.2)
    context.report(1)
    return "never read"


async def test_reports_of_tools_on_the_loop_and_in_threads_are_events_of_their_run() -> None:
    seen: list[events.ToolProgress] = []

    def note(event: events.AnyEvent) -> None:
        if isinstance(event, events.ToolProgress):
            seen.append(event)

    script = [tool_call("walk", steps=2) + tool_call("dig"), "Done."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[walk, dig]) as s:
        result = await s.run("Go.", on_event=note)
        assert [one.text for one in result.tools] == ["there", "dug"]
    told = [(event.call.name, event.done, event.total, event.message) for event in seen]
    assert [one for one in told if one[0] == "walk"] == [("walk", 1, 2, "a step"), ("walk", 2, 2, "a step")]
    assert ("dig", 0.5, None, "") in told


async def test_a_tool_that_was_given_up_is_not_heard_any_more() -> None:
    seen: list[events.AnyEvent] = []
    async with ScriptedEngine([tool_call("late"), "Done."]) as engine, engine.session(tools=[late]) as s:
        _ = await s.run("Go.", on_event=seen.append)
        await anyio.sleep(0.3)
    assert not any(isinstance(event, events.ToolProgress) for event in seen)


async def test_a_report_that_is_no_number_is_the_tools_own_error() -> None:
    @tool
    async def odd(context: ToolContext[None]) -> str:
        """Odd."""
        context.report("half")  # type: ignore[arg-type]
        return "x"

    async with ScriptedEngine([tool_call("odd"), "Done."]) as engine, engine.session(tools=[odd]) as s:
        (told,) = (await s.run("Go.")).tools
        assert "done is 'half'; it must be a number" in told.text
