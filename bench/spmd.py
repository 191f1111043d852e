"""What ranks cost and keep: the compiler's chain and plans, a step on two processes, equal tokens, and kills.

Run: `python bench/spmd.py [--rounds N] [--kills N]`. The last line is JSON:

- `chain_overhead`: ratio of median seconds of a step of one token, a compiled chain of one rank over calling its
  modules by hand (programs of recorded steps are not used on either side).
- `plan_seconds_v3`, `plan_peak_mb_v3`: a plan of the 671 B configuration of DeepSeek-V3 in a process of its own, from
  the start of the interpreter to the printed plan, and the most memory that it had (MiB).
- `rank_step_overhead_us`: what a greedy step of one row takes longer on two ranks than on one with layers that do
  nothing; `..._sampled_us`: one with temperature. `sum_us_shared`, `sum_us_gloo`: one sum of 2048 floats.
- `tokens_equal_tp2`, `..._tp4`, `..._dp2`, `..._dp2_tp2`: 1 where a workload with forks, rewinds, preemptions, a
  grammar, penalties and the host tier draws in float64 what one process draws.
- `kill_...`: a random rank of two is killed while four sessions draw, half of the times with tp and half with dp:
  sessions lost, processes left, and seconds until every session has drawn again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import numpy as np
import torch

from agentspeed_engine.models.catalog import read_source
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.models.kv_pools import KvPools
from agentspeed_engine.models.loaded import step_state, weight_source
from agentspeed_engine.models.rope import Rope
from agentspeed_engine.spmd.lower import lower, run
from agentspeed_engine.spmd.placement import ONE
from agentspeed_engine.spmd.plan import plan
from agentspeed_engine.spmd.spec import EVERYWHERE
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.selection import Kernels
from agentspeed_kernels.workspace import Workspace
from bench.rank_runs import kills, step_overhead_us, sum_us, tokens_equal

MODEL = ROOT / "bench/models/tiny.json"
V3 = ROOT / "bench/models/deepseek-v3.json"
PAGE, STEPS = 64, 20
"""Rows of a page; steps of each way in a round."""
MOST = {"chain_overhead": 1.02, "plan_seconds_v3": 10, "plan_peak_mb_v3": 2048, "rank_step_overhead_us": 500}
"""Targets; a figure above its own is printed as missed."""


def chain_overhead(rounds: int) -> float:
    """Both ways take turns step by step, so that what else the machine does falls on both, and of a round the medians
    are compared, so that a step which was interrupted counts for nothing."""
    source = read_source(f"random:{MODEL}")
    family, config = source.family, source.config
    kernels = Kernels(standard(), detect(), "float32", tuple(OPS))
    pools = KvPools(family.kv_layout(config, "float32", ONE.mesh), 1, PAGE)
    chain = family.build(config, weight_source(source, "float32"), pools, ONE, kernels)
    made = plan([module.boundary for module in chain], ONE.mesh, start=EVERYWHERE, finish=EVERYWHERE)
    steps = lower(made, chain, None)
    one = np.zeros(1, dtype=np.int64)
    tail = Run(pages=one.astype(np.int32), start=0, tokens=1, queries=one.astype(np.int32), causal=True)
    batch = FlatBatch(ids=one + 5, positions=one, slots=one, runs=(tail,), select=one)
    _, state = step_state(batch, Rope(config.rope, config.context_limit, torch.float32), PAGE, Workspace())
    ids = torch.from_numpy(batch.ids)

    def by_hand() -> Any:
        x: Any = ids
        residual: Any = None
        for module in chain:
            x, residual = module(x, residual, state)
        return x

    def compiled() -> Any:
        return run(steps, ids, state, (1,))

    if not torch.equal(by_hand(), compiled()):
        raise AssertionError("the compiled chain gives other logits than its modules")
    ratios: list[float] = []
    for _ in range(rounds):
        seconds: dict[Any, list[float]] = {by_hand: [], compiled: []}
        for number in range(STEPS):
            for call in (by_hand, compiled) if number % 2 else (compiled, by_hand):
                seconds[call].append(_seconds(call))
        ratios.append(statistics.median(seconds[compiled]) / statistics.median(seconds[by_hand]))
    return statistics.median(ratios)


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def planned() -> tuple[float, float]:
    """(Seconds, MiB at the most) of the command, as a user runs it."""
    code = f"import sys; sys.path[:0] = {sys.path[:3]!r}; from agentspeed.cli import main; main()"
    words = [sys.executable, "-c", code, "plan", str(V3), "--tp", "16", "--memory", "141GB", "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as out:
        shown = json.loads(out.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode or shown["parameters"] != 671_026_419_200:
        raise AssertionError(f"the plan ended with {process.returncode} and {shown['parameters']} parameters")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    seconds, peak = planned()
    line: dict[str, float] = {
        "chain_overhead": round(chain_overhead(arguments.rounds), 4),
        "plan_seconds_v3": round(seconds, 2),
        "plan_peak_mb_v3": round(peak),
    }
    with tempfile.TemporaryDirectory() as scratch:
        line |= step_overhead_us(arguments.rounds) | sum_us(Path(scratch))
        line |= tokens_equal(Path(scratch))
        if arguments.kills:
            line |= kills(Path(scratch), arguments.kills)
    for name, most in MOST.items():
        print(f"{name:22} {line[name]:>9}   target <= {most}   {'met' if line[name] <= most else 'MISSED'}")
    print(json.dumps(line))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
