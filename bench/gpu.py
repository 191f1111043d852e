"""Builds, checks and times the GPU kernels in one command.

    python bench/gpu.py [--sections check,decode,forks] [--peers FOLDER] [--json FILE]

Everything on random bfloat16 data. `share` is the limit over the measured time, the limit being the larger of
bytes / 4.63 TB/s and FLOPs / 786 TF (one H200, short bursts; the `ceilings` section measures both again). Peers
(FlashMLA, FA3) run in the same process on the same tensors when --peers names a folder with `flashmla.so` and
`fa3.so`, or either packed with xz. A figure under its target is printed as missed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT / "bench")]

import gpu_agents
import gpu_attention
import gpu_engine
import gpu_fp8
import gpu_fp8_cache
import gpu_graphs
import gpu_grouped
import gpu_invariant
import gpu_joined
import gpu_layers
import torch
from gpu_timing import Report, fail

POOL_PAGES = 80000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="", help="comma-separated; all when left out")
    parser.add_argument("--peers", default=None)
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU is present; the kernels' numbers are tested on the CPU by tests/conformance.", file=sys.stderr)
        return 2
    report = Report(arguments.json)
    pool = gpu_attention.make_pool(POOL_PAGES)
    peers = gpu_attention.load_peers(arguments.peers)
    sections: dict[str, Callable[[], None]] = {
        "ceilings": lambda: gpu_layers.section_ceilings(report, pool),
        "check": lambda: gpu_attention.section_check(report, pool),
        "layers": lambda: gpu_layers.section_check(report),
        "plans": lambda: gpu_attention.section_plans(report, pool),
        "decode": lambda: gpu_attention.section_decode(report, pool, peers),
        "forks": lambda: gpu_attention.section_forks(report, pool, peers),
        "merge": lambda: gpu_attention.section_merge(report, pool),
        "experts": lambda: gpu_layers.section_experts(report),
        "small": lambda: gpu_layers.section_small(report),
        "joined": lambda: gpu_joined.section_joined(report),
        "extend": lambda: gpu_layers.section_extend(report, pool),
        "grouped-check": lambda: gpu_grouped.section_check(report),
        "grouped-rows": lambda: gpu_grouped.section_rows(report),
        "grouped-extend": lambda: gpu_grouped.section_extend(report),
        "grouped-append": lambda: gpu_grouped.section_append(report),
        "grouped-products": lambda: gpu_grouped.section_products(report),
        "graphs": lambda: gpu_graphs.section_graphs(report),
        "graphs-gqa": lambda: gpu_graphs.section_graphs(report, "qwen3-8b", gpu_graphs.GROUPED),
        "mixed": lambda: gpu_graphs.section_mixed(report),
        "invariant": lambda: gpu_invariant.section_invariant(report),
        "fp8": lambda: gpu_fp8.section_fp8(report),
        "steps-fp8": lambda: gpu_fp8.section_steps(report),
        "fp8-cache-check": lambda: gpu_fp8_cache.section_check(report, pool),
        "fp8-cache": lambda: gpu_fp8_cache.section_fp8_cache(report, pool),
        "steps-fp8-cache": lambda: gpu_fp8_cache.section_steps(report),
        "engine": lambda: gpu_engine.section_engine(report),
        "engine-fp8": lambda: gpu_engine.section_engine_fp8(report),
        "engine-fp8-cache": lambda: gpu_engine.section_engine_fp8_cache(report),
        "engine-gqa": lambda: gpu_engine.section_engine(report, gpu_engine.GROUPED),
        "agents": lambda: gpu_agents.section_agents(report),
    }
    wanted = [name for name in arguments.sections.split(",") if name] or list(sections)
    broken = []
    for name in wanted:
        started = time.time()
        try:
            sections[name]()
        except Exception:  # noqa: BLE001 - one broken section must not hide the others' figures; the exit code tells
            broken.append(name)
            fail(f"{name}: {traceback.format_exc()[-1500:]}")
        torch.cuda.synchronize()
        print(f"-- {name}: {time.time() - started:.1f} s", flush=True)
    for line in report.missed():
        print(f"MISSED {line}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.time() - report.started:.0f} s in all")
    return 1 if broken or report.missed() else 0


if __name__ == "__main__":
    sys.exit(main())
