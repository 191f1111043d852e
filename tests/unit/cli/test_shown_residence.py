"""What a session shows of its rows never exceeds the tokens that it has."""

from __future__ import annotations

import pytest

from agentspeed.testing import ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_after_a_rewind_no_more_rows_are_shown_than_tokens() -> None:
    async with ScriptedEngine(["A long answer with many words."]) as engine, engine.session() as s:
        start = await s.mark()
        _ = await s.generate("Hi")
        await s.rewind(s.tokens - 5)
        assert s.residence.device + s.residence.host + s.residence.lost == s.tokens
        await s.rewind(start)
        assert s.residence.device + s.residence.host + s.residence.lost == s.tokens == start.tokens


async def test_a_child_of_an_earlier_place_shows_only_its_own_rows() -> None:
    async with ScriptedEngine(["A long answer with many words."]) as engine, engine.session() as s:
        _ = await s.generate("Hi")
        async with s.fork(at=3) as (child,):
            assert child.residence.device + child.residence.host + child.residence.lost == child.tokens == 3


async def test_added_messages_show_as_not_computed() -> None:
    async with ScriptedEngine(["Fine."]) as engine, engine.session() as s:
        _ = await s.generate("Hi")
        cached = s.residence.device
        _ = await s.add("More.")
        assert (s.residence.device, s.residence.device + s.residence.host + s.residence.lost) == (cached, s.tokens)
