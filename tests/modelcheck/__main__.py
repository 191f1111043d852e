"""`python -m tests.modelcheck --bounds small|large --jobs N`: explores, then requires that every mutant is caught.

What has ended is told at once, and with `--json` written down: `--skip-done` goes on where a run was cut off."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path

import msgspec

from agentspeed_engine.kv.transitions import BRANCHES, NODES
from tests.modelcheck import named_bounds
from tests.modelcheck.explorer import Bounds, pairs
from tests.modelcheck.mutants import MUTANTS
from tests.modelcheck.runs import Ended, Job, run

SMALL = (
    Bounds(verbs=4),
    Bounds(verbs=4, depth=1),
    Bounds(verbs=3, branches=3, pages=5, depth=1),
    Bounds(verbs=4, firm_pages=1, pages=5),
    Bounds(verbs=3, host_slots=4, setup=((1, 1, 1), (2, 1, 1, 1))),
    Bounds(verbs=2, setup=((1,), (2, 1, 1)), depth=1),
    named_bounds.LOADED,
    named_bounds.QUOTA,
)
SMALL_LATER = (
    named_bounds.AHEAD_TWO,
    replace(named_bounds.AHEAD, verbs=4),
    replace(named_bounds.AHEAD_FAR, verbs=3),
    replace(named_bounds.AHEAD, verbs=3, firm_pages=1, pages=5),
    replace(named_bounds.HOST, verbs=2, depth=1, decode_ahead=True),
    replace(named_bounds.QUOTA, verbs=1, depth=1, decode_ahead=True),
    named_bounds.PLACES,
    named_bounds.PLACES_OF_FORKS,
    named_bounds.PREPARED,
)
SMALL_SPOILT = (
    replace(named_bounds.SPOILT, verbs=4, depth=0),
    named_bounds.SPOILT_SAVED,
    replace(named_bounds.HOST, verbs=2, depth=1, decode_ahead=True, spoils=True),
    replace(named_bounds.AHEAD, spoils=True),
    named_bounds.SPOILT_LOADED,
    named_bounds.SPOILT_SHARED,
    named_bounds.SPOILT,
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
    replace(named_bounds.QUOTA, verbs=3, depth=1),
)
"""The longest first, so that processes end together."""
LARGE_LATER = (
    replace(named_bounds.AHEAD, verbs=5),
    replace(named_bounds.AHEAD_TWO, verbs=3),
    replace(named_bounds.AHEAD_FAR, verbs=4),
    replace(named_bounds.HOST, verbs=4, depth=1, decode_ahead=True),
    replace(named_bounds.QUOTA, verbs=2, depth=1, decode_ahead=True),
    replace(named_bounds.PLACES, verbs=4, depth=1),
    replace(named_bounds.PREPARED, verbs=5, depth=1, decode_ahead=True),
)
"""With rows for tokens in flight, places that are kept, and turns that wait for their grammar. They are counted apart,
so that what the others come to can be compared with what they came to before there was any of it."""
LARGE_SPOILT = (
    replace(named_bounds.SPOILT, verbs=5),
    replace(named_bounds.SPOILT_LOADED, verbs=3),
    replace(named_bounds.HOST, verbs=3, turns=(1,), depth=1, decode_ahead=True, spoils=True),
    replace(named_bounds.SPOILT_SAVED, verbs=3),
    replace(named_bounds.HOST, verbs=3, turns=(1, 2), spoils=True),
    replace(named_bounds.SPOILT_SHARED, verbs=3, depth=1),
)
"""With turns whose logits are no finite numbers, and so counted apart as well."""
ENDS = {"Closed"}
"""What is in no table any more."""


def told(bounds: Bounds) -> str:
    """What is not as usual."""
    usual = Bounds()
    return " ".join(
        f"{one.name}={getattr(bounds, one.name)}"
        for one in fields(bounds)
        if one.name == "verbs" or getattr(bounds, one.name) != getattr(usual, one.name)
    )


def jobs_of(bounds: str) -> tuple[dict[str, list[Job]], list[Job]]:
    """The searches by what is said of those that are counted together, and the mutants. Names are unique; those of
    searches say the bounds."""
    plain, later, spoilt = (
        (SMALL, SMALL_LATER, SMALL_SPOILT) if bounds == "small" else (LARGE, LARGE_LATER, LARGE_SPOILT)
    )
    counted = {"": plain, " with rows for tokens in flight or turns to prepare": later, " with spoilt turns": spoilt}
    return (
        {what: [Job(told(one), bounds=one) for one in group] for what, group in counted.items()},
        [Job(mutant.name, mutant=place) for place, mutant in enumerate(MUTANTS)],
    )


def line(ended: Ended, mutant: bool) -> str:
    """One result."""
    if mutant:
        length = f", {ended.steps} steps" if ended.rule else ""
        return f"  mutant {ended.name:26} {(ended.rule or 'NOT CAUGHT')[:80]} ({ended.states} states{length})"
    verdict = "complete" if ended.complete else "CUT SHORT"
    counts = f"{ended.states:>9} states {ended.transitions:>10} transitions  {verdict}"
    return f"{counts}  {ended.seconds:7.1f} s  {ended.name}" + (f"\nVIOLATION: {ended.finding}" if ended.rule else "")


def summary(what: str, jobs: Collection[Job], done: dict[str, Ended], seconds: float) -> bool:
    """Prints what searches came to; whether it is what it must be."""
    ended = [done[job.name] for job in jobs if job.name in done]
    sound = all(one.complete and not one.rule for one in ended)
    partly = "" if len(ended) == len(jobs) else f" ({len(ended)} of {len(jobs)} searches)"
    states = sum(one.states for one in ended)
    print(
        f"{states:>9} states{what}{partly} in {seconds:.0f} s: {'safe, and every turn ends' if sound else 'FAILED'}",
        flush=True,
    )
    return sound


def reached_all(done: Collection[Ended]) -> bool:
    """Prints how much of both machines the searches came to; whether it is all."""
    reached = set[str]().union(*(one.reached for one in done))
    missing = (set(BRANCHES) | set(NODES) | pairs()) - reached - ENDS
    print(
        f"{len((set(BRANCHES) | set(NODES)) & reached)} states of branches and nodes reached, "
        f"{len(pairs() & reached)} of {len(pairs())} pairs of a command and the state it met"
        f"{'; NEVER REACHED: ' + ', '.join(sorted(missing)) if missing else ''}",
        flush=True,
    )
    return not missing


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bounds", choices=("small", "large"), default="small")
    parser.add_argument("--jobs", type=int, default=2, help="cores that it computes on")
    parser.add_argument("--searches", type=int, help="searches at once: each keeps its states in memory")
    parser.add_argument("--json", type=Path, help="a file for the results, written whenever one is there")
    parser.add_argument("--skip-done", type=Path, help="such a file: what is in it is not done again")
    parser.add_argument("--only", help="names or parts of names, with semicolons between them")
    parser.add_argument("--skip-mutants", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0: everything that was asked for ended as it must."""
    options = options_of(arguments)
    searches, mutants = jobs_of(options.bounds)
    done: dict[str, Ended] = {}
    if options.skip_done is not None and options.skip_done.exists():
        done = {one.name: one for one in msgspec.json.decode(options.skip_done.read_bytes(), type=list[Ended])}
    every = [job for group in (*list(searches.values())[1:], searches[""]) for job in group]  # the largest first
    asked = [*every, *([] if options.skip_mutants else mutants)]
    if options.only:
        asked = [job for job in asked if any(part.strip() in job.name for part in options.only.split(";"))]
    started = time.monotonic()
    for one in run([job for job in asked if job.name not in done], options.jobs, options.searches):
        done[one.name] = one
        print(line(one, any(job.name == one.name for job in mutants)), flush=True)
        if options.json is not None:
            written = options.json.with_suffix(".part")
            written.write_bytes(msgspec.json.encode(list(done.values())))
            written.replace(options.json)
    seconds = time.monotonic() - started
    sound = True
    for what, group in searches.items():
        sound &= summary(what, group, done, seconds)
    ended = [done[job.name] for job in every if job.name in done]
    if len(ended) == len(every):
        sound &= reached_all(ended)
    if not options.skip_mutants:
        tried = [done[job.name] for job in mutants if job.name in done]
        caught = sum(bool(one.rule) for one in tried)
        print(f"{caught} of {len(tried)} mutants caught")
        sound &= caught == len(tried)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
