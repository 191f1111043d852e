"""Times the scheduler alone: 64 branches decoding at 50 K tokens, then 256 cold prompts of 50 K waiting.

Run: `python bench/sched.py [--steps N]`. Microseconds per call on one core (`cpu`: without
what other processes took of it); the last line is JSON. The published
comparison (a C++ scheduler on two such cores) is 2200 us p50, 36 000 us p99, and 269 000 us with prompts waiting.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from agentspeed_engine.ids import LinkId, pack_ids, pages_for
from agentspeed_engine.sched.core import Core, CoreConfig
from agentspeed_engine.sched.plan import Drawn, StepPlan, StepResult
from agentspeed_engine.wire import Fork, Generate, Open, Opened

T = TypeVar("T")
VOCABULARY, CONTEXT, PAGE = 32_000, 50_000, 64
LINK = LinkId(1)


class Timed:
    """Microseconds of each call, by name."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], T]) -> T:
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = call()
        self.samples.setdefault(f"{name}_cpu", []).append((time.thread_time_ns() - cpu) / 1000)
        self.samples.setdefault(name, []).append((time.perf_counter_ns() - start) / 1000)
        return result

    def quantile(self, name: str, share: float) -> float:
        ordered = sorted(self.samples[name])
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)


def result_of(plan: StepPlan) -> StepResult:
    return StepResult(plan.seq, tuple(Drawn(row.branch, row.epoch, 5) for row in plan.rows if row.sample is not None))


def prompt(random_ids: random.Random) -> bytes:
    return pack_ids([random_ids.randrange(VOCABULARY) for _ in range(CONTEXT)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--branches", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=256)
    options = parser.parse_args()
    draw = random.Random(0)
    limit = 65_536
    per_branch = pages_for(CONTEXT + options.steps + 600, PAGE)
    # Room for the running branches and for two of the prompts: the others wait while those are computed.
    core = Core(CoreConfig(pages=(options.branches + 2) * per_branch, firm_pages=0, context_limit=limit,
                           vocab_size=VOCABULARY, page_tokens=PAGE, prefill_chunk=8192))
    timed = Timed()
    now = 0.0
    for request in range(options.branches):
        opened = core.handle(LINK, Open(request=request, ids=prompt(draw)), now)[0][1]
        assert isinstance(opened, Opened)
        core.handle(LINK, Generate(request=request, branch=opened.branch), now)
    while core.counts()["branches_decoding"] < options.branches:
        plan = core.plan(now)
        assert plan is not None
        core.apply(result_of(plan), now)
    gc.collect()
    gc.freeze()

    def steps(name: str, count: int) -> None:
        nonlocal now
        for _ in range(count):
            now += 0.03
            plan = timed(name, partial(core.plan, now))
            assert plan is not None and len(plan.rows) >= options.branches
            result = result_of(plan)
            timed("apply", partial(core.apply, result, now))

    steps("plan", options.steps)
    for request in range(options.waiting):
        command = Open(request=request, ids=prompt(draw))
        reply = timed("handle_open", partial(core.handle, LINK, command, now))[0][1]
        assert isinstance(reply, Opened)
        branch = reply.branch
        timed("handle_generate", partial(core.handle, LINK, Generate(request=request, branch=branch), now))
    before = core.counts()["preemptions"]
    steps("plan_waiting", 64)
    timed("handle_fork", partial(core.handle, LINK, Fork(request=1, branch=1, n=1), now))
    figures = {
        "plan_us_p50": timed.quantile("plan", 0.5), "plan_us_p99": timed.quantile("plan", 0.99),
        "plan_cpu_us_p99": timed.quantile("plan_cpu", 0.99),
        "plan_us_waiting": timed.quantile("plan_waiting", 0.5),
        "apply_us_p50": timed.quantile("apply", 0.5), "apply_us_p99": timed.quantile("apply", 0.99),
        "handle_open_50k_us_p50": timed.quantile("handle_open", 0.5),
        "handle_generate_us_p50": timed.quantile("handle_generate", 0.5),
        "waiting": core.counts()["waiting_turns"], "preemptions": core.counts()["preemptions"] - before,
        "spread_plan_us": round(statistics.pstdev(timed.samples["plan"]), 1),
    }
    targets = {"plan_us_p50": 500, "plan_us_p99": 2000, "plan_us_waiting": 1000}
    for name, most in targets.items():
        print(f"{name:18} {figures[name]:>9} us   target <= {most}   {'met' if figures[name] <= most else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
