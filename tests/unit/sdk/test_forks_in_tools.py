"""A fork that a tool makes of the session that called it: the call being served is closed there, and served once."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import Session, ToolContext, tool
from agentspeed.testing import ScriptedEngine, tool_call

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("how", ["run", "generate"])
async def test_a_tool_that_asks_a_fork_of_its_session_is_called_once(how: str) -> None:
    called = 0

    @tool
    async def ask(question: str, context: ToolContext[None]) -> str:
        """Ask a copy of yourself."""
        nonlocal called
        called += 1
        async with context.session.fork() as (branch,):
            reply = await branch.run(question) if how == "run" else await branch.generate(question)
            assert branch.messages[2].text.startswith("This call is being served")
            return str(reply.text)

    script = [tool_call("ask", question="why") + tool_call("ask", question="how"), "inner", "inner", "outer"]
    async with ScriptedEngine(script) as engine, engine.session(tools=[ask]) as s:
        with anyio.fail_after(20):
            result = await s.run("Go.")
        assert (called, result.text) == (2, "outer")
        assert [message.text for message in result.tools] == ["inner", "inner"]


async def test_a_block_that_serves_a_call_by_hand_closes_it_in_a_fork_and_leaves_the_others_open() -> None:
    @tool
    def f(a: int) -> int:
        """Give it back."""
        return a

    script = [tool_call("f", a=1) + tool_call("f", a=2), "in the fork", "outside"]
    async with ScriptedEngine(script) as engine, engine.session(tools=[f]) as s:
        first, second = (await s.generate("Go.")).tool_calls
        async with s.tool_call(first) as pending:
            async with s.fork() as (child,):
                ran = await child.run()
            pending.result = "served"
        assert [message.call_id for message in ran.tools] == [first.id, second.id]
        assert ran.tools[1].text == "2"
        async with s.tool_call(second) as pending:
            pending.result = "too"
        assert [message.text for message in s.messages[-2:]] == ["served", "too"]


async def test_a_fork_of_a_session_whose_calls_nobody_serves_may_serve_them() -> None:
    @tool
    def f(a: int) -> int:
        """Give it back."""
        return a

    async with ScriptedEngine([tool_call("f", a=1), "Ok."]) as engine, engine.session(tools=[f]) as s:
        _ = await s.generate("Go.")
        async with s.fork() as (child,):
            result = await child.run()
        assert [message.text for message in result.tools] == ["1"]
        assert isinstance(child, Session) and child.parent is s
