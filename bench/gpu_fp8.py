"""Sections of bench/gpu.py: weights in fp8 blocks beside bfloat16, in products, experts and whole steps of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_engine import CONTEXT, LATENT, limit_seconds
from gpu_graphs import PAGE, Branches
from gpu_layers import EXPERTS, HEADS, HIDDEN, INNER, NOPE, ROPE, TOP, VALUE, WIDTH, bf16, weights
from gpu_timing import DEVICE, Report, limit_us, relative, rotated

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_kernels.fp8_blocks import Fp8Blocks, in_blocks
from agentspeed_kernels.triton import fp8_kernels, kernels
from agentspeed_kernels.workspace import Workspace

LAYERS, COPIES = 4, 16
"""Sets of experts and of the smaller weights: more than the L2 holds."""
SHARED = 2 * INNER
WIDE = HEADS * (NOPE + ROPE) + WIDTH
SETTLED, STEPS = 6, 40
"""Steps before the clock runs, of which some are captured, and while it does."""
MOST_APART = 0.1


def section_fp8(report: Report) -> None:
    """Of DeepSeek-V2-Lite's shapes. `bf16_us`: the same with weights in bfloat16; the limit counts a byte a weight."""
    qkv, gain, o = weights(COPIES, WIDE, HIDDEN), bf16(HIDDEN), weights(COPIES, HIDDEN, HEADS * VALUE)
    qkv8, o8 = in_blocks(qkv), in_blocks(o)
    for rows in (1, 2, 4, 8, 32, 128, 512):
        x, residual, total = bf16(rows, HIDDEN), bf16(rows, HIDDEN), bf16(rows, HIDDEN)
        first, mixed = bf16(rows, WIDE), bf16(rows, HEADS * VALUE)
        product = kernels.linear if rows <= kernels.MOST_LINEAR_ROWS else _vendor

        def joined(i: int, call: Any, weight: Any, x=x, s=residual, y=first, t=total) -> None:
            call(x, s, gain, 1e-6, weight(i), None, y, t)

        _beside(
            report, f"add_norm_linear {WIDE} T{rows}", WIDE * HIDDEN, 2 * rows * WIDE * HIDDEN,
            lambda i: joined(i, fp8_kernels.add_norm_linear, qkv8.part),
            lambda i: joined(i, kernels.add_norm_linear, qkv.__getitem__),
        )  # fmt: skip
        _beside(
            report, f"linear {HIDDEN} T{rows}", HIDDEN * HIDDEN, 2 * rows * HIDDEN * HIDDEN,
            lambda i, x=x, y=mixed: fp8_kernels.linear(x, o8.part(i), None, y),
            lambda i, x=x, y=mixed, product=product: product(x, o[i], None, y),
        )  # fmt: skip
    _experts(report)


def _experts(report: Report) -> None:
    gate_up, down = weights(LAYERS, EXPERTS, 2 * INNER, HIDDEN), weights(LAYERS, EXPERTS, HIDDEN, INNER)
    shared_gate_up, shared_down = weights(LAYERS, 1, 2 * SHARED, HIDDEN), weights(LAYERS, 1, HIDDEN, SHARED)
    wide = (gate_up, down, shared_gate_up, shared_down)
    held = [in_blocks(one, parts) for one, parts in zip(wide, (2, 1, 2, 1), strict=True)]
    workspace = Workspace(DEVICE)
    for rows in (1, 2, 4, 8, 32, 128, 512, 2048):
        x, out, other = bf16(rows, HIDDEN), bf16(rows, HIDDEN), bf16(rows, HIDDEN)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(rows)]).to(DEVICE)
        shares = torch.rand(rows, TOP, device=DEVICE)

        def run(i: int, call: Any, held: Any, x=x, ids=ids, shares=shares, out=out) -> None:
            i %= LAYERS
            first, second, third, fourth = (one[i] if isinstance(one, torch.Tensor) else one.part(i) for one in held)
            call(x, first, second, ids, shares, third, fourth, workspace, out)

        hit = ids.unique().numel() * 3 * INNER * HIDDEN + 3 * SHARED * HIDDEN
        run(0, kernels.experts_and_shared, [_whole(one, held[at]) for at, one in enumerate(wide)], out=other)
        run(0, fp8_kernels.experts_and_shared, held)
        _beside(
            report, f"experts_and_shared T{rows}", hit, 6 * rows * (TOP * INNER + SHARED) * HIDDEN,
            lambda i, run=run: run(i, fp8_kernels.experts_and_shared, held),
            lambda i, run=run: run(i, kernels.experts_and_shared, wide),
            apart=relative(out, other),
        )  # fmt: skip


def _whole(weight: torch.Tensor, held: Fp8Blocks) -> torch.Tensor:
    """Of the first layer what the bytes stand for, in bfloat16: what the other kernel multiplies with."""
    return held.part(0).whole(torch.bfloat16).view(weight[0].shape)[None]


def _vendor(x: torch.Tensor, weight: torch.Tensor, bias: None, out: torch.Tensor) -> None:
    torch.mm(x, weight.T, out=out)


def _beside(
    report: Report, name: str, moved: float, flops: float, call: Callable[[int], Any], other: Callable[[int], Any],
    **more: Any,
) -> None:  # fmt: skip
    limit = limit_us(moved, flops)
    taken, wide = (rotated(one, COPIES, 5.0, budget_us=200) for one in (call, other))
    report.add("fp8", name, us=taken, bf16_us=wide, times=wide / taken, limit_us=limit, share=limit / taken, **more)


def section_steps(report: Report) -> None:
    """Decode steps as a model makes them, captured and joined, without an engine around it. `apart`: their logits
    beside those of the modules, where a near tie of the router may fall otherwise."""
    cases = {rows: Branches(rows, CONTEXT, forked=False) for rows in (1, 32)}
    pages = max(case.pages for case in cases.values())
    for kept in ("fp8", "dtype"):
        model = load(
            LATENT, dtype="bfloat16", pages=pages, page_tokens=PAGE, device="cuda",
            weights="fp8" if kept == "fp8" else None,
        )  # fmt: skip
        for pool in model.pools.tensors:
            pool.normal_()
        for rows, case in cases.items():
            apart, seconds = stepped(model, case)
            share = limit_seconds(rows, kept=kept) / seconds
            report.add("steps-fp8", f"weights in {kept}, batch {rows} at {CONTEXT}", ms=1e3 * seconds, share=share,
                       joins=model.joins, apart=apart, met=model.joins and apart < MOST_APART)  # fmt: skip
        del model
        torch.cuda.empty_cache()


def stepped(model: LoadedModel, case: Branches) -> tuple[float, float]:
    """(How far a captured step is from the same one by modules, seconds of a step.)"""
    for at in range(SETTLED - 1):
        _ = model.forward(case.step(at))
    model.repeats = False
    wanted = model.forward(case.step(SETTLED - 1)).clone()
    model.repeats = True
    apart = relative(model.forward(case.step(SETTLED - 1)), wanted)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for at in range(SETTLED, SETTLED + STEPS):
        _ = model.forward(case.step(at))
    torch.cuda.synchronize()
    return apart, (time.perf_counter() - started) / STEPS
