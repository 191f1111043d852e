"""Number puzzles by branching: one greedy try against the best of 16 forks, and what that costs without fork.

Run: `python examples/agents/puzzles.py [MODEL FOLDER]`
"""

from __future__ import annotations

import random
import re
import sys
import textwrap
import zlib

import anyio

from agentspeed import Engine
from agentspeed.search import Found, Node, best_of_n

STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
TRIES = 16


def puzzle(draw: random.Random) -> tuple[list[int], int]:
    """Three numbers and a target that they reach; one of the puzzles that the shipped model's training never had."""
    while True:
        one, two, three = (draw.randint(1, 9) for _ in range(3))
        target = draw.choice([one + two + three, one * two - three, one * two + three, (one + two) * three])
        if 1 <= target <= 99 and zlib.crc32(f"{sorted([one, two, three])} {target}".encode()) % 8 == 0:
            return [one, two, three], target


def short(text: str) -> str:
    return textwrap.shorten(text, 24, placeholder="...")


def solves(text: str, numbers: list[int], target: int) -> bool:
    """Whether every step is right and uses up what is left, and the last one gives the target."""
    left = list(numbers)
    for step in text.strip().split(","):
        found = STEP.fullmatch(step.strip())
        if found is None:
            return False
        one, two, value = int(found[1]), int(found[3]), int(found[4])
        if value != {"+": one + two, "-": one - two, "*": one * two}[found[2]]:
            return False
        for used in (one, two):
            if used not in left:
                return False
            left.remove(used)
        left.append(value)
    return left == [target]


async def main(model: str | Engine | None = None, count: int = 8) -> tuple[int, int]:
    """Returns how many one greedy try solves and how many the search does."""
    draw = random.Random(7)
    greedy = searched = tokens = without_fork = 0
    found: Found | None = None
    async with opened(model) as engine:
        for _ in range(count):
            numbers, target = puzzle(draw)
            ask = f"Reach {target} from {' '.join(map(str, numbers))}."

            def score(node: Node, numbers: list[int] = numbers, target: int = target) -> float:
                return float(solves(node.whole, numbers, target))

            async with engine.session(seed=1) as s:
                first = await s.generate(ask, max_tokens=64)
            right = solves(first.text, numbers, target)
            greedy += right
            async with engine.session(seed=1) as s:
                found = await best_of_n(s, ask, n=TRIES, score=score, solved_at=1.0, max_tokens=64)
            solved = found.score == 1.0
            searched += solved
            tokens += found.cost.tokens
            without_fork += found.cost.tokens_without_fork
            outcome = f"branches: {short(found.text)} right" if solved else "branches: none right"
            print(f"{ask:22} greedy: {short(first.text):24} {'right' if right else 'wrong'}   {outcome}")
    if found is not None:
        print(f"\nThe last search:\n{found}")
    print(f"\nSolved: {greedy} of {count} by one greedy try, {searched} by the best of {TRIES} branches.")
    print(f"Tokens computed: {tokens} with fork, {without_fork} without ({without_fork / tokens:.1f} times as many).")
    return greedy, searched


def opened(model: str | Engine | None) -> Engine:
    return model if isinstance(model, Engine) else Engine(model)


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
