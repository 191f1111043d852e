"""Section of bench/gpu.py: the joined kernels of a decode step, each and as a layer, launched early and late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_layers import EXPERTS, HEADS, HIDDEN, INNER, NOPE, RANK, ROPE, RULE, TOP, VALUE, WIDTH, bf16, weights
from gpu_timing import DEVICE, Report, limit_us, rotated

from agentspeed_kernels.triton import kernels, launching
from agentspeed_kernels.workspace import Workspace

LAYERS, COPIES = 4, 16
"""Sets of experts and of the smaller weights: more than the L2 holds."""
SHARED = 2 * INNER


def section_joined(report: Report) -> None:
    """Of DeepSeek-V2-Lite's shapes; `layer` is all of a layer but the attention itself and its merge."""
    wide = HEADS * (NOPE + ROPE) + WIDTH
    gate_up, down = weights(LAYERS, EXPERTS, 2 * INNER, HIDDEN), weights(LAYERS, EXPERTS, HIDDEN, INNER)
    shared_gate_up, shared_down = weights(LAYERS, 1, 2 * SHARED, HIDDEN), weights(LAYERS, 1, HIDDEN, SHARED)
    qkv, gain, o = weights(COPIES, wide, HIDDEN), bf16(HIDDEN), weights(COPIES, HIDDEN, HEADS * VALUE)
    key_up, value_up = weights(COPIES, HEADS, RANK, NOPE), weights(COPIES, HEADS, VALUE, RANK)
    router, norm, pool = torch.randn(COPIES, EXPERTS, HIDDEN, device=DEVICE), bf16(RANK), bf16(4096, WIDTH)
    workspace = Workspace(DEVICE)
    for rows in (1, 2, 4, 32):
        x, residual, total, normed, out = (bf16(rows, HIDDEN) for _ in range(5))
        first, mixed, absorbed = bf16(rows, wide), bf16(rows, HEADS * VALUE), bf16(rows, HEADS, WIDTH)
        latent, slots = bf16(rows, HEADS, RANK), torch.arange(rows, device=DEVICE)
        cos, sin = bf16(rows, ROPE // 2), bf16(rows, ROPE // 2)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(rows)]).to(DEVICE)
        shares = torch.rand(rows, TOP, device=DEVICE)
        product = kernels.linear if rows <= kernels.MOST_LINEAR_ROWS else _vendor

        def multiply(i: int, x=x, s=residual, y=first, t=total) -> None:
            kernels.add_norm_linear(x, s, gain, 1e-6, qkv[i], None, y, t)

        def queries(i: int, y=first, rows=rows, cos=cos, sin=sin, slots=slots, to=absorbed) -> None:
            q, raw = y[:, :-WIDTH].view(rows, HEADS, -1), y[:, -WIDTH:]
            kernels.mla_queries(q, raw, norm, 1e-6, cos, sin, slots, key_up[i], pool, to)

        def values(i: int, latent=latent, rows=rows, mixed=mixed) -> None:
            kernels.heads_linear(latent, value_up[i], mixed.view(rows, HEADS, VALUE))

        def route(i: int, x=out, s=total, slots=slots, n=normed, t=residual) -> None:
            kernels.add_norm_route(x, s, gain, 1e-6, router[i], None, RULE, slots, n, t)

        def experts(i: int, n=normed, ids=ids, shares=shares, to=x) -> None:
            i %= LAYERS
            kernels.experts_and_shared(
                n, gate_up[i], down[i], ids, shares, shared_gate_up[i], shared_down[i], workspace, to
            )

        def layer(
            i: int, mixed=mixed, out=out, product=product, multiply=multiply, queries=queries, values=values,
            route=route, experts=experts,
        ) -> None:  # fmt: skip
            multiply(i)
            queries(i)
            values(i)
            product(mixed, o[i], None, out)
            route(i)
            experts(i)

        hit = 2 * (ids.unique().numel() * 3 * INNER * HIDDEN + 3 * SHARED * HIDDEN)
        small = 2 * (qkv[0].numel() + o[0].numel() + key_up[0].numel() + value_up[0].numel()) + 4 * router[0].numel()
        cases: tuple[tuple[str, Callable[[int], Any], int], ...] = (
            ("add_norm_linear", multiply, 2 * qkv[0].numel()),
            ("mla_queries", queries, 2 * key_up[0].numel()),
            ("heads_linear", values, 2 * value_up[0].numel()),
            ("add_norm_route", route, 4 * router[0].numel()),
            ("experts_and_shared", experts, hit),
            ("layer", layer, hit + small),
        )
        for name, call, moved in cases:
            late = _taken(call, late=True)
            taken = _taken(call, late=False)
            limit = limit_us(moved, 0)
            report.add("joined", f"{name} T{rows}", us=taken, late_us=late, limit_us=limit, share=limit / taken)


def _vendor(x: torch.Tensor, weight: torch.Tensor, bias: None, out: torch.Tensor) -> None:
    torch.mm(x, weight.T, out=out)


def _taken(call: Callable[[int], Any], *, late: bool) -> float:
    with _launches(late):
        return rotated(call, COPIES, 5.0, budget_us=200)


@contextmanager
def _launches(late: bool) -> Iterator[None]:
    """Late: each kernel waits for the whole of the one before it."""
    before = launching.early
    if late:
        launching.early = lambda given: False
    try:
        yield
    finally:
        launching.early = before
