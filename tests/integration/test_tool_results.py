"""Results of tools that are hard to write into a log: each call gets one all the same, and the run goes on."""

from __future__ import annotations

import pytest

from agentspeed import Assistant, Session, ToolCall, ToolContext, ToolMessage
from agentspeed.errors import InvalidRequest
from agentspeed.testing import ScriptedEngine, tool_call

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def odd_name() -> str:
    """A file name that is not UTF-8, as `os.listdir` gives it."""
    return "report-\udcff.txt"


def fail_oddly() -> str:
    """Fail with such a name."""
    raise FileNotFoundError("report-\udcff.txt")


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def test_half_a_character_in_a_result_reaches_the_model_as_a_replacement_character() -> None:
    script = [tool_call("odd_name") + tool_call("fail_oddly"), "Done."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[odd_name, fail_oddly]) as s:
        result = await s.run("Go.")
        assert result.text == "Done."
        assert [message.text for message in result.tools] == [
            "report-\ufffd.txt",
            "error: fail_oddly: FileNotFoundError: report-\ufffd.txt",
        ]


async def test_a_call_that_is_not_open_cannot_be_served() -> None:
    script = [tool_call("add", a=1, b=2), "3."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add]) as s:
        reply = await s.generate("Add.")
        with pytest.raises(InvalidRequest, match="no open call 'call_none'"):
            async with s.tool_call(ToolCall(id="call_none", name="add", arguments="{}")):
                raise AssertionError("served")
        async with s.tool_call(reply.tool_calls[0]) as pending:
            pending.result = 3
        with pytest.raises(InvalidRequest, match="no open call"):
            async with s.tool_call(reply.tool_calls[0]):
                raise AssertionError("served twice")
        assert (await s.generate()).text == "3."


async def ask_myself(context: ToolContext[None]) -> str:
    """Go on with the session that waits for this very result."""
    session = context.session
    assert isinstance(session, Session)
    assert "held" in repr(session)
    return (await session.generate("And?")).text


async def ask_a_fork(context: ToolContext[None]) -> str:
    """Go on with a fork of it."""
    assert isinstance(context.session, Session)
    async with context.session.fork() as (child,):
        return (await child.generate("And?")).text


async def test_a_tool_cannot_go_on_with_the_session_that_waits_for_it_but_may_fork_it() -> None:
    script = [tool_call("ask_myself"), "Done.", tool_call("ask_a_fork"), "From the fork.", "Done again."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[ask_myself, ask_a_fork]) as s:
        result = await s.run("Go.")
        assert result.text == "Done."
        assert result.tools[0].text.startswith(f"error: ask_myself: SessionBusy: Session {s.id} is busy: a tool")
        assert [type(m).__name__ for m in s.messages] == ["User", "Assistant", "ToolMessage", "Assistant"]
        again = await s.run("Go.")
        assert (again.text, again.tools[0].text) == ("Done again.", "From the fork.")


def long_text() -> str:
    """Read a long file."""
    return "word " * 20_000


async def test_a_result_that_does_not_fit_into_the_context_is_told_as_an_error_and_the_run_goes_on() -> None:
    async with Session(tools=[long_text, add], context_limit=900, pages=20) as s:
        result = await s.run("Read the long file.", tool_choice="long_text", parallel_calls=1, max_tokens=40)
        told = {(message.text, message.ok) for message in result.tools}  # the model may well ask again
        assert told == {("error: long_text: its result of 100000 characters does not fit into the context", False)}
        assert [m for m in s.messages if isinstance(m, ToolMessage)] == list(result.tools)


async def test_beside_a_result_that_is_too_long_the_others_stay_whole() -> None:
    async with Session(tools=[long_text, add], context_limit=900, pages=20) as s:
        calls = (
            ToolCall(id="1", name="add", arguments='{"a":1,"b":2}'),
            ToolCall(id="2", name="long_text", arguments="{}"),
        )
        _ = await s.add("Go.", Assistant("", tool_calls=calls))
        for call in calls:
            async with s.tool_call(call) as pending:
                pending.result = 3 if call.name == "add" else long_text()
        told = [m for m in s.messages if isinstance(m, ToolMessage)]
        assert [(m.text, m.ok) for m in told] == [
            ("3", True),
            ("error: long_text: its result of 100000 characters does not fit into the context", False),
        ]
