"""Drives an executor with step plans, and gives its tokens back to the branches of their rows."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from agentspeed_engine.exec.batch import Batcher
from agentspeed_engine.exec.executor import Executor, Pending, Refusal, Sampled
from agentspeed_engine.ids import BranchId
from agentspeed_engine.sched.plan import Drawn, Row, StepPlan, StepResult

LOOKS_SECONDS = 1e-4
"""How soon a step that ends is noticed while the worker waits for the next plan."""


def result_of(plan: StepPlan, sampled: Sampled, seconds: float) -> StepResult:
    """What the scheduler is told of a step that took so long."""
    drawn: list[Drawn] = []
    refused: list[tuple[BranchId, int, str]] = []
    spoilt: set[tuple[BranchId, int]] = set()
    rows: list[Row] = [row for row in plan.rows if row.sample is not None]
    for row, token in zip(rows, sampled, strict=True):
        if isinstance(token, Refusal):
            refused.append((row.branch, row.epoch, token.reason))
            if token.spoilt:
                spoilt.add((row.branch, row.epoch))
        else:
            drawn.append(
                Drawn(row.branch, row.epoch, token.id, token.logprob, token.top, token.end, token.draw_logprob)
            )
    return StepResult(plan.seq, tuple(drawn), tuple(refused), seconds, frozenset(spoilt))


@final
@dataclass(frozen=True, slots=True)
class Launched:
    """A plan on its way."""

    plan: StepPlan
    pending: Pending
    started: float


@final
class Worker:
    """Driven by one thread. It holds plans, which are plain values, so it cannot move any state of the scheduler."""

    def __init__(self, executor: Executor, *, depth: int = 0) -> None:
        """`depth`: steps that are planned before an earlier one was collected (`CoreConfig.depth`)."""
        self._executor = executor
        self._depth = depth
        self._batcher = Batcher(executor.page_tokens)

    def launch(self, plan: StepPlan) -> Launched:
        """Hands one step to the executor. An exception is our bug and stops the engine, here and in `collect`."""
        started = time.perf_counter()
        return Launched(plan, self._executor.launch(self._batcher.step_input(plan)), started)

    def collect(self, launched: Launched) -> StepResult:
        """Waits for the oldest step that was launched."""
        sampled = self._executor.collect(launched.pending)
        return result_of(launched.plan, sampled, time.perf_counter() - launched.started)

    def execute(self, plan: StepPlan) -> StepResult:
        """One step from beginning to end."""
        return self.collect(self.launch(plan))

    def run(
        self, plans: queue.SimpleQueue[StepPlan | None], report: Callable[[StepResult | BaseException], None]
    ) -> None:
        """Carries out plans until None comes. Every plan that waits is launched before a step in flight is waited for,
        and a step that is done is reported before the next is launched. While another plan may come, a step in flight
        is looked at, not waited for: else the device would have nothing to do between it and the next. What breaks is
        reported, and nothing after it is carried out."""
        flights: deque[Launched] = deque()
        try:
            while True:
                if flights and (flights[0].pending.done() or (len(flights) > self._depth and plans.empty())):
                    report(self.collect(flights.popleft()))
                    continue
                try:
                    plan = plans.get(timeout=LOOKS_SECONDS if flights else None)
                except queue.Empty:
                    continue
                if plan is None:
                    return
                flights.append(self.launch(plan))
        except BaseException as error:  # noqa: BLE001 - handed to the loop thread, which raises it
            report(error)
