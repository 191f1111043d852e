"""Ops that join or move what other ops compute, on torch: right in any format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agentspeed_kernels.cpu import torch_kernels
from agentspeed_kernels.cpu.torch_kernels import linear, rms_norm
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.signature import Dtype, KernelSpec
from agentspeed_kernels.workspace import Workspace


def add_norm_linear(
    x: Tensor,
    residual: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
) -> None:
    torch.add(x, residual, out=total)
    normed = torch.empty_like(total)
    rms_norm(total, gain, eps, normed)
    linear(normed, weight, bias, out)


def mla_queries(
    q: Tensor,
    raw: Tensor,
    gain: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_up: Tensor,
    pool: Tensor,
    out: Tensor,
) -> None:
    rank, nope = key_up.shape[1:]
    torch_kernels.latent_append(raw, gain, eps, cos, sin, slots, pool)
    out[:, :, rank:] = q[:, :, nope:]
    torch_kernels.rope(out[:, :, rank:], cos, sin)
    torch_kernels.heads_linear(q[:, :, :nope], key_up, out[:, :, :rank])


def add_norm_route(
    x: Tensor,
    residual: Tensor,
    gain: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    rule: RouteRule,
    slots: Tensor,
    normed: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scores are of the norm before it is rounded."""
    torch.add(x, residual, out=total)
    wide = total.to(weight.dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps)) * gain
    normed.copy_(wide)
    ids, weights = torch_kernels.route(wide, weight, bias, rule)
    nobody = (slots < 0).unsqueeze(1)
    return ids.masked_fill(nobody, weight.shape[0]), weights.masked_fill(nobody, 0.0)


def experts_and_shared(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    workspace: Workspace,
    out: Tensor,
) -> None:
    torch_kernels.experts(x, gate_up, down, ids, weights, workspace, out)
    out.add_(torch_kernels.swiglu(x, shared_gate_up[0], shared_down[0]))


def copy_rows(pool: Tensor, moves: Tensor) -> None:
    for source, target, rows in moves.tolist():
        pool[:, target, :rows] = pool[:, source, :rows]


def gather_pages(pool: Tensor, pages: Tensor, packed: Tensor) -> None:
    torch.index_select(pool, 1, pages, out=packed)


def scatter_pages(pool: Tensor, pages: Tensor, packed: Tensor) -> None:
    pool.index_copy_(1, pages.long(), packed)


_FORMATS: frozenset[Dtype] = frozenset({"float32", "float64", "bfloat16"})
_CALLS: dict[str, Callable[..., Any]] = {
    "add_norm_linear": add_norm_linear,
    "mla_queries": mla_queries,
    "add_norm_route": add_norm_route,
    "experts_and_shared": experts_and_shared,
    "copy_rows": copy_rows,
    "gather_pages": gather_pages,
    "scatter_pages": scatter_pages,
}

SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(op=op, name="torch", dtypes=_FORMATS, device="cpu", call=call, priority=0) for op, call in _CALLS.items()
)
