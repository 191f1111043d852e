"""What places in the queue do to agents that want twice the pool: those of `bench/peers_cpu.py`, in virtual time.

    python bench/places.py [--turns-in-place 1 3 32] [--seeds 24]

A production core, a device whose steps take modelled time, and agents whose conversations follow each other, as
`bench/peers_loop.py` plays them on real engines. Costs are those that a CPU of two cores with AVX512-BF16 showed for
qwen3-50m. Printed for each number of turns, medians over seeds: tokens/s, waits of turns that go on (p50, p90, p99)
and of those that begin a conversation (p50, longest), what a turn takes with its waits, rows computed a turn, and
preemptions. Its time is counted, not measured, so that figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]
from agentspeed_engine.ids import BranchId, LinkId, pages_for
from agentspeed_engine.protocol.messages import Close, Generate, Open, Opened, TurnEnded
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import Drawn, StepPlan, StepResult
from agentspeed_engine.sched.state import Out
from bench.peers_loop import Script
from bench.peers_turns import Step
from bench.peers_workload import WARM_UP, WINDOW, Case, cases

LINK: Final = LinkId(1)
PAGE: Final = 64
DRAWN_ID: Final = 5
STEP_SECONDS, ROW_SECONDS, PROMPT_SECONDS = 8.3e-3, 0.8e-3, 0.53e-3
"""Of a step, of a row that decodes, and of a token of a prompt: a recorded run of `bench/peers_cpu.py` on that CPU."""
AGENTS = "16 agents with pauses"


@final
@dataclass(slots=True)
class Agent:
    scripts: Iterator[Script]
    script: Script = ()
    step: int = 0
    branch: BranchId | None = None
    begun: float = 0.0


@final
@dataclass(slots=True)
class Counted:
    """Of turns that began within the window; tokens are those that came within it."""

    drawn: int = 0
    prefilled: int = 0
    goes_on: list[float] = field(default_factory=list[float])
    begins: list[float] = field(default_factory=list[float])
    whole: list[float] = field(default_factory=list[float])

    def figures(self, preemptions: int) -> dict[str, float]:
        turns = len(self.whole)
        return {
            "tokens_per_second": self.drawn / WINDOW,
            "resume_p50": _at(self.goes_on, 0.5),
            "resume_p90": _at(self.goes_on, 0.9),
            "resume_p99": _at(self.goes_on, 0.99),
            "opening_p50": _at(self.begins, 0.5),
            "opening_max": _at(self.begins, 1.0),
            "turn_mean": sum(self.whole) / turns if turns else math.inf,
            "rows_per_turn": self.prefilled / turns if turns else math.inf,
            "preemptions": preemptions,
        }


@final
class Run:
    """One seed: things happen at their own moment, also during a step."""

    def __init__(self, seed: int, turns_in_place: int) -> None:
        case: Case = next(case for case in cases(1.0, seed) if case.name == AGENTS)
        assert case.loop is not None
        assert case.pool_tokens is not None
        pages = pages_for(case.pool_tokens, PAGE)
        self.core = Core(
            CoreConfig(
                pages=pages,
                page_tokens=PAGE,
                context_limit=(pages - 1) * PAGE,
                vocab_size=2**32,
                firm_pages=0,
                turns_in_place=turns_in_place,
            )
        )
        self.now = 0.0
        self.counted = Counted()
        self._prefix = list(case.prefix.encode())
        self._agents = [Agent(scripts()) for scripts in case.loop.agents]
        self._of_branch: dict[int, int] = {}
        self._returns: list[tuple[float, int]] = []
        """A heap of (when a pause ends, whose)."""
        for number in range(len(self._agents)):
            self._pause(number)

    def figures(self) -> dict[str, float]:
        """Plays the window to its end, and on until its turns have ended."""
        while self.now < WARM_UP + WINDOW or self._unfinished():
            plan = self.core.plan(self.now)
            self._hear(self.core.events())
            if plan is None:
                self._until(self._returns[0][0])
            else:
                self._step(plan)
        self.core.check()
        return self.counted.figures(self.core.world.preemptions)

    def _within(self, moment: float) -> bool:
        return WARM_UP <= moment < WARM_UP + WINDOW

    def _unfinished(self) -> bool:
        paused = {number for _, number in self._returns}
        running = (agent for number, agent in enumerate(self._agents) if number not in paused)
        return any(agent.begun < WARM_UP + WINDOW for agent in running)

    def _step(self, plan: StepPlan) -> None:
        prompt = sum(row.tokens for row in plan.rows if row.tokens > 1)
        decoding = sum(row.tokens == 1 for row in plan.rows)
        seconds = STEP_SECONDS + ROW_SECONDS * decoding + PROMPT_SECONDS * prompt
        drawn = tuple(Drawn(row.branch, row.epoch, DRAWN_ID) for row in plan.rows if row.sample is not None)
        if self._within(self.now):
            self.counted.prefilled += prompt
        self._until(self.now + seconds)
        if self._within(self.now):
            self.counted.drawn += len(drawn)
        self._hear(self.core.apply(StepResult(plan.seq, drawn, seconds=seconds), self.now))

    def _until(self, end: float) -> None:
        while self._returns and self._returns[0][0] <= end:
            moment, number = heapq.heappop(self._returns)
            self.now = max(self.now, moment)
            self._begin(self._agents[number], number)
        self.now = max(self.now, end)

    # ---- agents ---------------------------------------------------------------------------------------------------
    def _pause(self, number: int) -> None:
        agent = self._agents[number]
        if agent.step == len(agent.script):
            agent.script, agent.step = next(agent.scripts), 0
        heapq.heappush(self._returns, (self.now + agent.script[agent.step].pause, number))

    def _begin(self, agent: Agent, number: int) -> None:
        step: Step = agent.script[agent.step]
        ids = list(step.add.encode())
        agent.begun = self.now
        if agent.branch is None:
            ids = self._prefix + ids
            opened = self.core.handle(LINK, Open(request=1), self.now)[0][1]
            assert isinstance(opened, Opened)
            agent.branch = BranchId(opened.branch)
            self._of_branch[opened.branch] = number
        command = Generate(request=1, branch=agent.branch, ids=pack_ids(ids), max_tokens=step.out)
        self._hear(self.core.handle(LINK, command, self.now))

    def _hear(self, out: Out) -> None:
        for _, message in out:
            if isinstance(message, TurnEnded) and message.reason != "closed":
                self._ended(message)

    def _ended(self, message: TurnEnded) -> None:
        number = self._of_branch[message.branch]
        agent = self._agents[number]
        if self._within(agent.begun):
            waits = self.counted.goes_on if agent.step else self.counted.begins
            waits.append(message.usage.queue_seconds + message.usage.prefill_seconds)
            self.counted.whole.append(self.now - agent.begun)
        agent.step += 1
        if agent.step == len(agent.script):
            assert agent.branch is not None
            _ = self.core.handle(LINK, Close(request=1, branch=agent.branch), self.now)
            del self._of_branch[message.branch]
            agent.branch = None
        self._pause(number)


def _at(values: list[float], share: float) -> float:
    ordered = sorted(values) or [math.inf]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns-in-place", type=int, nargs="+", default=[1, 3, 32])
    parser.add_argument("--seeds", type=int, default=24)
    options = parser.parse_args()
    report: dict[str, dict[str, float]] = {}
    for turns in options.turns_in_place:
        runs = [Run(seed, turns).figures() for seed in range(options.seeds)]
        report[str(turns)] = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
        print(
            f"{turns:4} turns in place:", ", ".join(f"{name} {value:g}" for name, value in report[str(turns)].items())
        )
    print(json.dumps({"bench": "places", "seeds": options.seeds, "by_turns": report}))


if __name__ == "__main__":
    main()
