"""Sections of bench/gpu.py: a KV cache in fp8 beside one in bfloat16, in the kernels that read and write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from gpu_attention import PAGE, RANK, ROPE, SCALE, WIDTH, Batch
from gpu_checks import Size, check
from gpu_engine import LATENT as MODEL
from gpu_fp8 import stepped
from gpu_graphs import Branches
from gpu_grouped import GROUPS, HEADS
from gpu_grouped import SCALE as GROUPED_SCALE
from gpu_grouped import WIDTH as HEAD_WIDTH
from gpu_layers import bf16
from gpu_timing import DEVICE, Report, limit_us, relative, rotated

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.fp8_cache import CacheRow, heads_row, latent_row
from agentspeed_kernels.signature import Dtype
from agentspeed_kernels.triton import attention, backend, extend, grouped, kernels, specs
from agentspeed_kernels.triton.attention import RowsOnDevice
from agentspeed_kernels.workspace import Workspace

LATENT, GROUPED = latent_row(RANK, ROPE), heads_row(GROUPS, HEAD_WIDTH)
SIZES: dict[Dtype, tuple[Size, ...]] = {"bfloat16": ("small", "wide")}
MUST, ANYWHERE = 1.4, 0.95
"""Times the speed of bfloat16 that latents of many branches and long contexts must have, and everything else."""
MOST_APART = 6e-3
DECODE = [(batch, context) for batch in (1, 8, 32, 128) for context in (4096, 8192, 32_768)]
STEPS = {
    f"{count} at {context}": Branches(count, context, forked=False) for context in (4096, 32_768) for count in (1, 32)
}
"""Branches whose decode steps are timed."""
STEP_APART = 0.15
"""Of logits of a captured step beside those of the modules: a near tie of the router may fall otherwise."""
OTHERS: dict[str, tuple[list[int], int, int, int]] = {
    "H16 8 forks at 32768": ([32_768 + 512] * 8, 16, 1, 32_768),
    "H16 q4 B32 8192": ([8192] * 32, 16, 4, 0),
    "H64 B8 8192": ([8192] * 8, 64, 1, 0),
    "H128 B8 8192": ([8192] * 8, 128, 1, 0),
}
"""Lengths, heads, new tokens of each, shared tokens."""


@final
class Bytes(Batch):
    """The same sequences over latents in fp8."""

    def __init__(self, pool: torch.Tensor, *given: Any, **options: Any) -> None:
        super().__init__(pool, *given, **options)
        tokens = self.shared + sum(length - self.shared for length in self.lengths)
        flops = 2 * (WIDTH + RANK) * self.heads * self.new * sum(self.lengths)
        self.limit = limit_us(tokens * LATENT.nbytes, flops)
        self.bytes = tokens * LATENT.nbytes

    def prepare(self, plain: bool = False, folded: bool = True, **options: Any) -> list[RowsOnDevice]:
        shape = backend.shape_of(self.heads, RANK, ROPE, PAGE, DEVICE, 1)
        return [
            attention.prepare(self.pieces(r, folded), self.positions, shape, DEVICE, **options)
            for r in range(self.rotations)
        ]

    def numbers(self, pages: torch.Tensor) -> torch.Tensor:
        return LATENT.decoded(self.pool[pages], torch.float64)


def in_bytes(pool: torch.Tensor, row: CacheRow) -> torch.Tensor:
    """[P, page, numbers] as a pool of bytes, some pages at a time."""
    held = torch.empty(*pool.shape[:-1], row.nbytes, dtype=torch.uint8, device=pool.device)
    for at in range(0, pool.shape[0], 4000):
        held[at : at + 4000] = row.coded(pool[at : at + 4000])
    return held


def section_check(report: Report, pool: torch.Tensor) -> None:
    """Errors against the definitions in float64, of hostile inputs too, and of attention over long contexts."""
    check(report, "fp8-cache", [spec for spec in specs.SPECS if spec.cache], SIZES)
    accuracy(report, pool[:2000], in_bytes(pool[:2000], LATENT))


def section_fp8_cache(report: Report, pool: torch.Tensor) -> None:
    """Every kernel beside that of bfloat16: `times` is how much faster, the limit counts bytes."""
    held = in_bytes(pool, LATENT)
    for count, context in DECODE:
        must = MUST if count >= 32 and context >= 8192 else ANYWHERE
        _rows(report, f"H16 B{count} {context}", pool, held, must, [context] * count, 16)
    for name, (lengths, heads, new, shared) in OTHERS.items():
        _rows(report, name, pool, held, ANYWHERE, lengths, heads, new=new, shared=shared)
    _extends(report, pool, held)
    _appends(report, pool, held)
    del held
    torch.cuda.empty_cache()
    _grouped(report)


def accuracy(report: Report, pool: torch.Tensor, held: torch.Tensor) -> None:
    """Attention over bytes beside float64 over what they stand for, and over the latents they were made of."""
    ragged = [1, 63, 64, 65, 127, 1000, 4097, 8191]
    cases: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "H16 ragged": ((ragged, 16), {}, {}),
        "H8 ragged": ((ragged, 8), {}, {}),
        "H20 ragged": ((ragged, 20), {}, {}),
        "H64 ragged": ((ragged, 64), {}, {}),
        "H16 q4 edge": (([4, 70, 500, 2049], 16), {"new": 4}, {}),
        "H16 q33 edge": (([33, 70, 500, 2049], 16), {"new": 33}, {}),
        "H16 fixed cut": (([4, 70, 500, 9000], 16), {"new": 4}, {"cut": "fixed"}),
        "H16 stream": ((ragged, 16), {}, {"cut": "stream"}),
        "H16 forks": (([8192 + n for n in (1, 64, 65, 300)], 16), {"shared": 8192}, {}),
    }
    for name, (given, options, plan) in cases.items():
        batch = Bytes(held, *given, **options)
        steps = batch.prepare(**plan)
        first, wanted = batch.run(steps).clone(), batch.wanted()
        exact = Batch(pool, *given, **options)
        exact.q = batch.q
        error, same = relative(first, wanted), all(bool((batch.run(steps) == first).all()) for _ in range(5))
        report.add("fp8-cache", f"{name}, against float64", error=error, of_bytes=relative(wanted, exact.wanted()),
                   repeats_equal=same, met=error < MOST_APART and same)  # fmt: skip


def _rows(
    report: Report, name: str, pool: torch.Tensor, held: torch.Tensor, must: float, lengths: Sequence[int], heads: int,
    new: int = 1, shared: int = 0,
) -> None:  # fmt: skip
    taken: dict[str, float] = {}
    for kind, kept, given in (("us", Bytes, held), ("bf16_us", Batch, pool)):
        batch = kept(given, lengths, heads, new=new, shared=shared)
        steps = batch.prepare()
        taken[kind] = rotated(lambda r, b=batch, s=steps: b.run(s, r), batch.rotations, batch.limit * 1.5)
        if isinstance(batch, Bytes):
            limit, size, form = batch.limit, batch.bytes, steps[0].form
    times = taken["bf16_us"] / taken["us"]
    report.add("fp8-cache", f"mla_rows {name}", **taken, times=times, must=must, met=times >= must, limit_us=limit,
               share=limit / taken["us"], mb=size / 1e6, form=f"{form.block_rows}x{form.tile}")  # fmt: skip


def _beside(
    report: Report, name: str, rotations: int, expected: float, call: Callable[[int], Any], other: Callable[[int], Any],
    **more: Any,
) -> None:  # fmt: skip
    """Both calls take the data set they read."""
    taken, wide = (rotated(one, rotations, expected, 1000) for one in (call, other))
    report.add("fp8-cache", name, us=taken, bf16_us=wide, times=wide / taken, must=ANYWHERE,
               met=wide / taken >= ANYWHERE, **more)  # fmt: skip


def _run(count: int, context: int, first: int = 0) -> Run:
    pages = -(-(context + count) // PAGE)
    return Run(
        pages=np.arange(first, first + pages, dtype=np.int32), start=0, tokens=context + count,
        queries=np.arange(count, dtype=np.int32), causal=True,
    )  # fmt: skip


def _extends(report: Report, pool: torch.Tensor, held: torch.Tensor) -> None:
    """New tokens of one branch on a cached context, decompressed."""
    key_up, value_up = bf16(16, RANK, 128), bf16(16, 128, RANK)
    for count in (512, 2048):
        q, outs, workspace = bf16(count, 16, 192), [bf16(count, 16, 128) for _ in range(2)], Workspace(DEVICE)
        positions = np.arange(32_768, 32_768 + count)
        step = extend.prepare_extend([_run(count, 32_768)], positions, PAGE, 16, DEVICE)
        calls = [
            lambda _, p=p, q=q, step=step, w=workspace, out=out: extend.mla_extend(
                q, p, key_up, value_up, step, SCALE, w, out
            )
            for p, out in zip((held, pool), outs, strict=True)
        ]
        # The same long extend over what the bytes stand for.
        numbers = LATENT.decoded(held[: len(step[0].pages)], torch.bfloat16)
        wanted = bf16(count, 16, 128)
        extend.mla_extend(q, numbers, key_up, value_up, step, SCALE, workspace, wanted)
        calls[0](0)
        _beside(report, f"mla_extend {count} on 32768", 1, 3000.0, *calls, apart=relative(outs[0], wanted))


def _appends(report: Report, pool: torch.Tensor, held: torch.Tensor) -> None:
    gain, key_up = bf16(RANK), bf16(16, RANK, 128)
    for rows in (1, 32, 2048):
        raw, cos, sin, slots = bf16(rows, WIDTH), bf16(rows, 32), bf16(rows, 32), torch.arange(rows, device=DEVICE)
        q, out = bf16(rows, 16, 192), bf16(rows, 16, WIDTH)
        tail = (gain, 1e-6, cos, sin, slots)
        _beside(
            report, f"latent_append T{rows}", 1, 3.0,
            lambda _, a=(raw, *tail): kernels.latent_append(*a, held),
            lambda _, a=(raw, *tail): kernels.latent_append(*a, pool),
        )  # fmt: skip
        _beside(
            report, f"mla_queries T{rows}", 1, 5.0,
            lambda _, a=(q, raw, *tail, key_up), out=out: kernels.mla_queries(*a, held, out),
            lambda _, a=(q, raw, *tail, key_up), out=out: kernels.mla_queries(*a, pool, out),
        )  # fmt: skip


def _grouped(report: Report) -> None:
    """In Qwen3-8B's shapes."""
    for count, context in ((1, 4096), (1, 32_768), (8, 4096), (32, 4096), (32, 32_768), (128, 4096)):
        _group_rows(report, count, context)
        torch.cuda.empty_cache()
    pages, qkv_heads = 600, HEADS + 2 * GROUPS
    pools = [bf16(pages, PAGE, GROUPS * HEAD_WIDTH) for _ in range(2)]
    held = [in_bytes(pool, GROUPED) for pool in pools]
    for rows in (1, 32, 2048):
        qkv, gain, q = bf16(rows, qkv_heads, HEAD_WIDTH), bf16(HEAD_WIDTH), bf16(rows, HEADS, HEAD_WIDTH)
        cos, sin, slots = bf16(rows, 64), bf16(rows, 64), torch.arange(rows, device=DEVICE)
        given = (qkv, gain, gain, 1e-6, cos, sin, slots, q)
        _beside(
            report, f"qkv_append T{rows}", 1, 5.0,
            lambda _, a=given: grouped.qkv_append(*a, *held), lambda _, a=given: grouped.qkv_append(*a, *pools),
        )  # fmt: skip
    for count in (512, 2048):
        q, outs = bf16(count, HEADS, HEAD_WIDTH), [bf16(count, HEADS, HEAD_WIDTH) for _ in range(2)]
        workspace, positions = Workspace(DEVICE), np.arange(32_768, 32_768 + count)
        step = extend.prepare_extend([_run(count, 32_768)], positions, PAGE, HEADS, DEVICE)
        calls = [
            lambda _, p=p, q=q, step=step, w=workspace, out=out: grouped.gqa_extend(q, *p, step, GROUPED_SCALE, w, out)
            for p, out in zip((held, pools), outs, strict=True)
        ]
        wanted = bf16(count, HEADS, HEAD_WIDTH)
        numbers = [GROUPED.decoded(one[: len(step[0].pages)], torch.bfloat16) for one in held]
        grouped.gqa_extend(q, *numbers, step, GROUPED_SCALE, workspace, wanted)
        calls[0](0)
        _beside(report, f"gqa_extend {count} on 32768", 1, 3000.0, *calls, apart=relative(outs[0], wanted))


def _group_rows(report: Report, count: int, context: int) -> None:
    pages = count * context // PAGE
    layers = int(min(24, max(2, 3e9 // (4 * pages * PAGE * GROUPS * HEAD_WIDTH))))
    pools = [bf16(layers * pages, PAGE, GROUPS * HEAD_WIDTH) for _ in range(2)]
    held = [in_bytes(pool, GROUPED) for pool in pools]
    q, outs = bf16(count, HEADS, HEAD_WIDTH), [bf16(count, HEADS, HEAD_WIDTH) for _ in range(2)]
    workspace = Workspace(DEVICE)
    each = context // PAGE
    order = np.random.default_rng(0).permutation(pages).astype(np.int32)
    runs = [
        Run(
            pages=order[at * each : (at + 1) * each], start=0, tokens=context,
            queries=np.array([at], dtype=np.int32), causal=True,
        )
        for at in range(count)
    ]  # fmt: skip
    positions = np.full(count, context - 1)

    def bound(kept: list[torch.Tensor], item: int, out: torch.Tensor) -> Callable[[int], Any]:
        shape = backend.grouped_shape_of(HEADS, GROUPS, HEAD_WIDTH, PAGE, DEVICE, item)
        plan = attention.prepare(runs, positions, shape, DEVICE)

        def call(layer: int) -> None:
            own = [pool[layer * pages : (layer + 1) * pages] for pool in kept]
            grouped.gqa_rows(q, own[0], own[1], plan, GROUPED_SCALE, workspace, out)

        return call

    calls = [bound(held, 1, outs[0]), bound(pools, 2, outs[1])]
    calls[0](0)
    # bfloat16's kernel over what the bytes stand for.
    bound([GROUPED.decoded(one[:pages], torch.bfloat16) for one in held], 2, outs[1])(0)
    apart = relative(*outs)
    limit = limit_us(2 * count * context * GROUPED.nbytes, 0)
    taken, wide = (rotated(call, layers, limit * 1.5) for call in calls)
    times = wide / taken
    report.add("fp8-cache", f"gqa_rows B{count} {context}", us=taken, bf16_us=wide, times=times, must=ANYWHERE,
               met=times >= ANYWHERE, limit_us=limit, share=limit / taken, apart=apart)  # fmt: skip


def section_steps(report: Report) -> None:
    """Decode steps as a model of V2-Lite's shapes makes them, captured and joined, with both formats of its cache."""
    pages = max(case.pages for case in STEPS.values())
    taken: dict[str, dict[str, float]] = {}
    for kept in ("dtype", "fp8"):
        cache: Any = None if kept == "dtype" else kept
        model = load(MODEL, dtype="bfloat16", pages=pages, page_tokens=PAGE, device="cuda", cache=cache)
        for pool in model.pools.tensors:
            _fill(pool)
        for name, case in STEPS.items():
            apart, seconds = stepped(model, case)
            taken.setdefault(name, {})[kept] = seconds
            report.add("fp8-cache", f"steps, {name}, cache in {kept}", ms=1e3 * seconds, joins=model.joins, apart=apart,
                       met=model.joins and apart < STEP_APART)  # fmt: skip
        del model
        torch.cuda.empty_cache()
    for name, both in taken.items():
        times = both["dtype"] / both["fp8"]
        report.add("fp8-cache", f"steps, {name}", times=times, must=ANYWHERE, met=times >= ANYWHERE)


def _fill(pool: torch.Tensor) -> None:
    """With ordinary numbers, a layer at a time."""
    if pool.dtype != torch.uint8:
        pool.normal_()
        return
    some = LATENT.coded(torch.randn(1000, PAGE, WIDTH, device=DEVICE))
    for layer in pool:
        for at in range(0, layer.shape[0], 1000):
            layer[at : at + 1000] = some[: layer.shape[0] - at]
