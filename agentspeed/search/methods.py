"""Four ways to search, each a few lines over one growing tree."""

from __future__ import annotations

import heapq
import math
from typing import Any

from agentspeed._base.validate import check_count, check_number, check_text
from agentspeed._core.options import Prompt
from agentspeed.search.growth import Grower, search
from agentspeed.search.plan import Attempt, Budget, Keep, Plan, Score
from agentspeed.search.tree import Found, Node
from agentspeed.session import Session


async def best_of_n(
    session: Session,
    prompt: Prompt,
    *,
    n: int,
    score: Score,
    solved_at: float | None = None,
    keep: Keep | None = None,
    attempt: Attempt | None = None,
    budget: Budget | None = None,
    at_once: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    adopt: bool = True,
    **options: Any,
) -> Found:
    """`n` whole answers side by side; the best becomes the session's. Reaching `solved_at` ends it at once."""
    _at_least_one(n=n)
    plan = Plan(
        score=score,
        solved_at=solved_at,
        keep=keep,
        attempt=attempt,
        budget=Budget() if budget is None else budget,
        at_once=at_once,
        temperature=temperature,
        seed=seed,
        adopt=adopt,
        options=options,
    )

    async def grow(grower: Grower) -> None:
        while (left := n - len(grower.root.children)) and grower.may_grow():
            _ = await grower.expand(grower.root, min(left, at_once))

    return await search(session, prompt, plan, grow)


async def beam(
    session: Session,
    prompt: Prompt,
    *,
    width: int,
    branching: int,
    depth: int,
    score: Score,
    stop: str = "\n",
    solved_at: float | None = None,
    least: float | None = None,
    keep: Keep | None = None,
    budget: Budget | None = None,
    at_once: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    adopt: bool = True,
    **options: Any,
) -> Found:
    """Step by step (a step ends at `stop`): every kept branch forks `branching` ways, the best `width` go on."""
    _at_least_one(width=width, branching=branching, depth=depth)
    check_text("stop", stop)
    plan = Plan(
        score=score,
        solved_at=solved_at,
        least=least,
        keep=keep,
        stop=stop,
        width=width,
        budget=Budget() if budget is None else budget,
        at_once=at_once,
        temperature=temperature,
        seed=seed,
        adopt=adopt,
        options=options,
    )

    async def grow(grower: Grower) -> None:
        level = [grower.root]
        for reached in range(1, depth + 1):
            for node in level:
                _ = await grower.expand(node, branching)
            level = grower.level(reached)
            if not level or not grower.may_grow():
                return

    return await search(session, prompt, plan, grow)


async def tree_of_thought(
    session: Session,
    prompt: Prompt,
    *,
    branching: int,
    depth: int,
    score: Score,
    stop: str = "\n",
    solved_at: float | None = None,
    least: float | None = None,
    keep: Keep | None = None,
    budget: Budget | None = None,
    at_once: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    adopt: bool = True,
    **options: Any,
) -> Found:
    """Best first: the most promising open branch anywhere in the tree forks next. Bound it by `budget` and `depth`."""
    _at_least_one(branching=branching, depth=depth)
    check_text("stop", stop)
    plan = Plan(
        score=score,
        solved_at=solved_at,
        least=least,
        keep=keep,
        stop=stop,
        budget=Budget(branches=64) if budget is None else budget,
        at_once=at_once,
        temperature=temperature,
        seed=seed,
        adopt=adopt,
        options=options,
    )

    async def grow(grower: Grower) -> None:
        frontier: list[tuple[float, int, Node]] = [(0.0, 0, grower.root)]
        while frontier and grower.may_grow():
            _, _, node = heapq.heappop(frontier)
            for child in await grower.expand(node, branching):
                if child.state != "open":
                    continue
                if child.depth < depth:
                    heapq.heappush(frontier, (-(child.score or 0.0), child.number, child))
                else:
                    await grower.prune(child)

    return await search(session, prompt, plan, grow)


async def mcts(
    session: Session,
    prompt: Prompt,
    *,
    iterations: int,
    score: Score,
    branching: int = 3,
    stop: str = "\n",
    exploration: float = 1.4,
    solved_at: float | None = None,
    least: float | None = None,
    keep: Keep | None = None,
    budget: Budget | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    adopt: bool = True,
    **options: Any,
) -> Found:
    """Monte Carlo tree search: walk down by UCT, add one step, play it to the end, and tell the path its score.

    Scores should lie between 0 and 1, which `exploration` is measured against."""
    _at_least_one(iterations=iterations, branching=branching)
    check_number("exploration", exploration)
    check_text("stop", stop)
    plan = Plan(
        score=score,
        solved_at=solved_at,
        least=least,
        keep=keep,
        stop=stop,
        again=True,
        budget=Budget(branches=4 * iterations) if budget is None else budget,
        temperature=temperature,
        seed=seed,
        adopt=adopt,
        options=options,
    )

    async def grow(grower: Grower) -> None:
        for _ in range(iterations):
            node = _select(grower.root, branching, exploration)
            if node is None or not grower.may_grow():
                return
            ends = await grower.expand(node, 1)
            if ends and ends[0].state == "open":
                ends = [*await grower.expand(ends[0], 1, whole=True), *ends]
            value = 0.0 if not ends or ends[0].score is None else ends[0].score
            below = ends[-1] if ends else node
            for passed in below.path():
                passed.visits += 1
                passed.value += value

    return await search(session, prompt, plan, grow)


def _select(node: Node, branching: int, exploration: float) -> Node | None:
    """The node to add a step to: down the best upper bounds until one has room; None when all is played out."""
    steps = [child for child in node.children if child.visits]
    if len(steps) < branching:
        return node
    open_steps = [child for child in steps if child.state == "open"]
    for child in sorted(open_steps, key=lambda child: -_upper_bound(child, node.visits, exploration)):
        found = _select(child, branching, exploration)
        if found is not None:
            return found
    return None


def _upper_bound(child: Node, parent_visits: int, exploration: float) -> float:
    return child.value / child.visits + exploration * math.sqrt(math.log(max(1, parent_visits)) / child.visits)


def _at_least_one(**bounds: int) -> None:
    for name, value in bounds.items():
        check_count(name, value)
