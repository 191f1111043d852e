"""How near each CPU kernel comes to reading its bytes once, and to torch, in one interleaved run.

    python bench/kernels.py
    python bench/kernels.py --dtype bfloat16 --only linear
    python bench/kernels.py --small-pages

The contestants of a case are the kernels of the registry that run here, torch's among them, and a pure read of the
bytes that the op's cost model says a call must move. All of them run once a round, in an order drawn anew each round,
over copies of weights or pools that together are larger than the caches near the cores. A ratio is the median over
rounds of ratios taken within a round, with the quartiles: on a shared machine nothing else can be compared. Weights and
pools lie in large pages of the operating system's as an engine's do, and what the pure read reads as well: each line
says how many MB of both do, by /proc/self/smaps. Shapes are those of one layer of bench/models/v3-50m.json, and larger
ones. The last line is JSON; what must be reached and is not is printed as missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "kernels")]

import numpy as np
import torch

from agentspeed_engine.models.held_weights import numbers_of
from agentspeed_engine.models.inputs import Run
from agentspeed_engine.models.memory import in_large_pages, zeros_on_demand
from agentspeed_kernels.cpu import native
from agentspeed_kernels.fp8_cache import CacheRow, heads_row, latent_row
from agentspeed_kernels.ops import OPS
from agentspeed_kernels.packing import Weight, kept_in, pack
from agentspeed_kernels.platform import detect
from agentspeed_kernels.registry import standard
from agentspeed_kernels.signature import DTYPE_BYTES, Dtype, KernelSpec, WeightFormat
from agentspeed_kernels.tiles import plan_tiles
from agentspeed_kernels.workspace import Workspace

HEADS, RANK, ROPE, NOPE, VALUE = 8, 512, 64, 128, 128
EXPERTS, INNER, HIDDEN, TOP = 8, 256, 512, 2
PAGE = 64
MB = 1 << 20
COLD_BYTES = 96 * MB
"""All copies of a case together."""
KINDS: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MUST = {
    ("linear 512x1024", 1): 0.75, ("linear 2048x2048", 1): 0.75, ("linear 5632x2048", 1): 0.75,
    ("mla_rows 8 heads at 4096", 1): 0.5, ("mla_rows 8 heads at 16384", 1): 0.5,
}  # fmt: skip
"""In bfloat16, of the pure read."""

TILES = ("amx-bf16", "avx512bf16-bf16")
"""The kernels that bounds are about: the best ones where they run."""

MUST_BYTES: dict[WeightFormat, float] = {"int8": 1.3, "int8-32": 1.15, "fp8": 1.3}
"""One row of a linear on the best form, of the same form with weights in bfloat16."""

MUST_CACHE = {
    ("mla_rows 8 heads at 4096", 1): 1.0, ("mla_rows 8 heads at 16384", 1): 1.0, ("mla_rows 8 heads at 32768", 1): 1.0,
    ("gqa_rows 16 heads of 8 at 4096", 1): 1.3, ("gqa_rows 16 heads of 8 at 16384", 1): 1.3,
    ("gqa_rows 16 heads of 8 at 32768", 1): 1.3,
}  # fmt: skip
"""The best form on pools in fp8, of the same form on pools in bfloat16."""

Step = Callable[[int], None]
"""Runs one contestant on a copy."""


@dataclass(frozen=True, slots=True)
class Runs:
    """A kernel and the format of its weights; None: that of the case."""

    spec: KernelSpec
    weights: WeightFormat | None
    large: bool
    """Whether what it reads lies in large pages."""

    @property
    def name(self) -> str:
        return (
            self.spec.name
            if self.weights is None
            else f"{self.spec.name.removesuffix('-int8').removesuffix('-fp8')}-{self.weights}"
        )

    @property
    def own(self) -> str:
        """The same kernel with weights, or a cache, in the format of the case; its own name where it has no other."""
        if self.spec.cache is not None:
            return self.spec.name.removesuffix("-fp8-cache")
        return self.name if self.weights is None else self.name.removesuffix(f"-{self.weights}")

    def call(self, *given: Any) -> None:
        self.spec.call(*given)


@dataclass(slots=True)
class Case:
    name: str
    op: str
    sizes: dict[str, int]
    copies: int
    contestant: Callable[[Runs], Step]
    """Lays out what the kernel reads, and gives what runs it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=list(KINDS), action="append")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--kernels", default="", help="begins of the names of kernels, with commas; torch's run always")
    parser.add_argument("--small-pages", action="store_true", help="weights, pools and the pure read in pages of 4 KB")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    large = not arguments.small_pages
    figures: dict[str, dict[str, float]] = {}
    for dtype in arguments.dtype or list(KINDS):
        for case in cases(KINDS[dtype]):
            if arguments.only in case.name:
                begins = arguments.kernels.split(",")
                figures |= measured(case, dtype, arguments.rounds, arguments.threads, begins, large)
    run = {"bench": "kernels", "threads": arguments.threads, "load": os.getloadavg()[0], "large_pages": large}
    print(json.dumps(run | {"kernels": figures}))


def measured(
    case: Case, dtype: Dtype, rounds: int, threads: int, begins: Sequence[str], large: bool
) -> dict[str, dict[str, float]]:
    rows = case.sizes["T"]
    cost = OPS[case.op].cost(case.sizes, DTYPE_BYTES[dtype])
    runs_here = [runs for runs in runnable(case.op, dtype, rows, large) if runs.name.startswith(("torch", *begins))]
    contestants: dict[str, Step] = {}
    in_large: dict[str, float] = {}
    for runs in runs_here:
        with noted(in_large, runs.name):
            contestants[runs.name] = case.contestant(runs)
    owns = {runs.name: runs.own for runs in runs_here}
    with noted(in_large, "read"):
        contestants["read"] = reader(cost.bytes, case.copies, threads, large)
    seconds = interleaved(contestants, case.copies, rounds)
    figures: dict[str, dict[str, float]] = {}
    for name in contestants:
        if name == "read":
            continue
        of_read, faster = seconds["read"] / seconds[name], seconds["torch"] / seconds[name]
        taken = float(np.median(seconds[name]))
        low, middle, high = np.percentile(of_read, (25, 50, 75))
        must = MUST.get((case.name, rows)) if dtype == "bfloat16" and name in TILES else None
        verdict = "" if must is None else f"  must {must}: {'reached' if middle >= must else 'MISSED'}"
        own, by = owns[name], 0.0
        if own != name and own in seconds:
            by = float(np.median(seconds[own] / seconds[name]))
            verdict = f"  x {own} {by:.2f}"
            bound = (
                MUST_CACHE.get((case.name, rows))
                if own == next((best for best in TILES if best in seconds), "")
                else None
            )
            if name.startswith("amx") and case.op == "linear" and rows == 1:
                bound = next(bound for kind, bound in MUST_BYTES.items() if name.endswith(f"-{kind}"))
            verdict += "" if bound is None else f"  must {bound}: {'reached' if by >= bound else 'MISSED'}"
        print(
            f"{case.name:28} {dtype:8} rows {rows:4} {name:12} {taken * 1e6:9.1f} us  of read {middle:5.2f} "
            f"({low:.2f} to {high:.2f})  x torch {np.median(faster):5.2f}  "
            f"{cost.flops / taken / 1e9:7.1f} GFLOP/s  in large pages {in_large[name]:.0f} MB, of the read's "
            f"{in_large['read']:.0f} of {cost.bytes * case.copies / MB:.0f}{verdict}",
            flush=True,
        )
        figures[f"{case.name}/{dtype}/{rows}/{name}"] = {
            "us": round(taken * 1e6, 1),
            "of_read": round(float(middle), 3),
            "x_torch": round(float(np.median(faster)), 2),
            "large_mb": round(in_large[name]),
        } | ({"x_own": round(by, 2)} if by else {})
    return figures


@contextmanager
def noted(in_large: dict[str, float], name: str) -> Iterator[None]:
    """Adds what of the memory that is taken meanwhile, and kept, lies in large pages: MB."""
    before = large_bytes()
    yield
    in_large[name] = (large_bytes() - before) / MB


def large_bytes() -> int:
    """Of this process; 0 where there is no such account."""
    with suppress(OSError):
        lines = Path("/proc/self/smaps").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")) << 10
    return 0


def runnable(op: str, dtype: Dtype, rows: int, large: bool) -> list[Runs]:
    present = detect().features
    fitting = [
        spec
        for spec in standard().candidates(op)
        if not spec.features - present
        and dtype in spec.dtypes
        and (spec.most_rows is None or rows <= spec.most_rows)
        # torch takes 8 bits back to the format of the case in every call: nothing to measure.
        and not ((spec.weights or spec.cache) and spec.name.startswith("torch"))
    ]
    return [
        Runs(spec, kind, large)
        for spec in fitting
        for kind in ([kind for kind in get_args(WeightFormat) if kind in spec.weights] if spec.weights else (None,))
    ]


def interleaved(contestants: dict[str, Step], copies: int, rounds: int) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of one call, by round: the mean over all copies. One thread is timed by its processor time, in which
    other processes count less."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    order, draw = list(contestants), np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            step = contestants[name]
            started = clock()
            for copy in range(copies):
                step(copy)
            if turn:  # the first round warms up
                seconds[name].append((clock() - started) / copies)
    return {name: np.array(taken) for name, taken in seconds.items()}


def reader(size: int, copies: int, threads: int, large: bool) -> Step:
    library = native.library()
    if isinstance(library, native.Unavailable):
        raise SystemExit(f"the pure read is one of the native kernels, and they are absent: {library.reason}")
    form = next(
        form for form in library.forms if "f32" in form.kinds
    )  # the best: AVX2's reads at 0.6 of AVX-512's rate
    read = library.functions(form, "f32")["read"].call
    blocks = list(memory_for(copies, (max(size // 256, 1) * 64,), torch.float32, large=large).fill_(1.0))
    seen = torch.empty(threads, 16)
    return lambda copy: read(blocks[copy].data_ptr(), blocks[copy].nbytes, seen.data_ptr(), threads)


def laid(runs: Runs, weights: list[torch.Tensor], parts: int = 1) -> list[Weight]:
    """In the format that a kernel reads, one after the other as a model's weights are."""
    laid_out: list[Weight] = []
    held: torch.Tensor | None = None
    for copy, weight in enumerate(weights):
        if runs.weights is not None:
            one: Weight = kept_in(weight, runs.weights, parts)
        else:
            one = pack(weight, parts) if runs.spec.layout == "tiles" else weight
        numbers = numbers_of(one)
        if held is None:
            held = memory_for(len(weights), tuple(numbers.shape), numbers.dtype, large=runs.large)
        held[copy] = numbers
        laid_out.append(held[copy] if isinstance(one, torch.Tensor) else replace(one, data=held[copy]))
    return laid_out


def memory_for(copies: int, shape: tuple[int, ...], dtype: torch.dtype, *, large: bool) -> torch.Tensor:
    """Zeros, [copies, *shape], side by side."""
    held = zeros_on_demand((copies, *shape), dtype, streamed=large)
    if large:  # what fills no whole large page is left as it is
        in_large_pages([held])
    return held


def pools_of(runs: Runs, kind: torch.dtype, copies: int, tokens: int, row: CacheRow) -> list[torch.Tensor]:
    """In the format that a kernel reads."""
    held: torch.Tensor | None = None
    for copy in range(copies):
        pool = torch.randn(tokens // PAGE, PAGE, row.numbers).to(kind)
        pool = pool if runs.spec.cache is None else row.coded(pool)
        if held is None:
            held = memory_for(copies, tuple(pool.shape), pool.dtype, large=runs.large)
        held[copy] = pool
    assert held is not None
    return list(held)


def drawn(kind: torch.dtype, copies: int, *shape: int) -> list[torch.Tensor]:
    return [(torch.randn(*shape) * shape[-1] ** -0.5).to(kind) for _ in range(copies)]


def copies_of(size: int) -> int:
    return max(2, min(64, COLD_BYTES // size))


def cases(kind: torch.dtype) -> list[Case]:
    return [
        *(linear(kind, rows, *shape) for shape in ((512, 1024), (1536, 512), (2048, 2048), (5632, 2048))
          for rows in (1, 8, 16, 64, 512)),
        *(heads(kind, rows) for rows in (1, 16)),
        *(experts(kind, rows) for rows in (1, 16, 512)),
        attend(kind, 1, HEADS, 4096), attend(kind, 1, 16, 4096), attend(kind, 1, HEADS, 16384),
        attend(kind, 1, HEADS, 32768),
        attend(kind, 8, HEADS, 8192), attend(kind, 32, HEADS, 8192),
        extend(kind, 200, 2048), extend(kind, 512, 4096),
        *(grouped(kind, rows, tokens) for rows, tokens in ((1, 4096), (1, 16384), (1, 32768), (8, 8192), (16, 1024))),
        grouped(kind, 512, 4096),
        *(append(kind, rows) for rows in (1, 16)), *(append_heads(kind, rows) for rows in (1, 16)),
    ]  # fmt: skip


def linear(kind: torch.dtype, rows: int, outputs: int, inputs: int) -> Case:
    copies = copies_of(outputs * inputs * kind.itemsize)

    def contestant(runs: Runs) -> Step:
        weights = laid(runs, drawn(kind, copies, outputs, inputs))
        x, out = torch.randn(rows, inputs).to(kind), torch.empty(rows, outputs, dtype=kind)
        return lambda copy: runs.call(x, weights[copy], None, out)

    return Case(f"linear {outputs}x{inputs}", "linear", {"T": rows, "N": outputs, "K": inputs}, copies, contestant)


def heads(kind: torch.dtype, rows: int) -> Case:
    copies = copies_of(HEADS * RANK * NOPE * kind.itemsize)

    def contestant(runs: Runs) -> Step:
        weights = laid(runs, drawn(kind, copies, HEADS, RANK, NOPE))
        x, out = torch.randn(rows, HEADS, NOPE).to(kind), torch.empty(rows, HEADS, RANK, dtype=kind)
        return lambda copy: runs.call(x, weights[copy], out)

    return Case("heads_linear", "heads_linear", {"T": rows, "H": HEADS, "N": RANK, "K": NOPE}, copies, contestant)


def experts(kind: torch.dtype, rows: int) -> Case:
    copies = copies_of(3 * EXPERTS * INNER * HIDDEN * kind.itemsize)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(rows)])
    sizes = {"T": rows, "D": HIDDEN, "I": INNER, "top": TOP, "hit": len(set(ids.flatten().tolist()))}

    def contestant(runs: Runs) -> Step:
        gate_up = laid(runs, drawn(kind, copies, EXPERTS, 2 * INNER, HIDDEN), parts=2)
        down = laid(runs, drawn(kind, copies, EXPERTS, HIDDEN, INNER))
        x, out = torch.randn(rows, HIDDEN).to(kind), torch.empty(rows, HIDDEN, dtype=kind)
        weights, workspace = torch.rand(rows, TOP), Workspace()
        return lambda copy: runs.call(x, gate_up[copy], down[copy], ids, weights, workspace, out)

    return Case("experts", "experts", sizes, copies, contestant)


def context(tokens: int, rows: int, chunk: int, block: int) -> Any:
    """`rows` branches below one shared context, whose pages are scattered."""
    order = np.random.default_rng(0).permutation(tokens // PAGE).astype(np.int32)
    run = Run(pages=order, start=0, tokens=tokens, queries=np.arange(rows, dtype=np.int32), causal=False)
    return plan_tiles([run], np.full(rows, tokens), page_tokens=PAGE, chunk_tokens=chunk, block_rows=block)


def attend(kind: torch.dtype, rows: int, heads_count: int, tokens: int) -> Case:
    copies = copies_of(tokens * (RANK + ROPE) * kind.itemsize)
    sizes = {"T": rows, "H": heads_count, "R": RANK, "rope": ROPE, "C": tokens}
    tiles = context(tokens, rows, 512, 32)

    def contestant(runs: Runs) -> Step:
        pools = pools_of(runs, kind, copies, tokens, latent_row(RANK, ROPE))
        q, out = torch.randn(rows, heads_count, RANK + ROPE).to(kind), torch.empty(rows, heads_count, RANK, dtype=kind)
        workspace = Workspace()
        return lambda copy: runs.call(q, pools[copy], tiles, 0.07, workspace, out)

    return Case(f"mla_rows {heads_count} heads at {tokens}", "mla_rows", sizes, copies, contestant)


def extend(kind: torch.dtype, rows: int, tokens: int) -> Case:
    sizes = {"T": rows, "H": HEADS, "R": RANK, "rope": ROPE, "nope": NOPE, "value": VALUE, "C": tokens}
    tiles = context(tokens, rows, 512, 512)

    def contestant(runs: Runs) -> Step:
        pools = pools_of(runs, kind, 2, tokens, latent_row(RANK, ROPE))
        key_up, value_up = (
            laid(runs, drawn(kind, 1, *shape))[0] for shape in ((HEADS, RANK, NOPE), (HEADS, VALUE, RANK))
        )
        q, out = torch.randn(rows, HEADS, NOPE + ROPE).to(kind), torch.empty(rows, HEADS, VALUE, dtype=kind)
        workspace = Workspace()
        return lambda copy: runs.call(q, pools[copy], key_up, value_up, tiles, 0.07, workspace, out)

    return Case(f"mla_extend over {tokens}", "mla_extend", sizes, 2, contestant)


def grouped(kind: torch.dtype, rows: int, tokens: int) -> Case:
    """16 heads of queries on 8 of keys and values; many rows are an extend's."""
    queries, keys, width = 16, 8, 128
    op = "gqa_rows" if rows <= 32 else "gqa_extend"
    copies = copies_of(2 * tokens * keys * width * kind.itemsize)
    sizes = {"T": rows, "H": queries, "G": keys, "W": width, "C": tokens}
    tiles = context(tokens, rows, 512, 32 if rows <= 32 else 512)

    def contestant(runs: Runs) -> Step:
        pools = [pools_of(runs, kind, copies, tokens, heads_row(keys, width)) for _ in ("keys", "values")]
        q, out = (torch.randn(rows, queries, width).to(kind) for _ in range(2))
        workspace = Workspace()
        return lambda copy: runs.call(q, pools[0][copy], pools[1][copy], tiles, width**-0.5, workspace, out)

    return Case(f"{op} 16 heads of 8 at {tokens}", op, sizes, copies, contestant)


def append(kind: torch.dtype, rows: int) -> Case:
    copies = 64

    def contestant(runs: Runs) -> Step:
        pools = [pool.flatten(0, 1) for pool in pools_of(runs, kind, copies, rows * PAGE, latent_row(RANK, ROPE))]
        raw, gain = torch.randn(rows, RANK + ROPE).to(kind), torch.ones(RANK, dtype=kind)
        cosines, sines = (torch.rand(rows, ROPE // 2).to(kind) for _ in range(2))
        slots = torch.arange(rows)
        return lambda copy: runs.call(raw, gain, 1e-6, cosines, sines, slots, pools[copy])

    return Case("latent_append", "latent_append", {"T": rows, "R": RANK, "rope": ROPE}, copies, contestant)


def append_heads(kind: torch.dtype, rows: int) -> Case:
    queries, keys, width, copies = 16, 8, 128, 64

    def contestant(runs: Runs) -> Step:
        pools = [pools_of(runs, kind, copies, rows * PAGE, heads_row(keys, width)) for _ in ("keys", "values")]
        qkv, gain = torch.randn(rows, queries + 2 * keys, width).to(kind), torch.ones(width, dtype=kind)
        cosines, sines = (torch.rand(rows, width // 2).to(kind) for _ in range(2))
        slots, q = torch.arange(rows), torch.empty(rows, queries, width, dtype=kind)
        return lambda copy: runs.call(qkv, gain, gain, 1e-6, cosines, sines, slots, q, pools[0][copy], pools[1][copy])

    sizes = {"T": rows, "H": queries, "G": keys, "W": width}
    return Case("qkv_append 16 heads of 8", "qkv_append", sizes, copies, contestant)


if __name__ == "__main__":
    main()
