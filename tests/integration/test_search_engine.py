"""Searches on a real engine: what they say they cost is what the engine computed, and losers hold nothing."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import Engine, Session
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
                    found = await beam(
                        s, "Reach 8 from 2 4.", width=2, branching=3, depth=2, score=longest, stop=",", max_tokens=8
                    )
                case _:
                    found = await tree_of_thought(
                        s,
                        "Reach 8 from 2 4.",
                        branching=2,
                        depth=3,
                        score=longest,
                        stop=",",
                        budget=Budget(branches=6),
                        max_tokens=8,
                    )
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


async def test_own_attempts_stay_inside_a_token_budget_by_the_engines_own_count() -> None:
    async def attempt(branch: Session) -> str:
        first = await branch.generate(None, max_tokens=8, temperature=1.0)
        second = await branch.generate("Again.", max_tokens=8, temperature=1.0)
        return first.text + second.text

    async with Engine() as engine, engine.session(seed=1) as s:
        before = await computed(engine)
        found = await best_of_n(s, "Reach 9 from 4 5.", n=40, score=longest, attempt=attempt, budget=Budget(tokens=300))
        assert found.ended == "tokens"
        assert 2 < found.cost.branches < 40
        largest = max(node.usage.computed for node in found.root.children)
        assert await computed(engine) - before <= found.cost.tokens <= 300 + largest
        assert (await engine.stats()).counts["branches"] == 1


async def test_a_losing_answer_is_closed_on_the_engine_while_its_siblings_go_on() -> None:
    held: list[int] = []

    async with Engine() as engine, engine.session(seed=1) as s:

        async def attempt(branch: Session) -> str:
            reply = await branch.generate(None, max_tokens=8, temperature=1.0)
            await anyio.sleep(0.4 * int(branch.id.rsplit(".", 1)[-1]))  # they end in the order of their numbers
            return reply.text

        async def score(node: Node) -> float:
            held.append((await engine.stats()).counts["branches"])
            return -float(node.number)

        found = await best_of_n(s, "Reach 9 from 4 5.", n=4, score=score, attempt=attempt)
        assert found.best is found.root.children[0]
    assert held == [6, 6, 5, 4]  # the session, the root, the best so far, the one that is scored and those after it
