"""What goes wrong and when: drawn from the seed at named points, and counted, so that a test can ask whether it did."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import final

from tests.simulation.workload import FaultSpec, Workload


@final
@dataclass(slots=True)
class _Source:
    """One fault of a workload."""

    spec: FaultSpec
    draw: random.Random
    points: int = 0
    struck: int = 0

    def strikes(self) -> bool:
        """Asked once at each point where it might."""
        point, self.points = self.points, self.points + 1
        chance = self.spec.rate > 0 and self.draw.random() < self.spec.rate
        if self.struck >= self.spec.most or not (chance or point in self.spec.at):
            return False
        self.struck += 1
        return True


@final
@dataclass(slots=True)
class Faults:
    """All faults of one run."""

    sources: list[_Source]
    counts: Counter[str] = field(default_factory=Counter[str])
    points: Counter[str] = field(default_factory=Counter[str])
    """How often each kind might have struck."""

    @classmethod
    def of(cls, workload: Workload, seed: int) -> Faults:
        return cls(
            [
                _Source(spec, random.Random(f"{workload.name}/fault-{index}/{seed}"))
                for index, spec in enumerate(workload.faults)
            ]
        )

    def strikes(self, kind: str) -> float | None:
        """How many seconds a fault of this kind lasts if one strikes here, else None."""
        found: float | None = None
        for source in self.sources:
            if source.spec.kind != kind:
                continue
            self.points[kind] += 1
            if source.strikes() and found is None:
                found = source.draw.uniform(source.spec.seconds.low, source.spec.seconds.high)
                self.counts[kind] += 1
        return found

    def one_of(self, count: int) -> int:
        """Which of several it hits."""
        return self.sources[0].draw.randrange(count) if self.sources else 0
