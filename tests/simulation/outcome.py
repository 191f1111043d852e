"""What is known of a simulated run once it is over."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import final

from tests.simulation.agents import Agent


@final
@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    workload: str
    seed: int
    violation: str | None
    last: list[str]
    """The last events, for people."""
    trace: str
    """A digest of all events: equal runs have equal ones."""
    marks: Counter[str]
    faults: Counter[str]
    events: int
    steps: int
    turns: int
    seconds: float
    """Virtual."""
    longest_turn: float
    firm_granted: int
    broken_firm_leases: int
    leaked_pages: int
    agents: dict[str, Agent] = field(default_factory=dict[str, Agent], repr=False)

    @property
    def wedged(self) -> bool:
        return self.violation is not None and self.violation.startswith("wedged")

    def __str__(self) -> str:
        return f"{self.workload} --seed {self.seed}: {self.violation}\n" + "\n".join(f"  {line}" for line in self.last)
