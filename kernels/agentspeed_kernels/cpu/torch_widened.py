"""Products of float32 rows with weights in bfloat16 on torch, for any number of rows: weights are widened first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agentspeed_kernels.cpu import torch_attention, torch_kernels
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.workspace import Workspace

WEIGHTS = frozenset({"bfloat16"})
PRIORITY = -1
"""Below the same products with weights in float32, which widen nothing."""
AT_ONCE = 1 << 20
"""Numbers of a weight that are widened together: 4 MB, which the product that follows finds in a cache."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Widens the weight in each call, some outputs at a time."""
    outputs, inputs = weight.shape
    many = max(AT_ONCE // inputs, 1)
    for low in range(0, outputs, many):
        part = slice(low, min(low + many, outputs))
        torch_kernels.linear(x, weight[part].to(x.dtype), None if bias is None else bias[part], out[:, part])


def heads_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch_kernels.heads_linear(x, weight.to(x.dtype), out)


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    """Of each expert that is chosen, one matrix after the other."""

    def run(rows: Tensor, expert: int) -> Tensor:
        gate, up = _product(rows, gate_up[expert]).chunk(2, dim=-1)
        return _product(torch.nn.functional.silu(gate).mul_(up), down[expert])

    torch_kernels.each_expert(x, down.shape[0], run, ids, weights, out)


def extending(attend: Callable[..., None]) -> Callable[..., None]:
    """`mla_extend` with both up-projections in bfloat16, by one that takes them in float32."""

    def mla_extend(q: Tensor, pool: Tensor, *given: Any) -> None:
        *ups, tiles, scale, workspace, out = given
        names = ("extend_key_up", "extend_value_up")
        wide = (workspace.take(name, tuple(up.shape), q.dtype).copy_(up) for name, up in zip(names, ups, strict=True))
        attend(q, pool, *wide, tiles, scale, workspace, out)

    return mla_extend


def _product(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    linear(x, weight, None, out)
    return out


_CALLS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "heads_linear": heads_linear,
    "experts": experts,
    "mla_extend": extending(torch_attention.mla_extend),
}
SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(
        op=op,
        name="torch-bf16",
        dtypes=frozenset({"float32"}),
        device="cpu",
        call=run,
        priority=PRIORITY,
        weights=WEIGHTS,
    )
    for op, run in _CALLS.items()
)
