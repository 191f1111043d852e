"""What the engine is told of a pause: which tool it is for, and how long it takes only where somebody said so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from agentspeed import tool
from agentspeed._core.branch import Branch
from agentspeed.testing import ScriptedEngine, tool_call
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


@tool
async def quick(a: int) -> int:
    """Is quick."""
    return a


@tool
async def slow(a: int) -> int:
    """Is slow."""
    await anyio.sleep(0.1)
    return a


TOOLS = [quick, slow]
BOTH = tool_call("quick", a=1) + tool_call("slow", a=2)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, str, str]]]:
    """(seconds, keep, tool) of each pause."""
    heard: list[tuple[Any, str, str]] = []
    as_it_was = Branch.expect

    async def expect(self: Branch, seconds: float, keep: Any, tool: str) -> Any:
        heard.append((seconds, keep, tool))
        return await as_it_was(self, seconds, keep, tool)

    monkeypatch.setattr(Branch, "expect", expect)
    yield heard


async def test_without_a_word_from_the_user_the_engine_learns_by_itself(told: list[tuple[Any, str, str]]) -> None:
    one = tool_call("slow", a=1)
    async with ScriptedEngine([one, one, "Ok.", one]) as engine, engine.session(tools=TOOLS) as s:
        _ = await s.run("go")
        (call,) = (await s.generate("go")).tool_calls
        async with s.tool_call(call) as pending:
            pending.result = 1
    assert told == [(None, "soft", "slow")] * 3


@pytest.mark.parametrize("seconds", [0, 7.5])
async def test_what_the_user_expects_is_told(told: list[tuple[Any, str, str]], seconds: float) -> None:
    script = [tool_call("quick", a=1), "Ok.", tool_call("quick", a=1)]
    async with ScriptedEngine(script) as engine, engine.session(tools=TOOLS) as s:
        _ = await s.run("go", expect=seconds)
        (call,) = (await s.generate("go")).tool_calls
        async with s.tool_call(call, expect=seconds) as pending:
            pending.result = 1
    assert told == [(seconds, "soft", "quick")] * 2


async def test_of_parallel_calls_the_slowest_names_the_pause(told: list[tuple[Any, str, str]]) -> None:
    script = [tool_call("quick", a=1), tool_call("slow", a=1), BOTH, "Ok."]
    async with ScriptedEngine(script) as engine, engine.session(tools=TOOLS) as s:
        _ = await s.run("go")
    assert [name for _, _, name in told] == ["quick", "slow", "slow"]


async def test_a_tool_that_never_ran_counts_more_than_one_known_to_be_quick(told: list[tuple[Any, str, str]]) -> None:
    async with ScriptedEngine([tool_call("quick", a=1), BOTH, "Ok."]) as engine, engine.session(tools=TOOLS) as s:
        _ = await s.run("go")
    assert [name for _, _, name in told] == ["quick", "slow"]


async def test_calls_served_by_hand_name_the_slowest_of_all_that_are_open(told: list[tuple[Any, str, str]]) -> None:
    script = [tool_call("quick", a=1), tool_call("slow", a=1), "Ok.", BOTH]
    async with ScriptedEngine(script) as engine, engine.session(tools=TOOLS) as s:
        _ = await s.run("go")
        for call in (await s.generate("go")).tool_calls:
            async with s.tool_call(call) as pending:
                pending.result = 1
    assert [name for _, _, name in told] == ["quick", "slow", "slow"]


async def test_a_pause_of_unknown_length_shows_none(told: list[tuple[Any, str, str]]) -> None:
    async with ScriptedEngine([tool_call("quick", a=1)]) as engine, engine.session(tools=TOOLS) as s:
        (call,) = (await s.generate("go")).tool_calls
        async with s.tool_call(call) as pending:
            assert "soft lease" in repr(s) and "lease 0s" not in repr(s)
            pending.result = 1
    assert told
