"""Searches over a scripted engine: who wins, what is closed and when, what is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from agentspeed import Session
from agentspeed.engine import NANO
from agentspeed.errors import InvalidRequest
from agentspeed.search import Budget, Found, Node, beam, best_of_n, mcts, tree_of_thought
from agentspeed.testing import ScriptedEngine, Turn, say

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def scripted(script: object, model: Path = NANO) -> AsyncIterator[tuple[ScriptedEngine, Session]]:
    async with ScriptedEngine(script, model=model) as engine, engine.session() as session:  # type: ignore[arg-type]
        yield engine, session


def digits(node: Node) -> float:
    """Scores a text by the digits in it."""
    return float("".join(character for character in node.text if character.isdigit()) or 0)


def steps(last: int) -> Callable[[Turn], str]:
    """Writes numbered steps until the message has `last` of them, then ends it."""

    def write(turn: Turn) -> str:
        message = turn.log.rsplit("<|assistant|>", 1)[-1]
        return f"step {turn.turn}\nnever read" if message.count("step") < last else f"end {turn.turn}"

    return write


async def test_the_best_of_n_becomes_the_sessions_answer_and_the_rest_is_closed() -> None:
    async with scripted(["try 1", "try 9", "try 4"]) as (engine, session):
        found = await best_of_n(session, "Go.", n=3, score=digits)
        assert (found.text, found.score, found.ended) == ("try 9", 9.0, "exhausted")
        assert session.messages[-1].text == "try 9"
        assert engine.live_branches == 1


async def test_without_adopt_the_session_is_as_it_was() -> None:
    async with scripted(["try 1", "try 9"]) as (engine, session):
        before = session.tokens
        found = await best_of_n(session, "Go.", n=2, score=digits, adopt=False)
        assert found.text == "try 9"
        assert (session.tokens, session.messages) == (before, ())
        assert engine.live_branches == 1


async def test_a_solution_ends_the_search_and_cancels_the_slow_siblings() -> None:
    slow = say("slow " * 50, seconds=0.05)
    async with scripted([slow, "try 9", slow]) as (engine, session):
        with anyio.fail_after(2):
            found = await best_of_n(session, "Go.", n=3, score=digits, solved_at=9)
        assert found.ended == "solved"
        assert sorted(node.state for node in found.root.children) == ["cut", "cut", "finished"]
        assert engine.live_branches == 1


async def test_a_branch_given_up_early_is_closed_before_its_siblings_end() -> None:
    async with scripted([say("bad " * 60, seconds=0.01), say("good " * 8, seconds=0.05)]) as (engine, session):
        live: list[int] = []

        def score(node: Node) -> float:
            live.append(engine.live_branches)
            return 1.0

        found = await best_of_n(session, "Go.", n=2, score=score, keep=lambda text: text.count("bad") < 3)
        pruned, finished = sorted(found.root.children, key=lambda node: node.state, reverse=True)
        assert (pruned.state, finished.state) == ("pruned", "finished")
        assert live == [3]  # the session, the root of the search, the sibling
        assert 0 < pruned.usage.drawn < 60


async def test_cost_counts_the_shared_context_once_and_says_what_forking_saved() -> None:
    async with scripted(["a b c", "d e f", "g h i", "j k l"]) as (_, session):
        found = await best_of_n(session, "word " * 200, n=4, score=lambda _: 1.0)
        assert found.cost.branches == 4
        assert found.cost.tokens < 1.5 * session.tokens
        assert found.cost.ratio > 2.5
        assert "without fork" in str(found)


@pytest.mark.parametrize(
    ("budget", "ended"),
    [(Budget(branches=2), "branches"), (Budget(seconds=0.2), "seconds"), (Budget(tokens=40), "tokens")],
)
async def test_a_budget_ends_the_search_and_leaves_nothing_open(budget: Budget, ended: str) -> None:
    async with scripted(lambda _: say("word " * 12, seconds=0.01)) as (engine, session):
        found = await best_of_n(session, "Go.", n=40, at_once=1, score=lambda _: 1.0, budget=budget)
        assert found.ended == ended
        assert found.cost.branches < 40
        assert [node.state for node in found.root.children][-1] == ("cut" if ended == "seconds" else "finished")
        assert engine.live_branches == 1


@pytest.mark.parametrize(
    ("budget", "ended"), [(Budget(branches=2), "branches"), (Budget(tokens=16), "tokens"), (Budget(), "exhausted")]
)
async def test_a_search_that_its_budget_made_smaller_says_so(budget: Budget, ended: str) -> None:
    async with scripted(["try 1 and then some more words", "try 9 and then some more words"] * 2) as (engine, session):
        found = await best_of_n(session, "Go.", n=4, score=digits, budget=budget)
        assert found.ended == ended
        assert engine.live_branches == 1


async def test_tokens_drawn_stay_inside_a_token_budget() -> None:
    async with scripted(lambda _: "word " * 100) as (_, session):
        found = await best_of_n(session, "Go.", n=4, score=lambda _: 1.0, budget=Budget(tokens=200), at_once=4)
        assert found.cost.tokens <= 200 + 4 * 8  # a child may compute its generation prompt


async def test_beam_keeps_the_best_and_goes_on_with_the_open_message() -> None:
    async with scripted(steps(2)) as (engine, session):
        found = await beam(session, "Go.", width=2, branching=3, depth=4, score=digits, temperature=0.5)
        assert found.best is not None
        assert [node.depth for node in found.best.path()] == [0, 1, 2, 3]
        assert found.text.startswith("step ")
        assert found.text.count("\n") == 2
        assert session.messages[-1].text == found.text
        first = sorted(found.root.children, key=digits)
        assert [node.state for node in first] == ["pruned", "open", "open"]
        assert engine.live_branches == 1


async def test_tree_of_thought_goes_on_with_the_most_promising_branch_anywhere() -> None:
    async with scripted(steps(2)) as (_, session):
        found = await tree_of_thought(session, "Go.", branching=2, depth=3, score=digits, budget=Budget(branches=6))
        assert found.ended == "branches"
        worse, better = sorted(found.root.children, key=digits)
        assert (len(worse.children), len(better.children)) == (0, 2)


async def test_a_step_under_the_least_score_is_closed_at_once_and_never_gone_on_with() -> None:
    async with scripted(steps(1)) as (engine, session):
        found = await tree_of_thought(session, "Go.", branching=3, depth=3, score=digits, least=3, adopt=False)
        good = [node for node in found.root.children if node.state == "open"]
        assert [digits(node) for node in good] == [3]
        assert all(not node.children for node in found.root.children if node not in good)
        assert engine.live_branches == 1


async def test_mcts_plays_to_the_end_and_tells_the_path_its_score() -> None:
    async with scripted(steps(2)) as (engine, session):
        found = await mcts(session, "Go.", iterations=6, branching=2, score=lambda node: (node.number % 5) / 5)
        assert found.best is not None
        assert found.best.state == "finished"
        assert found.root.visits == 6
        assert found.root.value == pytest.approx(sum(child.value for child in found.root.children))
        assert engine.live_branches == 1


async def test_an_own_attempt_may_use_several_turns() -> None:
    async def attempt(branch: Session) -> str:
        first = await branch.generate(None)
        second = await branch.generate("Are you sure?")
        return f"{first.text} {second.text}"

    async with scripted(lambda turn: f"answer {turn.turn}") as (_, session):
        found = await best_of_n(session, "Go.", n=2, score=digits, attempt=attempt)
        assert found.best is not None
        assert found.best.usage.turns == 2
        assert len(session.messages) == 4


async def test_a_score_that_raises_ends_the_search_and_leaves_the_session_usable() -> None:
    def score(_: Node) -> float:
        raise KeyError("mine")

    async with scripted(["a", "b", "still here"]) as (engine, session):
        with pytest.raises(KeyError, match="mine"):
            _ = await best_of_n(session, "Go.", n=2, score=score)
        assert engine.live_branches == 1
        assert (await session.generate("Hello?")).text == "still here"


async def test_cancelling_a_search_leaves_nothing_open() -> None:
    async with scripted(lambda _: say("slow " * 50, seconds=0.05)) as (engine, session):
        with anyio.move_on_after(0.2) as scope:
            _ = await best_of_n(session, "Go.", n=4, score=digits)
        assert scope.cancelled_caught
        assert engine.live_branches == 1
        assert session.messages == ()


async def test_nothing_found_is_said_and_not_an_error() -> None:
    async with scripted(lambda _: "bad") as (_, session):
        found = await best_of_n(session, "Go.", n=2, score=digits, keep=lambda _: False)
        assert (found.best, found.text, found.score) == (None, "", None)
        assert session.messages == ()


async def test_the_tree_shows_every_branch_once() -> None:
    async with scripted(["try 1", "try 9"]) as (_, session):
        found: Found = await best_of_n(session, "Go.", n=2, score=digits)
        assert "*     9  try 9  [finished" in str(found)
        assert len(found.tree().children) == 2


@pytest.mark.parametrize("bound", ["tokens", "seconds", "branches"])
def test_a_budget_of_nothing_is_refused_by_name(bound: str) -> None:
    with pytest.raises(InvalidRequest, match=bound):
        _ = Budget(**{bound: 0})


async def test_a_bound_below_one_is_refused_by_name() -> None:
    async with scripted([]) as (_, session):
        with pytest.raises(InvalidRequest, match="width is 0"):
            _ = await beam(session, "Go.", width=0, branching=1, depth=1, score=digits)
