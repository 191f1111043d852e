"""A place in a log is the same place however it is named: by a mark, by its position, in a fork or in a copy."""

from __future__ import annotations

import pytest

from agentspeed import Choice, errors
from agentspeed.testing import ScriptedEngine
from tests.support.loops import on_asyncio as on_asyncio

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "ended by its grammar"])
async def test_what_is_said_at_a_place_is_written_as_at_its_mark_whatever_was_said_there_before(cut: bool) -> None:
    script = ["yes", "Two.", "Two."]
    async with ScriptedEngine(script) as engine, engine.session() as s:
        _ = await (s.generate("One.", max_tokens=1) if cut else s.generate("One.", output=Choice("yes", "no")))
        mark, place = await s.mark(), s.tokens
        _ = await s.generate("Two?")
        async with s.fork(at=mark) as (child,), s.copy(at=place) as other:
            for one in (child, other):
                _ = await one.add("Three?")
            forked, copied = child.ids, other.ids
        await s.rewind(mark)
        _ = await s.add("Three?")
        expected = s.ids
        await s.rewind(mark)
        _ = await s.generate("Two?")
        await s.rewind(place)
        _ = await s.add("Three?")
        assert s.ids == forked == copied == expected


async def test_a_mark_that_a_child_went_back_to_before_of_is_gone_once_the_child_is_adopted() -> None:
    async with ScriptedEngine(["One.", "Something else, and longer than that."]) as engine, engine.session() as s:
        start = await s.mark("start")
        _ = await s.generate("A?")
        async with s.fork() as (child,):
            _ = await s.mark("late")
            await child.rewind(start)
            _ = await child.generate("Quite another question.")
            said = child.ids
            await s.adopt(child)
        with pytest.raises(errors.MarkNotFound, match="late"):
            await s.rewind("late")
        assert s.ids == said
        await s.rewind("start")
        assert s.messages == ()


async def test_a_child_that_adopted_its_own_childs_child_can_be_adopted() -> None:
    async with ScriptedEngine(["Three."]) as engine, engine.session() as s:
        async with s.fork() as (child,), child.fork() as (second,), second.fork() as (third,):
            _ = await third.generate("Count.")
            said = third.ids
            await child.adopt(second)
            await child.adopt(third)
            await s.adopt(child)
            assert s.ids == said
        assert engine.live_branches == 1


async def test_a_message_that_is_open_at_a_mark_is_open_in_a_fork_and_in_a_copy_there() -> None:
    script = ["One two three.", "Stopped.", " More.", " More."]
    async with ScriptedEngine(script) as engine, engine.session() as s:
        begun = (await s.generate("Count.", max_tokens=2)).text
        mark = await s.mark()
        _ = await s.generate("Stop.")
        async with s.fork(at=mark) as (child,), s.copy(at=mark) as other:
            for one in (child, other):
                assert (await one.generate()).text == f"{begun} More."
