"""Results of tools that are hard to write into a log: each call gets one all the same, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentspeed import Assistant, Session, ToolCall, ToolContext, ToolMessage
from agentspeed.chat.codec import ChatCodec
from agentspeed.errors import ContextOverflow, InvalidRequest
from agentspeed.testing import ScriptedEngine, tool_call
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import folder_of

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


async def test_a_tool_whose_result_could_not_be_written_is_not_called_again() -> None:
    paid: list[int] = []

    def pay(amount: int) -> str:
        """Pay an amount."""
        paid.append(amount)
        return "paid"

    script = [tool_call("pay", amount=3)]
    async with ScriptedEngine(script) as engine, engine.session(tools=[pay]) as s:
        _ = await s.generate("Pay.")
        full = s.tokens
    async with ScriptedEngine(script, context_limit=full) as engine, engine.session(tools=[pay]) as s:
        with pytest.raises(ContextOverflow):
            _ = await s.run("Pay.")
        with pytest.raises(ContextOverflow):
            _ = await s.run()
        assert paid == [3]


async def test_a_copy_has_the_results_that_wait_for_others() -> None:
    added: list[int] = []

    def add_up(a: int) -> int:
        """Add up."""
        added.append(a)
        return a

    script = [tool_call("add_up", a=1) + tool_call("add_up", a=2), "3."]
    async with ScriptedEngine(script) as engine, engine.session(tools=[add_up]) as s:
        first, _ = (await s.generate("Add.")).tool_calls
        async with s.tool_call(first) as pending:
            pending.result = "by hand"
        async with s.copy() as other:
            result = await other.run()
    assert added == [2]
    assert [message.text for message in result.tools] == ["by hand", "2"]


async def test_two_calls_that_a_model_gave_one_id_are_two_calls(tmp_path: Path) -> None:
    kimi = FAMILIES["kimi k2"]
    one = '<|tool_call_begin|>functions.echo:0<|tool_call_argument_begin|>{"word": "%s"}<|tool_call_end|>'
    calls = f"<|tool_calls_section_begin|>{one % 'a'}{one % 'b'}<|tool_calls_section_end|>"

    def echo(word: str) -> str:
        """Say it again."""
        return word

    folder = folder_of(tmp_path / "m", kimi.template, kimi.controls)
    async with ScriptedEngine([calls, "Done."], model=folder) as engine, engine.session(tools=[echo]) as s:
        result = await s.run("Go.")
    assert [message.text for message in result.tools] == ["a", "b"]


async def test_a_text_that_looks_like_a_number_stays_one_in_a_family_that_writes_no_quotes(tmp_path: Path) -> None:
    def either(value: str | int) -> str:
        """Take both."""
        return type(value).__name__

    def text(value: str) -> str:
        """Take texts."""
        return type(value).__name__

    coder = FAMILIES["qwen 3 coder"]
    folder = folder_of(tmp_path / "m", coder.template, coder.controls, plain=coder.plain, end="<|im_end|>")
    call = "<tool_call>\n<function={}>\n<parameter=value>\n{}\n</parameter>\n</function>\n</tool_call>"
    script = ["\n".join((call.format("either", 5), call.format("either", '"5"'), call.format("text", 5))), "Done."]
    async with ScriptedEngine(script, model=folder) as engine, engine.session(tools=[either, text]) as s:
        result = await s.run("Go.")
        assert [message.text for message in result.tools] == ["int", "str", "str"]
        calls = tuple(ToolCall(id=name, name=name, arguments='{"value": "5"}') for name in ("either", "text"))
        _ = await s.add("On.", Assistant("", calls))
        written = ChatCodec(folder).tokenizer.text(list(s.ids))
        assert written.count(call.format("either", '"5"')) == 2 and written.count(call.format("text", 5)) == 2
