"""Agents as tools of agents: a sub-agent in a session of its own, and a hand-off that goes on in the same one."""

from __future__ import annotations

from typing import Any

import pytest

from agentspeed import Approval, Limits, ToolContext, ToolMessage, hand_off, sub_agent, tool
from agentspeed.errors import InvalidRequest
from agentspeed.observing import Began, Ending
from agentspeed.testing import ScriptedEngine, tool_call
from agentspeed.testing import Turn as Asked
from agentspeed.transport.base import wire

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@tool
def rhymes(word: str) -> str:
    """Words that rhyme."""
    return f"{word}: moon, soon"


@tool
def search(query: str) -> str:
    """Search."""
    return f"found {query}"


wiped: list[str] = []
asked: list[object] = []


@tool(needs_approval=True)
def wipe() -> str:
    """Wipes everything."""
    wiped.append("all")
    return "wiped"


@tool
def whose(context: ToolContext[Any]) -> str:
    """Whose data it is."""
    asked.append(context.data)
    return "yours"


class Seen:
    """An observer that keeps what began."""

    def __init__(self) -> None:
        self.told: list[Began] = []

    def began(self, what: Began) -> Seen:
        self.told.append(what)
        return self

    def ended(self, how: Ending) -> None:
        pass


writer = hand_off("writer", "You write now. Use rhymes.", tools=[rhymes])


async def test_a_sub_agent_works_in_a_session_of_its_own_and_only_its_answer_comes_back() -> None:
    def model(asked: Asked) -> str:
        if "You look things up" in asked.log:
            return "It is 42." if "found it" in asked.log else tool_call("search", query="it")
        return "Done." if "It is 42." in asked.log else tool_call("look_up", task="What is it?")

    look_up = sub_agent("look_up", "Looks things up.", system="You look things up.", tools=[search])
    async with ScriptedEngine(model) as engine:
        async with engine.session(tools=[look_up], tenant="a") as s:
            result = await s.run("Go.")
            assert (result.text, [one.text for one in result.tools]) == ("Done.", ["It is 42."])
        assert engine.live_branches == 0
        opened = [command for command in engine._server.commands if isinstance(command, wire.Open)]
        assert [command.tenant for command in opened] == ["a", "a"]


async def test_a_sub_agent_that_comes_to_nothing_is_an_error_that_says_why() -> None:
    script = [
        tool_call("look_up", task="x"),
        tool_call("search", query="a") + tool_call("search", query="b"),
        "",
        "I see.",
    ]
    look_up = sub_agent("look_up", "Looks things up.", tools=[search], limits=Limits(tool_calls=1))
    async with ScriptedEngine(script) as engine, engine.session(tools=[look_up]) as s:
        (told,) = (await s.run("Go.")).tools
        assert told.text.startswith("error: look_up: the agent ended without an answer: limits.tool_calls=1 of the run")


@pytest.mark.parametrize(
    ("options", "writes", "why"),
    [
        ({"limits": Limits(tokens=2)}, "One two three four five six.", "tokens"),
        ({"max_tokens": 2}, "One two three four five six.", "cut"),
        ({"approve": lambda call: Approval(allow=False, later=True)}, "Let me see." + tool_call("wipe"), "at once"),
    ],
)
async def test_what_a_sub_agent_said_before_it_was_ended_is_no_answer(
    options: dict[str, Any], writes: str, why: str
) -> None:
    helper = sub_agent("helper", "Helps.", tools=[wipe], **options)
    async with ScriptedEngine([tool_call("helper", task="x"), writes, "I see."]) as engine:
        async with engine.session(tools=[helper]) as s:
            (told,) = (await s.run("Go.")).tools
        assert not told.ok and told.text.startswith("error: helper: the agent ended without an answer: ")
        assert why in told.text and wiped == []
        assert engine.live_branches == 0


async def test_a_sub_agent_works_with_the_callers_data_and_is_watched_by_its_observer() -> None:
    script = [tool_call("helper", task="x"), tool_call("whose"), "It is done.", "Done."]
    asked.clear()
    helper, seen = sub_agent("helper", "Helps.", tools=[whose]), Seen()
    async with ScriptedEngine(script) as engine, engine.session(tools=[helper], observer=seen) as s:
        assert (await s.run("Go.", tool_data={"user": "ada"})).text == "Done."
        assert asked == [{"user": "ada"}]
        assert [one.tool for one in seen.told if one.kind == "tool"] == ["helper", "whose"]
        assert len({one.session_id for one in seen.told}) == 2


async def test_after_a_hand_off_the_same_session_goes_on_with_the_other_tools() -> None:
    script = [
        tool_call("transfer_to_writer"),
        tool_call("rhymes", word="June"),
        "A poem.",
        tool_call("search", query="more"),
        "Enough.",
    ]
    async with ScriptedEngine(script) as engine, engine.session(tools=[search, rhymes, writer]) as s:
        result = await s.run("Write a poem.", tools=[search, writer])
        assert [one.text for one in result.tools] == ["You write now. Use rhymes.", "June: moon, soon"]
        assert [message.text for message in s.messages if not isinstance(message, ToolMessage)][-1] == "A poem."
        first, second, _ = engine.turns
        assert first.grammar is not None and second.grammar is not None
        assert '"rhymes"' not in first.grammar.source and '"search"' not in second.grammar.source
        assert (await s.run("And now?", tools=[search, writer])).text == "Enough."


async def test_roles_may_hand_back_and_a_role_without_tools_answers() -> None:
    editor = hand_off("editor", "Edit it.", tools=["transfer_to_author"])
    author = hand_off("author", "Write it.", tools=["search", "transfer_to_closer"])
    closer = hand_off("closer", "Say goodbye.")
    script = [
        tool_call("transfer_to_editor"),
        tool_call("transfer_to_author"),
        tool_call("search", query="it") + tool_call("transfer_to_closer"),
        "Goodbye.",
    ]
    async with ScriptedEngine(script) as engine, engine.session(tools=[search, editor, author, closer]) as s:
        result = await s.run("Go.", tools=[editor])
        assert (result.text, result.reason) == ("Goodbye.", "answered")
        assert [one.text for one in result.tools] == ["Edit it.", "Write it.", "found it", "Say goodbye."]


async def test_a_hand_off_to_tools_that_the_session_does_not_have_is_refused_before_anything_runs() -> None:
    async with ScriptedEngine(["Never."]) as engine, engine.session(tools=[search, writer]) as s:
        with pytest.raises(InvalidRequest, match="hands over to the tools rhymes"):
            _ = await s.run("Write a poem.")
        assert s.messages == ()
