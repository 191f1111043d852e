"""A turn that is followed is over when its time is, also where what it says is told too slowly."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import errors, events
from agentspeed.testing import ScriptedEngine
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


async def too_slow(batch: list[events.AnyEvent]) -> None:
    await anyio.sleep(60)


async def test_a_turn_that_was_not_told_to_its_end_in_time_leaves_no_trace() -> None:
    async with ScriptedEngine(["One.", "Two."]) as engine, engine.session() as s:
        with pytest.raises(errors.TurnTimeout) as late:
            async with s.stream("Count.", timeout=0.2) as turn:
                await turn.follow(too_slow)
        assert (s.messages, late.value.partial) == ((), "One.")
        assert (await s.generate("Count.")).text == "Two."


async def slow_at_the_end(batch: list[events.AnyEvent]) -> None:
    if any(isinstance(event, events.TurnFinished) for event in batch):
        await anyio.sleep(60)


async def test_a_turn_whose_very_end_was_not_told_in_time_leaves_no_trace_either() -> None:
    async with ScriptedEngine(["One.", "Two."]) as engine, engine.session() as s:
        with pytest.raises(errors.TurnTimeout) as late:
            async with s.stream("Count.", timeout=0.2) as turn:
                await turn.follow(slow_at_the_end)
        assert (s.messages, late.value.partial) == ((), "One.")
        assert (await s.generate("Count.")).text == "Two."


async def test_who_leaves_while_the_very_end_is_told_can_ask_again_as_if_for_the_first_time() -> None:
    """A client cannot know that an answer it has not heard to its end was complete: it sends the request again."""
    async with ScriptedEngine(["One.", "Two."]) as engine, engine.session() as s:
        telling = anyio.Event()

        async def tell(batch: list[events.AnyEvent]) -> None:
            if any(isinstance(event, events.TurnFinished) for event in batch):
                telling.set()
                await anyio.sleep_forever()

        async def ask() -> None:
            async with s.stream("Count.") as turn:
                await turn.follow(tell)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await telling.wait()
            group.cancel_scope.cancel()
        assert s.messages == ()
        assert (await s.generate("Count.")).text == "Two."
        assert len(s.messages) == 2


async def test_a_text_to_be_kept_is_kept_where_its_end_was_not_told_in_time() -> None:
    async with ScriptedEngine(["One.", "Two."]) as engine, engine.session() as s:
        with pytest.raises(errors.TurnTimeout):
            async with s.stream("Count.", timeout=0.2, keep_on_cancel=True) as turn:
                await turn.follow(slow_at_the_end)
        assert [message.text for message in s.messages] == ["Count.", "One."]
        assert (await s.generate("On.")).text == "Two."


async def test_a_turn_whose_end_was_heard_before_its_engine_went_is_whole() -> None:
    async with ScriptedEngine(["One.", "Two."]) as engine, engine.session() as s:
        heard: list[str] = []

        async def tell(batch: list[events.AnyEvent]) -> None:
            heard.extend(event.text for event in batch if isinstance(event, events.TextDelta))
            if any(isinstance(event, events.TurnStarted) for event in batch):
                await anyio.sleep(0.1)  # by now the end has come
                (await s.engine.link()).close()
                await anyio.sleep(0.1)

        async with s.stream("Count.") as turn:
            await turn.follow(tell)
            assert turn.result().text == "".join(heard) == "One."
        assert [message.text for message in s.messages] == ["Count.", "One."]
        assert s.position(1) < s.position(2) == s.tokens
        assert (await s.generate("On.")).text == "Two."
        assert [message.text for message in s.messages] == ["Count.", "One.", "On.", "Two."]
