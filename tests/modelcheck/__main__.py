"""`python -m tests.modelcheck --bounds small|large`: explores, then requires that every mutant is caught."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace

from agentspeed_engine.kv.transitions import BRANCHES, NODES
from tests.modelcheck.explorer import Bounds, Explored, explore, pairs
from tests.modelcheck.mutants import AHEAD, AHEAD_FAR, AHEAD_TWO, HOST, LOADED, MUTANTS, PREPARED, QUOTA

SMALL = (
    Bounds(verbs=4),
    Bounds(verbs=4, depth=1),
    Bounds(verbs=3, branches=3, pages=5, depth=1),
    Bounds(verbs=4, firm_pages=1, pages=5),
    Bounds(verbs=3, host_slots=4, setup=((1, 1, 1), (2, 1, 1, 1))),
    Bounds(verbs=2, setup=((1,), (2, 1, 1)), depth=1),
    LOADED,
    QUOTA,
)
SMALL_LATER = (
    AHEAD_TWO,
    replace(AHEAD, verbs=4),
    replace(AHEAD_FAR, verbs=3),
    replace(AHEAD, verbs=3, firm_pages=1, pages=5),
    replace(HOST, verbs=2, depth=1, decode_ahead=True),
    replace(QUOTA, verbs=1, depth=1, decode_ahead=True),
    PREPARED,
)
_PROMPTS = ((1, 1, 1), (2, 1, 1, 1))
LARGE = (
    Bounds(verbs=6, depth=1, pages=5, context_limit=8),
    Bounds(verbs=5, host_slots=6, depth=1, pages=6, context_limit=8, setup=((1, 1, 1), (1, 1, 2))),
    Bounds(verbs=6, depth=1, pages=5, firm_pages=1),
    Bounds(verbs=6, depth=1),
    Bounds(verbs=5, host_slots=4, depth=1, setup=_PROMPTS),
    Bounds(verbs=6),
    Bounds(verbs=5, host_slots=4, setup=_PROMPTS),
    Bounds(verbs=5, host_slots=4, pages=5, firm_pages=1, setup=_PROMPTS),
    Bounds(verbs=5, depth=1, pages=5, branches=3),
    replace(QUOTA, verbs=3, depth=1),
)
"""The longest first, so that two processes end together."""
LARGE_LATER = (
    replace(AHEAD, verbs=5),
    replace(AHEAD_TWO, verbs=3),
    replace(AHEAD_FAR, verbs=4),
    replace(HOST, verbs=4, depth=1, decode_ahead=True),
    replace(QUOTA, verbs=2, depth=1, decode_ahead=True),
    replace(PREPARED, verbs=5, depth=1, decode_ahead=True),
)
"""With rows for tokens in flight, and turns that wait for their grammar. They are counted apart, so that what the
others come to can be compared with what they came to before there was either."""
ENDS = {"Closed"}
"""What is in no table any more."""


def search(bounds: Bounds) -> Explored:
    """Says how far it is once a minute."""
    started = said = time.monotonic()

    def progress(states: int, waiting: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 60:
            said = now
            print(
                f"  ... {states} states, {waiting} of them to be explored, {states / (now - started):.0f} a second: "
                f"{told(bounds)}",
                flush=True,
            )

    return explore(bounds, progress)


def told(bounds: Bounds) -> str:
    """What is not as usual."""
    usual = Bounds()
    return " ".join(
        f"{one.name}={getattr(bounds, one.name)}"
        for one in fields(bounds)
        if one.name == "verbs" or getattr(bounds, one.name) != getattr(usual, one.name)
    )


def catch(index: int) -> tuple[str, Explored]:
    mutant = MUTANTS[index]
    with mutant.applied():
        return mutant.name, explore(mutant.bounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bounds", choices=("small", "large"), default="small")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--skip-mutants", action="store_true")
    options = parser.parse_args()
    failed = False
    reached: set[str] = set()
    with ProcessPoolExecutor(options.processes) as pool:
        small = options.bounds == "small"
        for what, bounds in (
            ("", SMALL if small else LARGE),
            (" with rows for tokens in flight or turns to prepare", SMALL_LATER if small else LARGE_LATER),
        ):
            started, states, unsafe = time.monotonic(), 0, False
            for one, found in zip(bounds, pool.map(search, bounds), strict=True):
                states += found.states
                reached |= found.reached
                verdict = "complete" if found.complete else "CUT SHORT"
                print(
                    f"{found.states:>9} states {found.transitions:>10} transitions  {verdict}  {told(one)}", flush=True
                )
                if found.finding is not None or not found.complete:
                    print(f"VIOLATION: {found.finding}")
                    unsafe = True
            print(
                f"{states:>9} states{what} in {time.monotonic() - started:.0f} s: "
                f"{'FAILED' if unsafe else 'safe, and every turn ends'}",
                flush=True,
            )
            failed |= unsafe
        missing = (set(BRANCHES) | set(NODES) | pairs()) - reached - ENDS
        print(
            f"{len((set(BRANCHES) | set(NODES)) & reached)} states of branches and nodes reached, "
            f"{len(pairs() & reached)} of {len(pairs())} pairs of a command and the state it met"
            f"{'; NEVER REACHED: ' + ', '.join(sorted(missing)) if missing else ''}",
            flush=True,
        )
        failed |= bool(missing)
        if not options.skip_mutants:
            caught = 0
            for name, found in pool.map(catch, range(len(MUTANTS))):
                caught += found.finding is not None
                what = found.finding.rule if found.finding else "NOT CAUGHT"
                length = f", {len(found.finding.trace)} steps" if found.finding else ""
                print(f"  mutant {name:26} {what[:80]} ({found.states} states{length})", flush=True)
            print(f"{caught} of {len(MUTANTS)} mutants caught")
            failed |= caught < len(MUTANTS)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
