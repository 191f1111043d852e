"""Lists of messages of other SDKs go into a session and come out of it, and say the same."""

from __future__ import annotations

from typing import Any

import pytest

from agentspeed import Session, errors
from agentspeed.message_formats import anthropic, openai
from agentspeed.message_formats.misfit import MessageMisfit
from agentspeed.messages import User
from agentspeed.server.openai import items
from agentspeed.testing import ScriptedEngine
from agentspeed.tools import tool
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":17,"b":25}'}}
_OPENAI: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 plus 25?"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]
_ANTHROPIC: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "What is 17 plus 25?"}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 17, "b": 25}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "42"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is 42."}]},
]


async def test_both_forms_make_the_same_session_and_come_out_as_they_went_in() -> None:
    async with ScriptedEngine(["Yes.", "Yes."]) as scripted:
        one = Session.from_messages(_OPENAI, scripted.engine, tools=[add])
        other = Session.from_messages(_ANTHROPIC, scripted.engine, format="anthropic", system="Be brief.", tools=[add])
        async with one, other:
            assert one.ids == other.ids
            assert one.to_messages() == _OPENAI
            assert one.to_messages("anthropic") == other.to_messages("anthropic") == _ANTHROPIC
            assert (await one.generate("Are you sure?")).text == "Yes."
            assert one.to_messages()[-2:] == [
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": "Yes."},
            ]


async def test_a_list_that_cannot_be_read_is_refused_before_anything_is_opened() -> None:
    async with ScriptedEngine([]) as scripted:
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        with pytest.raises(MessageMisfit) as caught:
            _ = Session.from_messages(image, scripted.engine)
        assert caught.value.where.startswith("messages[0]")
        with pytest.raises(errors.InvalidRequest, match="another"):
            _ = Session.from_messages(_OPENAI, scripted.engine, system="Be long.")
        with pytest.raises(errors.InvalidRequest, match="'openai' or 'anthropic'"):
            _ = Session.from_messages(_OPENAI, scripted.engine, format="mine")  # type: ignore[arg-type]
        assert scripted.live_branches == 0


async def test_a_list_that_does_not_fit_leaves_nothing_open() -> None:
    async with ScriptedEngine([], context_limit=64) as scripted:
        session = Session.from_messages([{"role": "user", "content": "word " * 200}], scripted.engine)
        with pytest.raises(errors.ContextOverflow):
            async with session:
                _ = await session.generate()
        assert session.state == "closed"
        assert scripted.live_branches == 0


@pytest.mark.parametrize("absent", [{}, {"content": None}, {"content": []}], ids=["missing", "null", "empty list"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_message_without_content_is_refused_and_named(role: str, absent: dict[str, Any]) -> None:
    with pytest.raises(MessageMisfit, match="has no content") as caught:
        _ = openai.conversation_parts([{"role": role, **absent}])
    assert caught.value.where == "messages[0].content"
    with pytest.raises(MessageMisfit, match="has no content") as caught:
        _ = items.read_items([{"role": role, **absent}])
    assert caught.value.where == "input[0].content"
    if role == "user":
        with pytest.raises(MessageMisfit, match="has no content") as caught:
            _ = anthropic.conversation_parts(None, [{"role": "user", **absent}])
        assert caught.value.where == "messages.0.content"


def test_content_of_another_type_is_refused_and_an_empty_text_is_content() -> None:
    with pytest.raises(MessageMisfit):
        _ = anthropic.conversation_parts(None, [{"role": "user", "content": 5}])
    with pytest.raises(MessageMisfit):
        _ = openai.conversation_parts([{"role": "user", "content": 5}])
    assert anthropic.conversation_parts(None, [{"role": "user", "content": ""}])[1] == (User(""),)
    assert openai.conversation_parts([{"role": "user", "content": ""}])[1] == (User(""),)
