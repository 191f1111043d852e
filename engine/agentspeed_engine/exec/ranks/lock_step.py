"""Steps of all dp ranks together: they share experts, so each takes part in every step, also one without rows."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

from agentspeed_engine.exec.batch import Batcher
from agentspeed_engine.exec.ranks.leader import BegunStep, LeadingExecutor
from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.exec.worker import result_of
from agentspeed_engine.models.inputs import FlatBatch, no_rows
from agentspeed_engine.sched.plan import StepPlan, StepResult

Plans: TypeAlias = tuple[StepPlan | None, ...]
"""One for each dp rank; None for one without rows."""


@final
@dataclass(frozen=True, slots=True)
class Results:
    """Of `Plans`."""

    every: tuple[StepResult | None, ...]


@final
class LockStep:
    """Driven by one thread."""

    def __init__(self, executors: Sequence[LeadingExecutor]) -> None:
        """Of every dp rank, rank 0's first: it computes in the calling thread while the others do theirs."""
        self._executors = tuple(executors)
        self._batchers = [Batcher(one.page_tokens) for one in executors]

    def execute(self, plans: Plans) -> Results:
        """One step from beginning to end. An exception is our bug, or a lost rank, and stops the engine."""
        started = time.perf_counter()
        steps = [
            None if plan is None else batcher.step_input(plan)
            for plan, batcher in zip(plans, self._batchers, strict=True)
        ]
        sizes = tuple(0 if step is None else len(step.batch.ids) for step in steps)
        begun = [self._begun(executor, step, sizes) for executor, step in zip(self._executors, steps, strict=True)]
        results: list[StepResult | None] = []
        for executor, plan, one in zip(self._executors, plans, begun, strict=True):
            if plan is None or one is None:
                executor.finish_pass()
                results.append(None)
            else:
                sampled = executor.finish(one).sampled
                results.append(result_of(plan, sampled, time.perf_counter() - started))
        return Results(tuple(results))

    @staticmethod
    def _begun(executor: LeadingExecutor, step: StepInput | None, sizes: tuple[int, ...]) -> BegunStep | None:
        if step is not None:
            return executor.begin(step, sizes)
        executor.begin_pass(no_rows(sizes))
        return None

    def work(self, plans: queue.SimpleQueue[Plans | None], report: Callable[[Results | BaseException], None]) -> None:
        """Carries out plans until None comes. What breaks is reported, and nothing after it is carried out."""
        try:
            while (together := plans.get()) is not None:
                report(self.execute(together))
        except BaseException as error:  # noqa: BLE001 - handed to the loop thread, which raises it
            report(error)

    # ---- what a pass costs is measured on rank 0's dp rank ---------------------------------------------------------
    def run(self, batch: FlatBatch) -> None:
        """One pass of which nothing is drawn."""
        sizes = (len(batch.ids), *(0 for _ in self._executors[1:]))
        first, *others = self._executors
        first.begin_pass(replace(batch, tokens_per_rank=sizes))
        for executor in others:
            executor.begin_pass(no_rows(sizes))
        for executor in self._executors:
            executor.finish_pass()

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._executors[0].save(pages, slots)

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._executors[0].load(slots, pages)
