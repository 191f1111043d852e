"""What a search holds and spends while it runs: own attempts in a token budget, losers, twins, and what was cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from agentspeed import Session
from agentspeed.errors import InvalidRequest
from agentspeed.search import Budget, Node, beam, best_of_n, mcts, tree_of_thought
from agentspeed.testing import ScriptedEngine, Turn, say

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def scripted(script: object) -> AsyncIterator[tuple[ScriptedEngine, Session]]:
    async with ScriptedEngine(script) as engine, engine.session() as session:  # type: ignore[arg-type]
        yield engine, session


def digits(node: Node) -> float:
    """Scores a text by the digits in it."""
    return float("".join(character for character in node.text if character.isdigit()) or 0)


async def attempt(branch: Session) -> str:
    """Two turns, as an agent takes them."""
    _ = await branch.generate(None)
    return (await branch.generate("Are you sure?")).text


# ---- own attempts in a token budget ---------------------------------------------------------------------------------
async def test_no_own_attempt_begins_once_the_token_budget_is_spent() -> None:
    async with scripted(lambda _: "word " * 12) as (engine, session):
        found = await best_of_n(session, "Go.", n=16, score=lambda _: 1.0, attempt=attempt, budget=Budget(tokens=30))
        assert (found.cost.branches, found.ended) == (1, "tokens")
        assert found.best is not None
        assert engine.live_branches == 1


async def test_own_attempts_that_cost_alike_stay_inside_the_token_budget() -> None:
    async with scripted(lambda _: "word " * 12) as (_, session):
        one = await best_of_n(session, "Go.", n=1, score=lambda _: 1.0, attempt=attempt, adopt=False)
        budget = Budget(tokens=one.cost.tokens * 5)
        found = await best_of_n(session, "Go.", n=16, score=lambda _: 1.0, attempt=attempt, budget=budget)
        assert found.ended == "tokens"
        assert found.cost.branches >= 5
        assert budget.tokens is not None
        assert found.cost.tokens <= budget.tokens


async def test_own_attempts_pass_a_token_budget_by_what_they_take_beyond_the_largest_before() -> None:
    async with scripted(lambda turn: "word " * (1 if turn.turn == 1 else 30)) as (_, session):

        async def uneven(branch: Session) -> str:
            return (await branch.generate(None)).text

        found = await best_of_n(session, "Go.", n=16, score=lambda _: 1.0, attempt=uneven, budget=Budget(tokens=40))
        first, *later = [node.usage.computed for node in found.root.children]
        assert found.ended == "tokens"
        assert found.cost.tokens <= 40 + sum(tokens - first for tokens in later)
        assert len(later) <= 40 // first


async def test_own_attempts_without_a_token_budget_begin_at_once() -> None:
    running = most = 0

    async def slow(branch: Session) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.01)
        running -= 1
        return (await branch.generate(None)).text

    async with scripted(lambda _: "word") as (_, session):
        found = await best_of_n(session, "Go.", n=4, score=lambda _: 1.0, attempt=slow)
        assert (most, found.cost.branches, found.ended) == (4, 4, "exhausted")


# ---- bounds ---------------------------------------------------------------------------------------------------------
async def test_branches_are_unbounded_when_the_budget_says_none() -> None:
    async with scripted(lambda turn: f"try {turn.turn}") as (_, session):
        found = await best_of_n(session, "Go.", n=300, score=digits, budget=Budget(branches=None))
        assert (found.cost.branches, found.ended) == (300, "exhausted")


async def test_a_search_step_by_step_may_have_unbounded_branches() -> None:
    free = Budget(branches=None)
    async with scripted(lambda turn: f"step {turn.turn}\nmore") as (engine, session):
        for search in (
            beam(session, "Go.", width=1, branching=2, depth=2, score=digits, budget=free),
            tree_of_thought(session, "Go.", branching=2, depth=2, score=digits, budget=free),
            mcts(session, "Go.", iterations=2, score=digits, budget=free),
        ):
            assert (await search).ended == "exhausted"
        assert engine.live_branches == 1


# ---- losers ---------------------------------------------------------------------------------------------------------
async def held_when_scored(
    engine: ScriptedEngine, search: Callable[[Callable[[Node], Awaitable[float]]], Awaitable[object]]
) -> list[int]:
    """How many branches were open each time a node was scored, once what had ended before was closed."""
    held: list[int] = []

    async def score(node: Node) -> float:
        await anyio.sleep(0.02)
        held.append(engine.live_branches)
        return digits(node)

    _ = await search(score)
    return held


def one_after_the_other(*texts: str) -> Callable[[Turn], object]:
    """Each turn ends clearly later than the one before."""
    return lambda turn: say(texts[turn.turn - 1], seconds=0.2 * turn.turn)


async def test_an_answer_that_scores_below_the_best_so_far_is_closed_while_its_siblings_run() -> None:
    async with scripted(one_after_the_other("9", "5", "4", "3")) as (engine, session):
        held = await held_when_scored(engine, lambda score: best_of_n(session, "Go.", n=4, score=score))
        assert held == [6, 6, 5, 4]  # the session, the root, the best so far, the one that is scored and those after it


async def test_a_best_answer_that_is_beaten_is_closed_while_its_siblings_run() -> None:
    async with scripted(one_after_the_other("3", "4", "5", "9")) as (engine, session):
        held = await held_when_scored(engine, lambda score: best_of_n(session, "Go.", n=4, score=score))
        assert held == [6, 6, 5, 4]
        assert session.messages[-1].text == "9"


async def test_a_step_of_a_beam_is_closed_once_width_better_ones_are_known() -> None:
    async with scripted(one_after_the_other("9\nx", "5\nx", "4\nx", "3\nx")) as (engine, session):
        held = await held_when_scored(
            engine, lambda score: beam(session, "Go.", width=1, branching=4, depth=1, score=score)
        )
        assert held == [6, 6, 5, 4]


async def test_a_step_whose_every_continuation_lost_is_closed_with_them() -> None:
    live: list[int] = []

    def write(turn: Turn) -> str:
        message = turn.log.rsplit("<|assistant|>", 1)[-1]
        return f"step {turn.turn}\nmore" if not message else f"bad {turn.turn}\nmore"

    def score(node: Node) -> float:
        live.append(engine.live_branches)
        return -1.0 if "bad" in node.text else digits(node)

    async with scripted(write) as (engine, session):
        found = await tree_of_thought(session, "Go.", branching=2, depth=3, score=score, least=0, at_once=1)
        assert [len(node.children) for node in found.root.children] == [2, 2]
        # The session, the root and two steps. A better step with two continuations; then the other one with its two.
        assert live == [4, 4, 6, 5, 5, 4]


async def test_beam_goes_on_from_the_best_in_the_order_of_their_scores() -> None:
    async with scripted(lambda turn: f"{turn.turn % 4}\nmore") as (engine, session):
        found = await beam(session, "Go.", width=2, branching=4, depth=2, score=digits, at_once=1)
        first = {node.text.strip(): len(node.children) for node in found.root.children}
        assert first == {"1": 0, "2": 4, "3": 4, "0": 0}
        (best,) = [node for node in found.root.children if node.text.strip() == "3"]
        assert [child.number for child in best.children] == [5, 6, 7, 8]
        assert engine.live_branches == 1


async def test_a_branch_that_was_cut_keeps_its_text() -> None:
    slow = say("slow " * 50, seconds=0.02)
    async with scripted([slow, say("try 9 of all of them here", seconds=0.02), slow]) as (_, session):
        found = await best_of_n(session, "Go.", n=3, score=digits, solved_at=9)
        cut = [node for node in found.root.children if node.state == "cut"]
        assert len(cut) == 2
        assert all(node.text.startswith("slow") and node.whole == node.text for node in cut)
        assert "slow" in str(found)


async def test_a_branch_cut_by_the_seconds_keeps_its_text() -> None:
    async with scripted(lambda _: say("slow " * 50, seconds=0.02)) as (_, session):
        found = await best_of_n(session, "Go.", n=2, score=digits, budget=Budget(seconds=0.5))
        assert [node.state for node in found.root.children] == ["cut", "cut"]
        assert all(node.text.startswith("slow") for node in found.root.children)


async def test_an_own_attempt_that_was_cut_keeps_the_last_message_it_said() -> None:
    async with scripted(["draft", say("slow " * 50, seconds=0.02)]) as (_, session):
        found = await best_of_n(session, "Go.", n=1, score=digits, attempt=attempt, budget=Budget(seconds=0.5))
        (node,) = found.root.children
        assert (node.state, node.text) == ("cut", "draft")


async def test_an_answer_whose_scoring_was_cut_is_no_finished_one() -> None:
    async def score(node: Node) -> float:
        if node.text != "try 9":
            await anyio.sleep(30)
        return 9.0

    async with scripted(["try 1", say("try 9", seconds=0.02)]) as (engine, session):
        found = await best_of_n(session, "Go.", n=2, score=score, solved_at=9)
        ends = sorted((node.state, node.text) for node in found.root.children)
        assert ends == [("cut", "try 1"), ("finished", "try 9")]
        assert engine.live_branches == 1


# ---- twins ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["beam", "tree"])
async def test_siblings_that_wrote_the_same_step_are_one(method: str) -> None:
    scored: list[str] = []

    def score(node: Node) -> float:
        scored.append(node.text)
        return digits(node)

    def write(turn: Turn) -> str:
        return "same 5\nmore" if turn.turn <= 3 else f"step {turn.turn}\nmore"

    async with scripted(write) as (engine, session):
        if method == "beam":
            found = await beam(session, "Go.", width=4, branching=4, depth=2, score=score, at_once=1)
        else:
            found = await tree_of_thought(session, "Go.", branching=4, depth=2, score=score, at_once=1)
        kept, other, *closed = sorted(found.root.children, key=lambda node: node.state)
        kept, other = sorted((kept, other), key=lambda node: -node.twins)
        assert (kept.twins, other.twins, [node.state for node in closed]) == (2, 0, ["pruned", "pruned"])
        assert [len(node.children) for node in (kept, other, *closed)] == [4, 4, 0, 0]
        assert scored.count("same 5") == 1
        assert "2 twins" in str(found)
        assert found.cost.branches == 12
        assert engine.live_branches == 1


async def test_the_same_step_of_another_parent_is_no_twin() -> None:
    def write(turn: Turn) -> str:
        message = turn.log.rsplit("<|assistant|>", 1)[-1]
        return "then\nmore" if message else f"step {turn.turn}\nmore"

    async with scripted(write) as (_, session):
        found = await beam(session, "Go.", width=2, branching=2, depth=2, score=lambda _: 1.0)
        assert [sum(child.twins for child in node.children) for node in found.root.children] == [1, 1]


# ---- tools ----------------------------------------------------------------------------------------------------------
async def test_a_call_that_nobody_serves_is_no_answer() -> None:
    call = '<tool_call>{"name":"add","arguments":{}}</tool_call>'
    async with scripted([call, "try 3"]) as (_, session):
        found = await best_of_n(session, "Go.", n=2, score=digits)
        assert sorted(node.state for node in found.root.children) == ["failed", "finished"]
        assert found.text == "try 3"


async def test_an_attempt_that_gives_no_text_is_told() -> None:
    async def three(_: Session) -> int:
        return 3

    for wrong in (three, lambda _: "not awaited"):
        async with scripted([]) as (engine, session):
            with pytest.raises(InvalidRequest, match=r"attempt gave .* must .* text"):
                _ = await best_of_n(session, "Go.", n=2, score=digits, attempt=wrong)  # type: ignore[arg-type]
            assert engine.live_branches == 1
