"""An assistant's message that was left open and is closed by what is said next stays in the history."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import Assistant, User
from agentspeed.testing import ScriptedEngine, say

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_what_a_running_turn_had_said_at_the_fork_is_a_message_of_the_child_that_is_told_something_else() -> None:
    async with ScriptedEngine([say("A long answer indeed.", seconds=0.01), "Other."]) as engine, engine.session() as s:
        async with s.stream("Tell me.") as turn:
            async for _ in turn:
                if len(turn.text) > 4:
                    break
            async with s.fork() as (child,):
                _ = await child.generate("Something else.")
                told = child.messages
        assert [type(message) for message in told] == [User, Assistant, User, Assistant]
        half = told[1].text
        assert half and "A long answer indeed.".startswith(half)
        assert (told[0].text, told[2].text, told[3].text) == ("Tell me.", "Something else.", "Other.")


async def test_a_message_that_a_rewind_cut_in_its_middle_stays_as_far_as_it_was_kept() -> None:
    async with ScriptedEngine(["A long answer indeed.", "Other."]) as engine, engine.session() as s:
        reply = await s.generate("Tell me.")
        await s.rewind(s.tokens - 4)
        _ = await s.add("Something else.")
        assert [type(message) for message in s.messages] == [User, Assistant, User]
        assert s.messages[1].text and reply.text.startswith(s.messages[1].text) and s.messages[1].text != reply.text
        again = await s.mark()
        await s.rewind(again)
        assert (await s.generate()).text == "Other."
        assert [type(message) for message in s.messages] == [User, Assistant, User, Assistant]


async def test_a_message_that_was_gone_on_with_is_one_message() -> None:
    async with ScriptedEngine(["One two three four.", " five.", "Fine."]) as engine, engine.session() as s:
        with anyio.fail_after(10):
            _ = await s.generate("Count.", max_tokens=2)
            _ = await s.generate()
            _ = await s.generate("Good.")
        assert [type(message) for message in s.messages] == [User, Assistant, User, Assistant]


async def test_an_answer_that_ended_before_anybody_read_it_is_a_message_of_a_fork() -> None:
    async with ScriptedEngine(["Hello there."]) as engine, engine.session() as s:
        async with s.stream("Hi.") as turn:
            _ = await anext(turn)  # the first event, and all others have come with it
            async with s.fork() as (child,):
                _ = await child.add("And?")
                told, ids = child.messages, child.ids
            assert (await turn.reply()).text == "Hello there."
        _ = await s.add("And?")
        assert [message.text for message in told] == ["Hi.", "Hello there.", "And?"]
        assert ids == s.ids


@pytest.mark.parametrize("script", ["Hello.", 5])
def test_a_script_is_a_list_of_texts_or_a_function(script: object) -> None:
    with pytest.raises(TypeError, match="script is"):
        _ = ScriptedEngine(script)  # type: ignore[arg-type]
