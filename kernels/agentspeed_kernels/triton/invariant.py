"""Batch-invariant forms: a row's sums are made in the same order with the same rounding in a call of any rows.

Blocks of 16 and of 32 rows multiply by the same matrix instruction (`mma.sync` on NVIDIA's chips), which adds along the
inputs in one order whatever the other sides of a block are. Larger blocks, several times as fast for many rows, take
another instruction; they are used on a device whose sums of both were found to have the same bits (`alike`). The
vendor's library chooses by shape.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.triton import kernels, launching
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.workspace import Workspace

log = logging.getLogger("agentspeed.kernels")

LinearShape = tuple[int, int, int, int, int]
"""(rows, columns, depth, warps, stages) of a program."""
FEW_ROWS = 16
"""Up to this many rows blocks have as many, above it twice as many."""
MOST_EARLY_ROWS = 64
"""Up to this many rows, those of decode steps, the launch does not wait for the one before it."""
DEPTH = 128
"""Inputs that a block takes at once."""
WIDE_COLUMNS, NARROW_COLUMNS = 128, 16
"""Outputs of a block: reuse where there are many rows, programs enough to fill the device where there are few."""
WIDE: LinearShape = (128, 128, 64, 8, 3)
"""From as many rows on, where the device adds alike in it."""
CHECKED_ROWS, CHECKED_OUTPUTS, CHECKED_INPUTS = 128, 512, 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    rows = x.shape[0]
    wide = rows >= WIDE[0] and x.element_size() == 2 and wide_blocks(x.device)
    linear_in(WIDE if wide else linear_shape(rows, x.element_size()), x, weight, bias, out)


def linear_in(shape: LinearShape, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`linear` in blocks of one shape."""
    products = device_code("products")

    assert x.stride(1) == 1 and weight.is_contiguous() and out.stride(1) == 1
    rows, width = x.shape
    count = weight.shape[0]
    early = rows <= MOST_EARLY_ROWS and launching.early(x)
    block, columns, depth, warps, stages = shape
    products.linear_blocks[(-(-count // columns), -(-rows // block))](
        x, weight, bias if bias is not None else x, out, x.stride(0), out.stride(0), rows, count, K=width, BT=block,
        BN=columns, BK=depth, BIAS=bias is not None, EARLY=early, num_warps=warps, num_stages=stages,
        **launching.options(early),
    )  # fmt: skip


def linear_shape(rows: int, element_bytes: int = 2) -> LinearShape:
    """Of blocks of 16 or 32 rows."""
    block = FEW_ROWS if rows <= FEW_ROWS else 2 * FEW_ROWS
    if element_bytes > 2:  # shared memory has no room for larger ones
        return block, 32, DEPTH // 2, 4, 2
    if rows <= MOST_EARLY_ROWS:
        return block, NARROW_COLUMNS if rows <= FEW_ROWS else 2 * NARROW_COLUMNS, DEPTH, 4, 6
    return block, WIDE_COLUMNS, DEPTH, 4, 3


def wide_blocks(device: torch.device) -> bool:
    """Whether blocks of more than 32 rows add with the bits of smaller ones there."""
    return alike(device) == "all"


def alike(device: torch.device) -> Literal["all", "narrow", "none"]:
    """Which blocks add with the bits of those of 16 rows: those of 128 as well, for which compilers take other
    instructions, those of 32 alone, or no others. Tried once, on bfloat16 by chance with float32 sums; not to be asked
    first while a graph is captured."""
    if device.type != "cuda":
        return "narrow"
    return _alike(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _alike(index: int) -> Literal["all", "narrow", "none"]:
    device = torch.device("cuda", index)
    noise = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(rows, CHECKED_INPUTS, generator=noise, device=device).to(torch.bfloat16)
        for rows in (CHECKED_ROWS, CHECKED_OUTPUTS)
    )
    outs = [torch.empty(CHECKED_ROWS, CHECKED_OUTPUTS, device=device) for _ in range(3)]
    for shape, out in zip((linear_shape(1), linear_shape(CHECKED_ROWS), WIDE), outs, strict=True):
        linear_in(shape, x, weight, None, out)
    few, many, wide = outs
    found: Literal["all", "narrow", "none"] = "none"
    if torch.equal(few, many):
        found = "all" if torch.equal(few, wide) else "narrow"
    log.info("blocks that add like those of %d rows on %s: %s", FEW_ROWS, device, found)
    return found


def heads_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    rows = x.shape[0]
    kernels.heads_many(x, weight, out, FEW_ROWS if rows <= FEW_ROWS else _most_rows(rows, x))


def _most_rows(rows: int, x: Tensor) -> int:
    """Of a block: 64 rows are another instruction."""
    return 64 if rows > MOST_EARLY_ROWS and x.element_size() == 2 and wide_blocks(x.device) else 2 * FEW_ROWS


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouteRule) -> tuple[Tensor, Tensor]:
    """Scores of every token by programs of its own."""
    return kernels.route_by_token(x, weight, bias, rule)


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    """The grouped form for any number of tokens; one expert, where there is no other, as two products."""
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
    kernels.experts_grouped(x, gate_up, down, ids, weights, None, workspace, out, most_rows=_most_rows(rows, x))
