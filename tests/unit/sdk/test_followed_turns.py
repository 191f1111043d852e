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
