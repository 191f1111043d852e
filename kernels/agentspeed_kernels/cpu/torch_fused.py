"""Ops that join or move what other ops compute, on torch: right in any format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agentspeed_kernels.cpu.torch_kernels import linear, rms_norm
from agentspeed_kernels.signature import Dtype, KernelSpec


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
    "copy_rows": copy_rows,
    "gather_pages": gather_pages,
    "scatter_pages": scatter_pages,
}

SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(op=op, name="torch", dtypes=_FORMATS, device="cpu", call=call, priority=0) for op, call in _CALLS.items()
)
