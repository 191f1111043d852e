"""Batch-invariant forms: a row's sums are made by the same instructions in the same order in a call of any rows.

Blocks of 16 and of 32 rows multiply by the same matrix instruction (`mma.sync` on NVIDIA's chips), which adds along the
inputs in one order whatever the other sides of a block are; blocks of 64 rows would take another instruction, and the
vendor's library chooses by shape. So few and many rows have blocks of their own, and equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.triton import kernels, launching
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.workspace import Workspace

FEW_ROWS = 16
"""Up to this many rows blocks have as many, above it twice as many."""
MOST_EARLY_ROWS = 64
"""Up to this many rows, those of decode steps, the launch does not wait for the one before it."""
DEPTH = 128
"""Inputs that a block takes at once. One for all forms, so that the interpreter, whose products begin anew with each,
has one order of sums as well."""
WIDE_COLUMNS, NARROW_COLUMNS = 128, 16
"""Outputs of a block: reuse where there are many rows, programs enough to fill the device where there are few."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    products = device_code("products")

    assert x.stride(1) == 1 and weight.is_contiguous() and out.stride(1) == 1
    rows, width = x.shape
    count = weight.shape[0]
    early = rows <= MOST_EARLY_ROWS and launching.early(x)
    block, columns, depth, warps, stages = linear_shape(rows, x.element_size())
    products.linear_blocks[(-(-count // columns), -(-rows // block))](
        x, weight, bias if bias is not None else x, out, x.stride(0), out.stride(0), rows, count, K=width, BT=block,
        BN=columns, BK=depth, BIAS=bias is not None, EARLY=early, num_warps=warps, num_stages=stages,
        **launching.options(early),
    )  # fmt: skip


def linear_shape(rows: int, element_bytes: int = 2) -> tuple[int, int, int, int, int]:
    """(rows, columns, depth, warps, stages) of a program."""
    block = FEW_ROWS if rows <= FEW_ROWS else 2 * FEW_ROWS
    if element_bytes > 2:  # shared memory has no room for larger ones
        return block, 32, DEPTH // 2, 4, 2
    if rows <= MOST_EARLY_ROWS:
        return block, NARROW_COLUMNS if rows <= FEW_ROWS else 2 * NARROW_COLUMNS, DEPTH, 4, 6
    return block, WIDE_COLUMNS, DEPTH, 4, 3


def heads_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    kernels.heads_many(x, weight, out, FEW_ROWS if x.shape[0] <= FEW_ROWS else 2 * FEW_ROWS)


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """Scores of every token by programs of its own."""
    return kernels.route_by_token(x, weight, bias, rule)


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    """The grouped form for any number of tokens, in blocks of up to 32 rows; one expert, where there is no other, as
    two products."""
    assert x.is_contiguous() and gate_up.is_contiguous() and down.is_contiguous() and out.is_contiguous()
    assert ids.is_contiguous() and weights.is_contiguous()
    count, width, inner = down.shape
    rows, top = ids.shape
    if count == 1 and top == 1:
        both = workspace.take("dense_gate_up", (rows, 2 * inner), x.dtype)
        linear(x, gate_up[0], None, both)
        fed = workspace.take("dense_out", (rows, width), x.dtype)
        linear(kernels.activated(both, workspace), down[0], None, fed)
        torch.mul(fed, weights.to(x.dtype), out=out)
        return
    kernels.experts_grouped(x, gate_up, down, ids, weights, None, workspace, out, most_rows=2 * FEW_ROWS)
