"""Searches on a real engine: what they say they cost is what the engine computed, and losers hold nothing."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import Engine
from agentspeed.search import Budget, Found, Node, beam, best_of_n, tree_of_thought

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def longest(node: Node) -> float:
    return float(len(node.whole))


async def computed(engine: Engine) -> int:
    """Rows the engine has computed, one for every token fed to the model."""
    return (await engine.stats()).counts["rows_computed"]


async def search_all(engine: Engine) -> list[tuple[Found, int]]:
    """Three searches, each with the rows it really took."""
    done: list[tuple[Found, int]] = []
    async with engine.session(seed=1, system="Use every number once. " * 6) as s:
        for name in ("best", "beam", "tree"):
            before = await computed(engine)
            match name:
                case "best":
                    found = await best_of_n(s, "Reach 9 from 4 5.", n=6, score=longest, max_tokens=12)
                case "beam":
                    found = await beam(s, "Reach 8 from 2 4.", width=2, branching=3, depth=2, score=longest, stop=",",
                                       max_tokens=8)
                case _:
                    found = await tree_of_thought(s, "Reach 8 from 2 4.", branching=2, depth=3, score=longest, stop=",",
                                                  budget=Budget(branches=6), max_tokens=8)
            done.append((found, await computed(engine) - before))
            counts = (await engine.stats()).counts
            assert (counts["branches"], counts["pages_tail"]) == (1, 0), name
    return done


async def test_a_search_costs_what_it_says_and_leaves_one_branch() -> None:
    async with Engine() as engine:
        done = await search_all(engine)
        counts = (await engine.stats()).counts
    assert counts["branches"] == 0
    assert counts["pages_free"] + counts["pages_nodes"] == counts["pages_total"]
    for found, rows in done:
        # A drawn token is a row only once it is fed, so each turn may count one more than the engine; nothing else.
        assert rows <= found.cost.tokens <= rows + found.cost.branches + 1
        assert found.cost.ratio > 1.5


async def test_a_solution_frees_the_losing_branches_while_the_session_goes_on() -> None:
    async with Engine() as engine, engine.session(seed=1) as s:
        with anyio.fail_after(60):
            found = await best_of_n(s, "Reach 9 from 4 5.", n=8, score=lambda _: 1.0, solved_at=1.0, max_tokens=200)
        assert found.ended == "solved"
        counts = (await engine.stats()).counts
        assert (counts["branches"], counts["waiting_turns"], counts["pages_tail"]) == (1, 0, 0)
        reply = await s.generate("Hello", max_tokens=4)
        assert reply.usage.recomputed == 0
