"""Runs a workload over seeds: each seed once with its faults and once in peace, and compares what agents heard."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import final

from tests.simulation import checkers
from tests.simulation.checkers import Sight, Violation
from tests.simulation.outcome import Outcome
from tests.simulation.workload import Expectations, FaultSpec, Workload
from tests.simulation.world import Simulation


@final
@dataclass(slots=True)
class Report:
    """Many seeds of one workload."""

    workload: Workload
    outcomes: int = 0
    events: int = 0
    turns: int = 0
    compared: int = 0
    """Turns whose tokens were compared with those of an undisturbed run."""
    marks: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    refusals: Counter[str] = field(default_factory=Counter[str])
    ends: Counter[str] = field(default_factory=Counter[str])
    longest_turn: float = 0.0
    firm_granted: int = 0
    failures: list[Outcome] = field(default_factory=list[Outcome])

    def never_hit(self) -> list[str]:
        """Marks this workload is there for and no seed reached."""
        return [mark for mark in self.workload.expect.marks if not self.marks[mark]]

    def never_struck(self) -> list[str]:
        """Faults it composes that no seed met."""
        return sorted({fault.kind for fault in self.workload.faults} - set(self.faults))


def run_seeds(workload: Workload, seeds: Iterable[int], *, sight: Sight = Sight.LEDGER, stop_at: int = 1) -> Report:
    """Ends early after `stop_at` failures."""
    report = Report(workload)
    for seed in seeds:
        outcome, compared = run_one(workload, seed, sight=sight)
        report.outcomes += 1
        report.events += outcome.events
        report.turns += outcome.turns
        report.compared += compared
        report.marks.update(outcome.marks)
        report.faults.update(outcome.faults)
        report.longest_turn = max(report.longest_turn, outcome.longest_turn)
        report.firm_granted += outcome.firm_granted
        for agent in outcome.agents.values():
            report.refusals.update(agent.refused)
            report.ends[agent.state] += 1
        if outcome.violation is not None:
            report.failures.append(outcome)
            if len(report.failures) >= stop_at:
                break
    return report


def at_every_point(workload: Workload, seed: int, kind: str, stride: int = 1) -> Iterator[Outcome]:
    """One run for each point (or each `stride`th) at which a fault of this kind may strike, with nothing else wrong.
    Ends when a run comes to its end before its point."""
    peaceful = in_peace(workload, seed)
    for point in count(step=stride):
        fault = FaultSpec(kind=kind, at=(point,))
        outcome, _ = run_one(
            dataclasses.replace(workload, faults=(fault,), expect=Expectations()), seed, peaceful=peaceful
        )
        if not outcome.faults[kind] and outcome.violation is None:
            return
        yield outcome


def in_peace(workload: Workload, seed: int) -> Outcome:
    """The same agents with room for everybody and no faults."""
    return Simulation(workload.undisturbed(), seed, sight=Sight.USER).run()


def run_one(
    workload: Workload, seed: int, *, sight: Sight = Sight.LEDGER, peaceful: Outcome | None = None
) -> tuple[Outcome, int]:
    """One seed, and how many of its turns were compared."""
    outcome = Simulation(workload, seed, sight=sight).run()
    if outcome.violation is not None:
        return outcome, 0
    peaceful = in_peace(workload, seed) if peaceful is None else peaceful
    try:
        if peaceful.violation is not None:
            raise Violation(f"the undisturbed run fails: {peaceful.violation}")
        return outcome, checkers.tokens_are_undisturbed(outcome.agents, peaceful.agents)
    except Violation as broken:
        outcome.violation = str(broken)
        return outcome, 0
