"""What the rounds of `bench/peers_cpu.py` come to: who plays on, ratios taken within a round, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from bench.peers_workload import BEST, MORE_IS_BETTER, Case, Must

OURS = "agentspeed"
SLOW = 2.0
"""A peer that is so many times worse than the best one will not become it: it plays a case once."""

Figures = Mapping[str, float]
Rounds = Mapping[int, Figures]
"""By round; a side that sat one out has none."""


@final
@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours ÷ theirs within a round: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def better(figure: str, one: float, other: float) -> bool:
    return one > other if figure in MORE_IS_BETTER else one < other


def plays_on(case: Case, name: str, found: Mapping[str, Rounds]) -> bool:
    """Behind the first round. A peer does while it is within `SLOW` of the best peer in some figure, or a bound of the
    case names it. One that brought nothing does not."""
    if name == OURS:
        return True
    peers = {side: rounds for side, rounds in found.items() if side != OURS and rounds}
    if name not in peers:
        return False
    if name in {must.against for must in case.must}:
        return True
    first = peers[name][min(peers[name])]
    for figure, value in first.items():
        all_of_it = [rounds[min(rounds)][figure] for rounds in peers.values()]
        best = max(all_of_it) if figure in MORE_IS_BETTER else min(all_of_it)
        if max(value, best) <= SLOW * min(value, best):
            return True
    return False


def ratio(figure: str, against: str, found: Mapping[str, Rounds]) -> Ratio | None:
    """None where no round has both."""
    each: list[float] = []
    for number, ours in found.get(OURS, {}).items():
        theirs = [
            rounds[number][figure]
            for name, rounds in found.items()
            if name != OURS and number in rounds and against in (BEST, name)
        ]
        if theirs:
            each.append(ours[figure] / (max if figure in MORE_IS_BETTER else min)(theirs))
    if not each:
        return None
    each.sort()
    return Ratio(statistics.median(each), each[len(each) // 4], each[-1 - len(each) // 4], len(each))


def medians(rounds: Rounds) -> dict[str, float]:
    """Of every figure over the rounds; empty where there was none."""
    figures = next(iter(rounds.values()), {})
    return {figure: statistics.median(one[figure] for one in rounds.values()) for figure in figures}


def verdict(must: Must, reached: Ratio | None) -> str:
    sign = ">=" if must.figure in MORE_IS_BETTER else "<="
    if reached is None:
        return f"must {sign} {must.bound}: not measured"
    holds = not better(must.figure, must.bound, reached.median)
    return f"must {sign} {must.bound}: {'reached' if holds else 'MISSED'}"


def lines(case: Case, found: Mapping[str, Rounds], *, judged: bool) -> list[str]:
    """One line for each figure: medians of every side with the number of rounds, then the ratios. `judged`: the lengths
    were the real ones, so that bounds apply."""
    figures = medians(found.get(OURS, {}))
    written: list[str] = []
    for figure in figures:
        sides = ", ".join(
            f"{name} {medians(rounds)[figure]:.4g} ({len(rounds)})" for name, rounds in found.items() if rounds
        )
        musts = [must for must in case.must if must.figure == figure]
        parts = [f"{case.name}: {figure}: {sides}"]
        for against in dict.fromkeys([*(must.against for must in musts), BEST]):
            reached = ratio(figure, against, found)
            said = [verdict(must, reached) for must in musts if must.against == against and judged]
            if reached is not None:
                parts.append(
                    f"ours ÷ {against} {reached.median:.2f} ({reached.low:.2f} to {reached.high:.2f}) " + " ".join(said)
                )
            else:
                parts += [f"ours ÷ {against}: {one}" for one in said]
        written.append("; ".join(part.strip() for part in parts))
    return written


def told(case: Case, found: Mapping[str, Rounds]) -> dict[str, Any]:
    """The same as data."""
    against = dict.fromkeys([*(must.against for must in case.must), BEST])
    ratios = {
        figure: {
            name: {"median": round(one.median, 3), "low": round(one.low, 3), "high": round(one.high, 3)}
            for name in against
            if (one := ratio(figure, name, found)) is not None
        }
        for figure in medians(found.get(OURS, {}))
    }
    sides = {
        name: {figure: round(value, 5) for figure, value in medians(rounds).items()} | {"rounds": len(rounds)}
        for name, rounds in found.items()
    }
    return {"sides": sides, "ours_by": ratios}
