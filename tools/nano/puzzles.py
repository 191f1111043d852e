"""Number puzzles: reach a target by using every given number once with + - and *; generator, solutions and checker."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from random import Random

_STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
LARGEST = 99
HELD_ASKING = ("Get to {t} from {spaced}.", "The numbers are {spaced}. Reach {t}.")


@dataclass(frozen=True)
class Puzzle:
    """`solution` is one of the ways to do it."""

    numbers: tuple[int, ...]
    target: int
    solution: str


def make_puzzle(rng: Random, *, held: bool, size: int = 3) -> Puzzle:
    """Numbers and a target that can be reached. A puzzle belongs to training or to the held-out set, whose numbers go
    from 1 to 9; training has larger ones too, so many puzzles that they cannot be learnt by heart."""
    while True:
        largest = 9 if held else rng.choice((9, 9, 12, 20, 30))
        numbers = tuple(rng.randint(1, largest) for _ in range(size))
        target, solution = _random_way(rng, numbers)
        if 1 <= target <= LARGEST and is_held_out(numbers, target) == held:
            return Puzzle(numbers, target, solution)


def is_held_out(numbers: tuple[int, ...], target: int) -> bool:
    """One puzzle in eight, whatever the order of its numbers."""
    return zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 8 == 0


def _random_way(rng: Random, numbers: tuple[int, ...]) -> tuple[int, str]:
    left = list(numbers)
    steps = []
    while len(left) > 1:
        one, two = (left.pop(rng.randrange(len(left))) for _ in range(2))
        high, low = max(one, two), min(one, two)
        sign = rng.choice("+-*") if high * low <= LARGEST else rng.choice("+-")
        value = {"+": high + low, "-": high - low, "*": high * low}[sign]
        left.append(value)
        steps.append(f"{high}{sign}{low}={value}")
    return left[0], ",".join(steps)


def check_puzzle(text: str, numbers: tuple[int, ...] | list[int], target: int) -> bool:
    """Whether every step is right, uses what is left, uses it up, and ends at the target."""
    left = sorted(numbers)
    value = -1
    for step in text.strip().split(","):
        found = _STEP.fullmatch(step.strip())
        if found is None:
            return False
        one, sign, two, value = int(found[1]), found[2], int(found[3]), int(found[4])
        if value != {"+": one + two, "-": one - two, "*": one * two}[sign]:
            return False
        for used in (one, two):
            if used not in left:
                return False
            left.remove(used)
        left.append(value)
    return left == [target] and value == target
