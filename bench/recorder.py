"""What the flight recorder costs: the same steps of the same scheduler, recorded and not, side by side in one run.

Run: `python bench/recorder.py [--rounds N]`. Two cores get the same commands and results, one of them through a tape
that writes to a temporary folder. They take turns, eight steps at a time, so that the machine's moods fall on both.
A step is `plan`, `apply` and, when recorded, the write that ends a round of the loop. The last line is JSON:
`ratio_p50` is the recorded step over the plain one; `head_ms` and `head_mb` are what it takes to begin a segment with
this much state.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from agentspeed_engine.ids import LinkId, pages_for
from agentspeed_engine.protocol.messages import Generate, Open, Opened
from agentspeed_engine.protocol.token_ids import pack_ids
from agentspeed_engine.sched.config import CoreConfig
from agentspeed_engine.sched.core import Core
from agentspeed_engine.sched.plan import Drawn, StepPlan, StepResult
from agentspeed_engine.sched.recorder import RecordedCore
from agentspeed_engine.serve.recording import RecordingOrder, Tape

VOCABULARY, PAGE, LINK, STEPS_A_TURN, SECONDS = 32_000, 64, LinkId(1), 8, 0.03


class Side:
    """One core, with or without a tape, and the microseconds of its steps."""

    def __init__(self, config: CoreConfig, tape_in: Path | None) -> None:
        core = Core(config)
        order = None if tape_in is None else RecordingOrder(folder=tape_in, most_bytes=256 << 20, content=False)
        self.tape = None if order is None else Tape(core, order, began=0.0)
        self.core: Core | RecordedCore = core if self.tape is None else self.tape.core
        self.micros: list[float] = []
        self.now = 0.0

    def begin(self, prompts: list[bytes]) -> None:
        for request, ids in enumerate(prompts):
            opened = self.core.handle(LINK, Open(request=request, ids=ids), self.now)[0][1]
            assert isinstance(opened, Opened)
            self.core.handle(LINK, Generate(request=request, branch=opened.branch), self.now)
            self.write()
        while self.core.counts()["branches_decoding"] < len(prompts):
            self.step()
        self.micros.clear()

    def step(self) -> None:
        self.now += SECONDS
        started = time.perf_counter_ns()
        plan = self.core.plan(self.now)
        planned = time.perf_counter_ns()
        assert plan is not None
        result = result_of(plan)
        again = time.perf_counter_ns()
        self.core.apply(result, self.now + SECONDS)
        self.write()
        self.micros.append((time.perf_counter_ns() - again + planned - started) / 1000)

    def write(self) -> None:
        if self.tape is not None:
            self.tape.flush()


def result_of(plan: StepPlan) -> StepResult:
    return StepResult(plan.seq, tuple(Drawn(row.branch, row.epoch, 5) for row in plan.rows if row.sample is not None))


def measured(branches: int, context: int, rounds: int, folder: Path) -> dict[str, float]:
    draw = random.Random(0)
    prompts = [pack_ids([draw.randrange(VOCABULARY) for _ in range(context)]) for _ in range(branches)]
    steps = rounds * STEPS_A_TURN
    config = CoreConfig(
        pages=branches * pages_for(context + steps + 64, PAGE) + 1024,
        firm_pages=0,
        context_limit=65_536,
        vocab_size=VOCABULARY,
        page_tokens=PAGE,
        prefill_chunk=8192,
    )
    plain, recorded = Side(config, None), Side(config, folder)
    for side in (plain, recorded):
        side.begin(prompts)
    gc.collect()
    gc.freeze()
    assert recorded.tape is not None
    before = recorded.tape.size
    for number in range(rounds):
        for side in (plain, recorded) if number % 2 else (recorded, plain):
            for _ in range(STEPS_A_TURN):
                side.step()
    written = recorded.tape.size - before
    before = recorded.tape.size
    started = time.perf_counter()
    recorded.tape.begin_segment()
    head = time.perf_counter() - started
    head_bytes = recorded.tape.size - before
    recorded.tape.close()
    most = int(0.99 * steps)
    return {
        "plain_us_p50": statistics.median(plain.micros),
        "recorded_us_p50": statistics.median(recorded.micros),
        "plain_us_p99": sorted(plain.micros)[most],
        "recorded_us_p99": sorted(recorded.micros)[most],
        "plain_us_mean": statistics.fmean(plain.micros),
        "recorded_us_mean": statistics.fmean(recorded.micros),
        "ratio_p50": statistics.median(recorded.micros) / statistics.median(plain.micros),
        "added_us_mean": statistics.fmean(recorded.micros) - statistics.fmean(plain.micros),
        "bytes_a_step": written / steps,
        "head_ms": 1000 * head,
        "head_mb": head_bytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=150)
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for branches, context in ((1, 8_000), (8, 20_000), (64, 50_000)):
        with tempfile.TemporaryDirectory() as folder:
            one = measured(branches, context, options.rounds, Path(folder))
        figures[f"{branches}x{context}"] = {name: round(value, 3) for name, value in one.items()}
        print(
            f"{branches:3} branches at {context:6} tokens: a step {one['plain_us_p50']:.0f} us, recorded "
            f"{one['recorded_us_p50']:.0f} us ({one['ratio_p50']:.2f} times; p99 {one['plain_us_p99']:.0f} and "
            f"{one['recorded_us_p99']:.0f}), mean {one['added_us_mean']:.0f} us more, "
            f"{one['bytes_a_step']:.0f} bytes; a new segment takes {one['head_ms']:.0f} ms and "
            f"{one['head_mb']:.1f} MB"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
