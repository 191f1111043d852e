"""`Session(max_tokens=...)`: the bound of every turn that is given no other."""

from __future__ import annotations

from typing import Any

import pytest

from agentspeed import Session, errors, sync
from agentspeed.search import best_of_n
from agentspeed.testing import ScriptedEngine

pytestmark = pytest.mark.anyio
TEXT = "One two three four five six seven eight."


async def test_it_bounds_each_turn_and_a_turn_may_have_another() -> None:
    async with ScriptedEngine([TEXT] * 3) as engine, engine.session(max_tokens=3) as s:
        assert (await s.generate("Go.")).usage.drawn == 3
        assert (await s.generate("Go.", max_tokens=5)).usage.drawn == 5
        result = await s.run("Go.")
        assert (result.usage.drawn, result.reason) == (3, "cut")


async def test_forks_copies_and_snapshots_have_it_too() -> None:
    async with ScriptedEngine([TEXT] * 4) as engine, engine.session(max_tokens=3) as s:
        async with s.fork() as (branch,):
            assert (await branch.generate("Go.")).usage.drawn == 3
        async with s.copy() as other:
            assert (await other.generate("Go.")).usage.drawn == 3
        data = await s.snapshot()
        async with Session.restore(data, engine.engine) as again:
            assert (await again.generate("Go.")).usage.drawn == 3
        async with Session.restore(data, engine.engine, max_tokens=4) as again:
            assert (await again.generate("Go.")).usage.drawn == 4


async def test_a_text_is_scored_whole() -> None:
    async with ScriptedEngine([TEXT]) as engine, engine.session(max_tokens=1) as s:
        assert len((await s.score(TEXT)).ids) > 1


async def test_a_search_keeps_to_it() -> None:
    async with ScriptedEngine(lambda asked: TEXT) as engine, engine.session(max_tokens=3) as s:
        three = (await s.generate("Go.")).text
        found = await best_of_n(s, "Go.", n=2, score=lambda node: 1.0)
        assert found.best is not None and found.best.text == three


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "8"])
async def test_a_bound_out_of_range_is_refused_where_it_is_given(most: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match="max_tokens"):
        _ = Session(max_tokens=most)


def test_a_session_without_async_has_it() -> None:
    with sync.entered(ScriptedEngine([TEXT])) as engine, sync.Session(engine.engine, max_tokens=3) as s:
        assert s.generate("Go.").usage.drawn == 3
