"""Products with weights in 8 bits on torch: right for any format and any number of rows, slow for a few."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from agentspeed_kernels.cpu import torch_kernels
from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.quantised import GROUPS, Quantised
from agentspeed_kernels.signature import ByteFormat, Dtype, KernelSpec, Layout
from agentspeed_kernels.workspace import Workspace

AT_ONCE = 1 << 21
"""Elements of a weight that are taken back from bytes together: some 30 MB while it is done."""
InBytes: TypeAlias = Quantised | Fp8Blocks


def linear(x: Tensor, weight: InBytes, bias: Tensor | None, out: Tensor) -> None:
    """Takes the weight back to the format of x in each call, some outputs at a time."""
    outputs, inputs = weight.shape
    many = max(AT_ONCE // inputs // weight.together, 1) * weight.together
    for low in range(0, outputs, many):
        high = min(low + many, outputs)
        some = weight.outputs(low, high).whole(x.dtype)
        torch_kernels.linear(x, some, None if bias is None else bias[low:high], out[:, low:high])


def experts(
    x: Tensor, gate_up: InBytes, down: InBytes, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    """Of each expert that is chosen, one matrix after the other."""

    def run(rows: Tensor, expert: int) -> Tensor:
        gate, up = (_product(rows, gate_up.part(expert, side)) for side in (0, 1))
        return _product(torch.nn.functional.silu(gate).mul_(up), down.part(expert))

    torch_kernels.each_expert(x, down.shape[0], run, ids, weights, out)


def _product(x: Tensor, weight: InBytes) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    linear(x, weight, None, out)
    return out


def _specs(name: str, layout: Layout, weights: frozenset[ByteFormat]) -> tuple[KernelSpec, ...]:
    formats: frozenset[Dtype] = frozenset({"float32", "float64", "bfloat16"})
    return tuple(
        KernelSpec(op=op, name=name, dtypes=formats, device="cpu", call=run, priority=0, weights=weights, layout=layout)
        for op, run in (("linear", linear), ("experts", experts))
    )


SPECS: tuple[KernelSpec, ...] = (
    *_specs("torch-int8", "bytes", frozenset(GROUPS)),
    *_specs("torch-fp8", "blocks", frozenset({"fp8"})),
)
