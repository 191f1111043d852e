"""What the loop drives: the core of every dp rank with its recording, and the threads that carry out what it plans."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar, final

from agentspeed_engine.clock import Clock
from agentspeed_engine.exec.copies import Copied, Copier
from agentspeed_engine.exec.executor import Executor
from agentspeed_engine.exec.prepare import Prepared, Preparer
from agentspeed_engine.exec.worker import Worker
from agentspeed_engine.sched import dp_cores
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.dp_cores import DpCores, summed
from agentspeed_engine.sched.plan import StepPlan, StepResult
from agentspeed_engine.sched.state import Out
from agentspeed_engine.serve.recording import LEAST_BYTES, RecordingOrder, Tape, begun
from agentspeed_engine.serve.time_slice import yields_to_who_wakes

if TYPE_CHECKING:
    from agentspeed_engine.exec.ranks.lock_step import LockStep, Plans, Results

T = TypeVar("T")
Report: TypeAlias = "StepResult | Results | Copied | Prepared | BaseException"


@final
@dataclass(frozen=True, slots=True)
class Heard:
    """What a thread reports."""

    dp_rank: int
    """0 for what concerns all."""
    report: Report


@final
class Schedulers:
    """Driven by the loop's thread; its own threads only call `report`."""

    def __init__(
        self,
        config: CoreConfig,
        executors: tuple[Executor, ...],
        lock_step: LockStep | None,
        *,
        recording: RecordingOrder | None,
        clock: Clock,
        report: Callable[[Heard], None],
    ) -> None:
        """One core for each executor. `lock_step`: takes the steps of all together. Raises `EngineFault` when the
        recording cannot be begun."""
        cores = dp_cores.made(config, len(executors))
        if recording is not None and len(cores) > 1:
            recording = replace(recording, most_bytes=max(LEAST_BYTES, recording.most_bytes // len(cores)))
        tapes: list[Tape | None] = []
        try:
            for core in cores:
                tapes.append(begun(core, recording, began=clock.now()))
        except BaseException:
            for tape in tapes:
                if tape is not None:
                    tape.close()
            raise
        used = [core if tape is None else tape.core for core, tape in zip(cores, tapes, strict=True)]
        self.cores = DpCores(cores, used)
        self._tapes = [tape for tape in tapes if tape is not None]
        self._executors, self._clock = executors, clock
        self.steps = self.rows = self.tokens = 0
        self.planning_seconds = 0.0
        self._copiers = [Copier(one, self._teller(report, dp), clock) for dp, one in enumerate(executors)]
        self._preparers = [Preparer(one, self._teller(report, dp)) for dp, one in enumerate(executors)]
        self._together: queue.SimpleQueue[Plans | None] | None = None
        self._plans: list[queue.SimpleQueue[StepPlan | None]] = []
        if lock_step is not None:
            self._together = queue.SimpleQueue()
            self._threads = [_worker(lock_step.work, self._together, self._teller(report, 0))]
            return
        self._plans = [queue.SimpleQueue() for _ in executors]
        self._threads = [
            _worker(Worker(executor, depth=config.depth).run, plans, self._teller(report, dp))
            for dp, (executor, plans) in enumerate(zip(executors, self._plans, strict=True))
        ]

    @staticmethod
    def _teller(report: Callable[[Heard], None], dp_rank: int) -> Callable[[Report], None]:
        return lambda what: report(Heard(dp_rank, what))

    @property
    def recordings(self) -> tuple[Path, ...]:
        """Where this run is recorded: a folder for each dp rank."""
        return tuple(tape.path for tape in self._tapes)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    # ---- a round of the loop --------------------------------------------------------------------------------------
    def heard(self, heard: Heard) -> Out:
        """What comes of a report. Raises what a thread raised."""
        dp_rank, report = heard.dp_rank, heard.report
        core = self.cores.cores[dp_rank]
        match report:
            case StepResult():
                self.tokens += len(report.drawn)
                return core.apply(report, self._clock.now())
            case Copied():
                return core.copied(report.ticket, report.ok, self._clock.now())
            case Prepared():
                if not core.awaits(report.turn):  # it was cancelled meanwhile
                    self._executors[dp_rank].discard(report.turn)
                return core.prepared(report.turn, report.refusal, self._clock.now())
            case BaseException():
                raise report
            case _:
                self.tokens += sum(len(one.drawn) for one in report.every if one is not None)
                return self.cores.apply_together(report.every, self._clock.now())

    def copies_begun(self) -> None:
        """Whose copy has begun has said so by the time that the clock was read."""
        for core, copier in zip(self.cores.cores, self._copiers, strict=True):
            for ticket in copier.begun():
                core.begun(ticket)

    def plan(self, now: float) -> Out:
        """Hands out what is to be done now. Returns what the cores had to say."""
        began = self._clock.now()
        for core, preparer in zip(self.cores.cores, self._preparers, strict=True):
            for spec in core.preparations():
                preparer.start(spec)
        out = self._planned_together(now) if self._together is not None else self._planned(now)
        for core, copier in zip(self.cores.cores, self._copiers, strict=True):
            for copy in core.host_copies():
                copier.start(copy)
        self.planning_seconds += self._clock.now() - began
        return out

    def _planned(self, now: float) -> Out:
        out: Out = []
        for core, plans in zip(self.cores.cores, self._plans, strict=True):
            while (plan := core.plan(now)) is not None:
                self.steps += 1
                self.rows += sum(row.tokens for row in plan.rows)
                plans.put(plan)
                out += core.events()
            out += core.events()
        return out

    def _planned_together(self, now: float) -> Out:
        assert self._together is not None
        out: Out = []
        while (plans := self.cores.plan_together(now)) is not None:
            self.steps += 1
            for plan in plans:
                self.rows += 0 if plan is None else sum(row.tokens for row in plan.rows)
            self._together.put(plans)
            out += self.cores.events()
        return out + self.cores.events()

    def flush(self) -> None:
        """Writes the recordings."""
        for tape in self._tapes:
            tape.flush()

    # ---- what is shown --------------------------------------------------------------------------------------------
    def counts(self) -> tuple[dict[str, int], tuple[dict[str, int], ...]]:
        """(Of all dp ranks together, of each where there are several)."""
        every = self.cores.counts()
        own = {"steps": self.steps, "rows_computed": self.rows, "tokens_drawn": self.tokens}
        return summed(every) | own, every if len(every) > 1 else ()

    def seconds(self) -> dict[str, float]:
        """Since the start, of all dp ranks together."""
        return {
            "model": sum(one.model_seconds for one in self._executors),
            "sampling": sum(one.sampling_seconds for one in self._executors),
            "planning": self.planning_seconds,
        }

    # ---- the end --------------------------------------------------------------------------------------------------
    def broke(self, error: BaseException) -> str:
        """The recordings end with it. Returns where to look, empty where there is none."""
        for tape in self._tapes:
            tape.close(error)
        runs = ", ".join(f"`agentspeed replay {tape.path}`" for tape in self._tapes)
        return f" What led to it: {runs}." if runs else ""

    def no_more_plans(self) -> None:
        """What was planned is still carried out."""
        if self._together is not None:
            self._together.put(None)
        for plans in self._plans:
            plans.put(None)

    def join(self, seconds: float) -> None:
        """Waits for what is being carried out, each thread at most so long."""
        for thread in self._threads:
            thread.join(timeout=seconds)
        for copier in self._copiers:
            copier.close(seconds)
        for preparer in self._preparers:
            preparer.close()

    def close_recordings(self) -> None:
        for tape in self._tapes:
            tape.close()


def _worker(
    work: Callable[[queue.SimpleQueue[T | None], Callable[[Report], None]], None],
    plans: queue.SimpleQueue[T | None],
    report: Callable[[Report], None],
) -> threading.Thread:
    def run() -> None:
        yields_to_who_wakes()  # before the threads of its steps are started, which inherit it
        work(plans, report)

    return threading.Thread(target=run, name="agentspeed-worker", daemon=True)
