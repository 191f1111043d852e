"""How near each CPU kernel comes to what the machine can do, by the cost model its op declares.

    python bench/kernels.py

The limit of a call is the larger of bytes / read bandwidth and FLOPs / product rate, both the best seen on this machine
with the same threads before and after the kernels; kernels are medians. Weights and pools rotate over more memory than
the caches near the cores hold. Shapes are those of one layer of bench/models/v3-50m.json. The last line is JSON.
"""


from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels")]

import numpy as np
import torch

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.tiles import plan_tiles
from agentspeed_kernels.workspace import Workspace

HIDDEN, HEADS, RANK, ROPE, NOPE, VALUE, EXPERTS, INNER, TOP = 512, 8, 512, 64, 128, 128, 8, 256, 2
CONTEXT, PAGE, COPIES = 4096, 64, 8
Case = tuple[str, dict[str, int], Callable[[KernelSpec, int], None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = read_bandwidth(arguments.repeats), product_rate(arguments.repeats)
    measured = [
        (f"{op}/{spec.name}", op, sizes, timed(partial(call, spec), arguments.repeats))
        for op, sizes, call in cases()
        for spec in runnable(op, sizes["T"])
    ]
    after = read_bandwidth(arguments.repeats), product_rate(arguments.repeats)
    bandwidth, rate = (max(pair) for pair in zip(before, after, strict=True))
    print(f"limits: {bandwidth / 1e9:.1f} GB/s read, {rate / 1e9:.0f} GFLOP/s float32 products")
    figures: dict[str, dict[str, float]] = {}
    for name, op, sizes, seconds in measured:
        taken, rows = median(seconds), sizes["T"]
        ratio = OPS[op].cost(sizes, 4).limit_seconds(bandwidth, rate) / taken
        figures[f"{name}/{rows}"] = {"us": round(taken * 1e6, 1), "of_limit": round(ratio, 3)}
        print(f"{name:20} rows {rows:4}  {taken * 1e6:9.1f} us  {ratio:6.1%} of the limit")
    limits = {"gbps": round(bandwidth / 1e9, 1), "gflops": round(rate / 1e9)}
    print(json.dumps({"bench": "kernels", "threads": arguments.threads, **limits, "kernels": figures}))


def runnable(op: str, rows: int) -> list[KernelSpec]:
    present = detect().features
    return [
        spec
        for spec in standard().candidates(op)
        if not spec.features - present and (spec.most_rows is None or rows <= spec.most_rows)
    ]


def timed(call: Callable[[int], None], repeats: int) -> list[float]:
    """Seconds of each call; consecutive calls use different copies of weights and pools."""
    for copy in range(COPIES):
        call(copy)
    seconds: list[float] = []
    for _ in range(repeats):
        for copy in range(COPIES):
            started = time.perf_counter()
            call(copy)
            seconds.append(time.perf_counter() - started)
    return seconds


def read_bandwidth(repeats: int) -> float:
    blocks = torch.ones(COPIES, 4 << 20)
    return blocks[0].numel() * 4 / min(timed(lambda copy: add_up(blocks[copy]), repeats))


def product_rate(repeats: int) -> float:
    left, right, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    return 2 * 1024**3 / min(timed(lambda _: multiply(left, right, out), repeats))


def add_up(block: torch.Tensor) -> None:
    block.sum()


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(left, right, out=out)


def cases() -> list[Case]:
    return [*(linear(rows) for rows in (1, 8, 512)), *(heads(rows) for rows in (1, 8)),
            *(experts(rows) for rows in (1, 8, 512)), *(attend(rows) for rows in (1, 8)), extend(256)]  # fmt: skip


def linear(rows: int) -> Case:
    x, weights, out = torch.randn(rows, 1024), torch.randn(COPIES, HIDDEN, 1024), torch.empty(rows, HIDDEN)
    sizes = {"T": rows, "N": HIDDEN, "K": 1024}
    return "linear", sizes, lambda spec, copy: spec.call(x, weights[copy], None, out)


def heads(rows: int) -> Case:
    x, weights = torch.randn(rows, HEADS, NOPE), torch.randn(COPIES, HEADS, RANK, NOPE)
    out = torch.empty(rows, HEADS, RANK)
    sizes = {"T": rows, "H": HEADS, "N": RANK, "K": NOPE}
    return "heads_linear", sizes, lambda spec, copy: spec.call(x, weights[copy], out)


def experts(rows: int) -> Case:
    x, out, workspace = torch.randn(rows, HIDDEN), torch.empty(rows, HIDDEN), Workspace()
    gate_up, down = torch.randn(COPIES, EXPERTS, 2 * INNER, HIDDEN), torch.randn(COPIES, EXPERTS, HIDDEN, INNER)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(rows)])
    weights = torch.rand(rows, TOP)
    sizes = {"T": rows, "D": HIDDEN, "I": INNER, "top": TOP, "hit": len(set(ids.flatten().tolist()))}
    return "experts", sizes, lambda spec, copy: spec.call(x, gate_up[copy], down[copy], ids, weights, workspace, out)


def context(rows: int, chunk: int, block: int) -> tuple[torch.Tensor, Any]:
    """`rows` branches below one shared context."""
    run = Run(pages=np.arange(CONTEXT // PAGE, dtype=np.int32), start=0, tokens=CONTEXT,
              queries=np.arange(rows, dtype=np.int32), causal=False)  # fmt: skip
    tiles = plan_tiles([run], np.full(rows, CONTEXT), page_tokens=PAGE, chunk_tokens=chunk, block_rows=block)
    return torch.randn(COPIES, CONTEXT // PAGE, PAGE, RANK + ROPE), tiles


def attend(rows: int) -> Case:
    pools, tiles = context(rows, 512, 32)
    q, out, workspace = torch.randn(rows, HEADS, RANK + ROPE), torch.empty(rows, HEADS, RANK), Workspace()
    sizes = {"T": rows, "H": HEADS, "R": RANK, "rope": ROPE, "C": CONTEXT}
    return "mla_rows", sizes, lambda spec, copy: spec.call(q, pools[copy], tiles, 0.07, workspace, out)


def extend(rows: int) -> Case:
    pools, tiles = context(rows, 512, 512)
    q, out, workspace = torch.randn(rows, HEADS, NOPE + ROPE), torch.empty(rows, HEADS, VALUE), Workspace()
    key_up, value_up = torch.randn(HEADS, RANK, NOPE), torch.randn(HEADS, VALUE, RANK)
    sizes = {"T": rows, "H": HEADS, "R": RANK, "rope": ROPE, "nope": NOPE, "value": VALUE, "C": CONTEXT}
    return (
        "mla_extend",
        sizes,
        lambda spec, copy: spec.call(q, pools[copy], key_up, value_up, tiles, 0.07, workspace, out),
    )


if __name__ == "__main__":
    main()
