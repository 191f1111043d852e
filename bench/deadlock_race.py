"""Parents that hold a context while their sub-agents need the same pool: does anything wedge, leak or break a promise?

Run: `python bench/deadlock_race.py [--seeds N] [--first N] [--processes N]`. Two workloads of `tests/simulation` over
production scheduling code in virtual time: `sub-agents`, parents under firm leases that wait for sub-agents of their
own (sglang issue 27024: a handful of them pinned 99 % of a pool and nothing could run), and `waiting-parents`, children
forked off a turn that runs, with a host tier, a turn of the whole context limit, and clients that die. The owners of
all pages are recounted after every event. A wedge is a turn or an agent that never ends. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine")]

from tests.simulation.workload import load
from tests.simulation.world import Simulation

SHAPES = ("sub-agents", "waiting-parents")
TARGETS = ("wedges", "leaked_pages", "broken_firm_leases")


@dataclass(slots=True)
class Race:
    """What came of some seeds."""

    seeds: int = 0
    wedges: int = 0
    leaked_pages: int = 0
    broken_firm_leases: int = 0
    other_violations: int = 0
    """Wrong tokens, broken ownership, limits passed."""
    firm_leases_granted: int = 0
    turns: int = 0
    preempted: int = 0
    resumed_after_eviction: int = 0
    events: int = 0

    def add(self, other: Race) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def one(shape: str, seed: int) -> Race:
    """One seed of one shape; a violation is said on stderr with the way to run it again."""
    outcome = Simulation(load(shape), seed).run()
    if outcome.violation is not None:
        print(
            f"{shape}: {outcome.violation}\n  again: python -m tests.simulation {shape} --seed {seed} --seeds 1",
            file=sys.stderr,
        )
    known = outcome.wedged or bool(outcome.leaked_pages) or bool(outcome.broken_firm_leases)
    return Race(
        seeds=1,
        wedges=int(outcome.wedged),
        leaked_pages=outcome.leaked_pages,
        broken_firm_leases=outcome.broken_firm_leases,
        other_violations=int(outcome.violation is not None and not known),
        firm_leases_granted=outcome.firm_granted,
        turns=outcome.turns,
        preempted=outcome.marks["preempted"] + outcome.marks["preempted-in-flight"],
        resumed_after_eviction=outcome.marks["recomputed"] + outcome.marks["resumed-from-host"],
        events=outcome.events,
    )


def race(shape: str, seeds: Iterable[int], processes: int = 1) -> Race:
    """Every seed of one shape."""
    found = Race()
    for result in _results(shape, list(seeds), processes):
        found.add(result)
    return found


def _results(shape: str, seeds: list[int], processes: int) -> Iterator[Race]:
    if processes == 1:
        for seed in seeds:
            yield one(shape, seed)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(one, [shape] * len(seeds), seeds, chunksize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    total = Race()
    for shape in SHAPES:
        started = time.monotonic()
        found = race(shape, range(options.first, options.first + options.seeds), options.processes)
        print(
            f"{shape:16} {found.seeds} seeds, {found.turns} turns, {found.firm_leases_granted} firm leases, "
            f"{found.preempted} preemptions, {found.resumed_after_eviction} resumes after eviction, "
            f"{found.events} events in {time.monotonic() - started:.0f} s",
            flush=True,
        )
        total.add(found)
    for name in (*TARGETS, "other_violations"):
        value = getattr(total, name)
        print(f"{name:20} {value}   must be 0   {'MISSED' if value else 'met'}")
    print(json.dumps(asdict(total) | {"seeds": options.seeds}))


if __name__ == "__main__":
    main()
