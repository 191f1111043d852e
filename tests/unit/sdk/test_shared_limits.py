"""A run's limits hold for all that its tools use: forks, sub-agents, and runs inside of runs."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from agentspeed import Limits, Session, ToolContext, errors, sub_agent, tool
from agentspeed.testing import ScriptedEngine, ScriptedText, say, tool_call
from agentspeed.testing import Turn as Asked

pytestmark = pytest.mark.anyio
LONG = "One two three four five six seven eight nine ten eleven twelve."
FORK = tool_call("ask")
told: list[Any] = []


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _empty() -> None:
    told.clear()


@tool
async def ask(context: ToolContext[Any]) -> str:
    """Asks a fork."""
    async with context.session.fork() as (branch,):
        reply = await branch.generate("Well?")
        told.append(reply)
        return reply.text


@tool
async def ask_two(context: ToolContext[Any]) -> str:
    """Asks two forks at once."""

    async def one(branch: Any) -> None:
        try:
            told.append(await branch.generate("Well?"))
        except errors.LimitReached as error:
            told.append(error)

    async with context.session.fork(2) as branches, anyio.create_task_group() as group:
        for branch in branches:
            group.start_soon(one, branch)
    return "asked"


@tool
def search(query: str) -> str:
    """Search."""
    return f"found {query}"


async def _cost(*script: str) -> list[int]:
    """How many tokens each of these texts is."""
    async with ScriptedEngine(list(script)) as engine, engine.session() as s:
        return [(await s.generate("Go.")).usage.drawn for _ in script]


async def test_a_fork_of_a_tool_is_cut_at_what_the_run_has_left_and_the_run_ends_there() -> None:
    (call,) = await _cost(FORK)
    async with ScriptedEngine([FORK, LONG, "Never."]) as engine, engine.session(tools=[ask]) as s:
        result = await s.run("Go.", limits=Limits(tokens=call + 3))
        assert (result.reason, result.limit) == ("limit", "tokens")
        assert {number: usage.drawn for number, usage in result.by_branch.items()} == {s.id: call, f"{s.id}.1": 3}
        assert f"limits.tokens={call + 3} of the run of session {s.id} ({s.id}: {call}, {s.id}.1: 3)" in result.bound
        (reply,) = told
        assert reply.finish_reason == "max_tokens" and f"the run of session {s.id}" in reply.bound


async def test_a_fork_that_finds_nothing_left_is_told_whose_limit_it_is() -> None:
    @tool
    async def twice(context: ToolContext[Any]) -> str:
        """Asks until nothing is left."""
        async with context.session.fork() as (branch,):
            for _ in range(2):
                _ = await branch.generate("Well?")
        return "never"

    (call,) = await _cost(tool_call("twice"))
    async with ScriptedEngine([tool_call("twice"), LONG, "Never."]) as engine, engine.session(tools=[twice]) as s:
        result = await s.run("Go.", limits=Limits(tokens=call + 3))
        (message,) = result.tools
        assert not message.ok and f"limits.tokens={call + 3} of the run of session {s.id}" in message.text
        assert result.limit == "tokens"


async def test_each_branch_may_have_a_limit_of_its_own() -> None:
    call, answer = await _cost(FORK, "Done.")
    most = max(call + answer, 4)
    async with ScriptedEngine([FORK, LONG * 9, "Done."]) as engine, engine.session(tools=[ask]) as s:
        result = await s.run("Go.", limits=Limits(branch_tokens=most))
        assert (result.text, result.reason) == ("Done.", "answered")
        assert result.by_branch[f"{s.id}.1"].drawn == most
    async with ScriptedEngine([FORK, "Fine.", LONG]) as engine, engine.session(tools=[ask]) as s:
        result = await s.run("Go.", limits=Limits(branch_tokens=call + 2))
        assert (result.reason, result.limit) == ("limit", "branch_tokens")
        assert result.by_branch[s.id].drawn == call + 2


async def test_forks_that_draw_at_once_are_stopped_when_they_have_drawn_it_together() -> None:
    (call,) = await _cost(tool_call("ask_two"))
    script: list[str | ScriptedText] = [tool_call("ask_two"), *[say(LONG * 20, seconds=0.001)] * 2]
    async with ScriptedEngine(script) as engine, engine.session(tools=[ask_two]) as s:
        result = await s.run("Go.", limits=Limits(tokens=call + 40))
        assert (result.reason, result.limit) == ("limit", "tokens")
        stopped = [one for one in told if isinstance(one, errors.LimitReached)]
        assert stopped and all(one.limit == "tokens" and set(one.spent) >= {s.id, f"{s.id}.1"} for one in stopped)
        assert sum(usage.drawn for usage in result.by_branch.values()) < call + 2 * 40


async def test_what_a_sub_agent_spends_counts_in_its_callers_run() -> None:
    def model(asked: Asked) -> str:
        if "You look things up" in asked.log:
            return LONG
        return "Done." if "ended without" in asked.log else tool_call("look_up", task="What is it?")

    look_up = sub_agent("look_up", "Looks things up.", system="You look things up.", tools=[search])
    (call,) = await _cost(tool_call("look_up", task="What is it?"))
    async with ScriptedEngine(model) as engine, engine.session(tools=[look_up]) as s:
        result = await s.run("Go.", limits=Limits(tokens=call + 5))
        (message,) = result.tools
        assert not message.ok and f"limits.tokens={call + 5} of the run of session {s.id}" in message.text
        own, inner = result.by_branch
        assert own == s.id and inner.startswith("look_up-") and result.by_branch[inner].drawn == 5
        assert (result.reason, result.limit) == ("limit", "tokens")


async def test_the_calls_of_a_sub_agent_count_in_its_callers_run() -> None:
    script = [
        tool_call("look_up", task="x"),
        tool_call("search", query="a") + tool_call("search", query="b"),
        "Found a.",
        "Done.",
    ]
    look_up = sub_agent("look_up", "Looks things up.", tools=[search])
    async with ScriptedEngine(script) as engine, engine.session(tools=[look_up]) as s:
        result = await s.run("Go.", limits=Limits(tool_calls=2))
        assert (result.text, result.limit) == ("Done.", "tool_calls")
        assert [one.text for one in result.tools] == ["Found a."]
        assert f"limits.tool_calls=2 of the run of session {s.id} ({s.id}: 1, look_up-" in result.bound


async def test_what_is_spent_outside_of_the_run_is_not_counted() -> None:
    async with ScriptedEngine(["Before.", "Done.", LONG]) as engine, engine.session() as s:
        _ = await s.generate("Go.")
        result = await s.run("Go.", limits=Limits(tokens=50))
        assert list(result.by_branch) == [s.id] and result.by_branch[s.id].turns == 1
        assert (await s.generate("On.")).text == LONG


async def test_a_task_that_outlives_the_run_spends_from_no_account() -> None:
    async with ScriptedEngine([tool_call("later"), "Done.", LONG]) as engine, anyio.create_task_group() as group:
        ended, spoke = anyio.Event(), anyio.Event()

        async def speak(session: Session) -> None:
            await ended.wait()
            async with session.fork() as (branch,):
                told.append(await branch.generate("Well?"))
            spoke.set()

        @tool
        async def later() -> str:
            """Leaves a task behind."""
            group.start_soon(speak, s)
            return "begun"

        async with engine.session(tools=[later]) as s:
            result = await s.run("Go.", limits=Limits(tokens=300))
            ended.set()
            await spoke.wait()
            assert told[0].text == LONG and list(result.by_branch) == [s.id]
