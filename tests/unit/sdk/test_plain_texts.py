"""Sessions over a text: wherever one is cut, copied or scored, no id of the chat template comes in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from agentspeed import Session
from agentspeed.errors import InvalidRequest, MarkNotFound
from agentspeed.testing import ScriptedEngine
from agentspeed.testing import Turn as Asked

pytestmark = pytest.mark.anyio
TEXT = "One two three four"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def engine(anyio_backend: str) -> AsyncIterator[ScriptedEngine]:
    def model(asked: Asked) -> str:
        return " and so on" if asked.session_turn == 1 else " for ever"

    async with ScriptedEngine(model) as made:
        yield made


async def test_a_text_goes_on_from_any_place_in_it_as_it_stands(engine: ScriptedEngine) -> None:
    async with Session.over_text(TEXT, engine.engine) as s:
        given = s.ids
        for at in range(1, len(given) + 1):
            async with s.fork(at=at) as (child,), s.copy(at=at) as copy:
                for other in (child, copy, child):
                    before = other.ids
                    reply = await other.generate()
                    assert before[:at] == given[:at] and other.ids == before + reply.ids
        await s.rewind(2)
        async with Session.restore(await s.snapshot(), engine.engine) as again:
            await again.rewind(1)
            reply = await again.generate()
            assert again.ids == given[:1] + reply.ids and again.messages == ()


async def test_a_text_is_scored_where_it_was_cut_and_stays_as_it_is() -> None:
    logs: list[str] = []

    def model(asked: Asked) -> str:
        logs.append(asked.log)
        return " three"

    async with ScriptedEngine(model) as engine, Session.over_text(TEXT, engine.engine) as s:
        tokenizer = engine.engine.codec.tokenizer
        (place,) = [at for at in range(1, s.tokens) if tokenizer.text(list(s.ids[:at])).endswith("two")]
        await s.rewind(place)
        before = s.ids
        score = await s.score(" three")
        assert (s.ids, logs) == (before, ["One two"]) and len(score.logprobs) == len(score.ids)


async def test_before_its_first_token_there_is_nothing_to_go_back_to(engine: ScriptedEngine) -> None:
    async with Session.over_text(TEXT, engine.engine) as s:
        before = s.ids
        for cut in (lambda: s.fork(at=0), lambda: s.copy(at=0)):
            with pytest.raises(MarkNotFound, match="before the text"):
                _ = cut()
        with pytest.raises(MarkNotFound, match="before the text"):
            await s.rewind(0)
        assert s.ids == before


@pytest.mark.parametrize("ids", [[2**32], [1, -1], [1.0], ["a"], [True], [2**80], [], 7, b"ab"], ids=repr)
async def test_what_are_no_token_ids_is_refused_where_it_is_given(engine: ScriptedEngine, ids: Any) -> None:
    with pytest.raises(InvalidRequest, match="text "):
        _ = Session.over_text(ids, engine.engine)
    async with engine.session() as s:
        with pytest.raises(InvalidRequest, match="text "):
            _ = await s.score(ids, after="Hi")
        assert engine.turns == () and s.messages == ()
