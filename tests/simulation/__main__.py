"""`python -m tests.simulation [WORKLOAD ...] --seed N --seeds K`: runs workloads and says what came of them."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tests.simulation.marks import MARKS
from tests.simulation.runner import Report, at_every_point, run_seeds
from tests.simulation.workload import FAULT_KINDS, Workload, WorkloadError, load, names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"names or .toml files; all of {', '.join(names())} when left out")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=_count, default=20, help="how many seeds")
    parser.add_argument("--marks", action="store_true", help="print every mark with its count")
    parser.add_argument(
        "--every",
        choices=FAULT_KINDS,
        metavar="FAULT",
        help="instead of the workload's own faults: "
        f"one run for each point at which this one may strike ({', '.join(FAULT_KINDS)})",
    )
    options = parser.parse_args(arguments)
    asked = options.workloads or names()
    try:
        workloads = [load(name) for name in asked]
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return 2
    if options.every:
        failures = [_at_every_point(workload, options.seed, options.every) for workload in workloads]
        return 1 if any(failures) else 0
    marks: Counter[str] = Counter()
    failed = False
    for name, workload in zip(asked, workloads, strict=True):
        started = time.monotonic()
        report = run_seeds(workload, range(options.seed, options.seed + options.seeds))
        marks.update(report.marks)
        failed |= _told(name, report, time.monotonic() - started)
    if options.marks:
        for mark, why in MARKS.items():
            print(f"  {marks[mark]:7}  {mark:28} {why}")
    if options.marks or not options.workloads:
        unseen = [mark for mark in MARKS if not marks[mark]]
        print(
            f"{len(MARKS) - len(unseen)} of {len(MARKS)} marks hit"
            + (f"; never: {', '.join(unseen)}" if unseen else "")
        )
    return 1 if failed else 0


def _count(text: str) -> int:
    """A run of no seeds finds nothing, and would say so as a success."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _at_every_point(workload: Workload, seed: int, kind: str) -> bool:
    """Runs one workload once for each point of a fault; True when one run failed."""
    runs = failures = 0
    for outcome in at_every_point(workload, seed, kind):
        runs += 1
        if outcome.violation is not None:
            failures += 1
            print(f"FAILED with {kind} at point {runs - 1}: {outcome}", flush=True)
    print(f"{workload.name:26} --seed {seed}: {kind} at each of {runs} points, {failures} failed", flush=True)
    return failures > 0


def _told(asked: str, report: Report, seconds: float) -> bool:
    """Prints what came of one workload, by the name or path it was asked for with; True when it failed."""
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(report.faults.items())) or "no faults"
    print(
        f"{report.workload.name:26} {report.outcomes:4} seeds {report.turns:7} turns {report.events:8} events "
        f"{report.compared:6} compared  longest turn {report.longest_turn:6.1f} s  {faults}  ({seconds:.1f} s)"
    )
    for outcome in report.failures:
        print(f"FAILED: {outcome}")
        print(f"again: python -m tests.simulation {shlex.quote(asked)} --seed {outcome.seed} --seeds 1")
    missed = [] if report.failures else [*report.never_hit(), *report.never_struck()]
    if missed:
        print(f"FAILED: {report.workload.name} never reached: {', '.join(missed)} (give it more seeds)")
    return bool(report.failures or missed)


if __name__ == "__main__":
    sys.exit(main())
