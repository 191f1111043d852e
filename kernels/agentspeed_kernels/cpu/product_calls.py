"""Calls of the products in C, whatever their weights are in: what of tensors they are given, and the memory between."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.recording import call
from agentspeed_kernels.packing import Packed
from agentspeed_kernels.workspace import Workspace


def rows_packed(*tensors: Tensor) -> bool:
    return all(tensor.stride(-1) == 1 for tensor in tensors)


def call_linear(
    functions: dict[str, native.Function],
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    out: Tensor,
    op: str = "linear",
) -> None:
    """`weight`: in the order and format that the form's function `op` reads, [outputs, inputs]."""
    assert rows_packed(x, out)
    call(
        functions,
        op,
        (x, weight, bias, out),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        x.shape[0],
        *weight.shape,
        torch.get_num_threads(),
    )


def call_heads_linear(
    functions: dict[str, native.Function], x: Tensor, weight: Tensor | Packed, out: Tensor, op: str = "heads_linear"
) -> None:
    """`weight`: in the order and format that the form's function `op` reads, [heads, outputs, inputs]."""
    assert rows_packed(x, out)
    call(
        functions,
        op,
        (x, weight, out),
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        x.shape[0],
        *weight.shape,
        torch.get_num_threads(),
    )


def call_experts(
    functions: dict[str, native.Function],
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    workspace: Workspace,
    out: Tensor,
    op: str = "experts",
) -> None:
    """`op`: the function, which says in what the weights are."""
    assert x.is_contiguous() and gate_up.is_contiguous() and down.is_contiguous() and out.is_contiguous()
    assert ids.is_contiguous() and weights.is_contiguous()
    count, hidden, inner = down.shape
    pairs = ids.numel()
    act = workspace.take("expert_act", (pairs, inner), torch.float32)
    order = workspace.take("expert_order", (pairs + count + 1,), torch.int32)
    sums = out if out.dtype == torch.float32 else workspace.take("expert_sums", tuple(out.shape), torch.float32)
    call(
        functions,
        op,
        (x, gate_up, down, ids, weights, act, order, sums, out),
        x.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        act.data_ptr(),
        order.data_ptr(),
        order.data_ptr() + 4 * pairs,
        sums.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        ids.shape[1],
        count,
        inner,
        hidden,
        torch.get_num_threads(),
    )
