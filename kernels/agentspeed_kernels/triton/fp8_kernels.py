"""The Triton kernels for weights in fp8 blocks, under the signatures of the public ops."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.fp8_blocks import Fp8Blocks
from agentspeed_kernels.triton import launching
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.triton.kernels import activated, add_norm, arranged, combine
from agentspeed_kernels.triton.launching import block_of
from agentspeed_kernels.workspace import Workspace

MOST_FEW_ROWS = 4
"""Up to this many rows each reads the weights by itself."""
MOST_TILED_ROWS = 256
"""Above this, weights are widened first and the vendor's products are faster."""
MOST_FEW_TOKENS = 4
"""Up to this many tokens each reads the experts it visits by itself."""
WIDENED = 8192
"""Outputs that are widened at once: what that takes is scratch memory."""
LINEAR_ROWS, LINEAR_WARPS = 8, 4
"""Of a program for single rows: rows of the weights, warps."""
GATE_UP_ROWS, GATE_UP_WARPS = 8, 4
DOWN_ROWS, DOWN_WARPS, DOWN_CUTS = 8, 4, 8
"""Likewise; cuts of 512 columns of the down matrices that are read at once."""


def linear(x: Tensor, weight: Fp8Blocks, bias: Tensor | None, out: Tensor) -> None:
    """Each row by itself, in tiles, or on weights that were widened, by the number of rows."""
    assert x.stride(1) == 1 and out.stride(1) == 1
    if x.shape[0] <= MOST_FEW_ROWS:
        _few(x, weight, bias, out, None)
    elif x.shape[0] <= MOST_TILED_ROWS:
        _tiled(x, weight, bias, out)
    else:
        _widened(x, weight, bias, out)


def add_norm_linear(
    x: Tensor,
    residual: Tensor,
    gain: Tensor,
    eps: float,
    weight: Fp8Blocks,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
) -> None:
    """out = norm(x + residual) * gain @ weight^T; `total`, not the residual itself, gets the sum."""
    assert x.is_contiguous() and residual.is_contiguous() and total.is_contiguous()
    assert total.data_ptr() != residual.data_ptr()
    if x.shape[0] > MOST_FEW_ROWS:
        normed = torch.empty_like(x)
        add_norm(x, residual, gain, eps, normed, total)
        linear(normed, weight, bias, out)
    else:
        _few(x, weight, bias, out, (residual, gain, eps, total))


def _few(
    x: Tensor, weight: Fp8Blocks, bias: Tensor | None, out: Tensor, norm: tuple[Tensor, Tensor, float, Tensor] | None
) -> None:
    """`norm`: the residual, its gain, eps, and what gets the sum."""
    products, early = device_code("products_fp8"), launching.early(x)
    residual, gain, eps, total = norm or (x, x, 0.0, x)
    count, width = weight.shape
    products.linear[(-(-count // LINEAR_ROWS), x.shape[0])](
        x, residual, gain, weight.data, weight.scales, bias if bias is not None else x, out, total, x.stride(0),
        out.stride(0), eps, count, K=width, BN=LINEAR_ROWS, CUTS=_cuts(width), NORM=norm is not None,
        BIAS=bias is not None, EARLY=early, num_warps=LINEAR_WARPS, **launching.options(early),
    )  # fmt: skip


def _cuts(width: int) -> int:
    """Of 512 columns each that are read at once."""
    return min(4, block_of(-(-width // 512)))


def _tiled(x: Tensor, weight: Fp8Blocks, bias: Tensor | None, out: Tensor) -> None:
    products, early = device_code("products_fp8"), launching.early(x)
    rows, (count, width) = x.shape[0], weight.shape
    block_rows, columns, warps, stages = tiled_shape(rows, count, x.element_size())
    products.linear_many[(-(-count // columns), -(-rows // block_rows))](
        x, weight.data, weight.scales, bias if bias is not None else x, out, x.stride(0), out.stride(0), rows, count,
        K=width, BN=columns, BM=block_rows, BIAS=bias is not None, EARLY=early, num_warps=warps,
        num_stages=stages, **launching.options(early),
    )  # fmt: skip


def tiled_shape(rows: int, count: int, element_bytes: int = 2) -> tuple[int, int, int, int]:
    """(Rows, outputs, warps, stages) of a program of the form in tiles."""
    block_rows = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if element_bytes > 2:  # shared memory has no room for larger ones
        return min(block_rows, 32), 32, 4, 2
    # Narrow blocks where there are few outputs: programs enough to fill the device count for more than reuse.
    return block_rows, 32 if count <= 8192 else 64, 4, {16: 8, 32: 6, 64: 3}[block_rows]


def _widened(x: Tensor, weight: Fp8Blocks, bias: Tensor | None, out: Tensor) -> None:
    products = device_code("products_fp8")
    count, width = weight.shape
    whole = torch.empty(min(count, WIDENED), width, dtype=x.dtype, device=x.device)
    for first in range(0, count, WIDENED):
        last = min(first + WIDENED, count)
        part, wide = weight.outputs(first, last), whole[: last - first]
        products.widen[(-(-(last - first) // 32), part.scales.shape[1])](
            part.data, part.scales, wide, last - first, K=width, BN=32, num_warps=4
        )
        if bias is None:
            torch.mm(x, wide.T, out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], x, wide.T, out=out[:, first:last])


def experts(
    x: Tensor, gate_up: Fp8Blocks, down: Fp8Blocks, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
) -> None:
    """The few-token form, the grouped form, or, for one expert and many tokens, products of widened weights."""
    assert x.is_contiguous() and out.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()
    if x.shape[0] <= MOST_FEW_TOKENS:
        _experts_few(x, gate_up, down, ids, weights, None, workspace, out)
    elif down.shape[0] == 1 and ids.shape[1] == 1 and x.shape[0] > MOST_TILED_ROWS:
        torch.mul(_swiglu(x, gate_up, down, workspace), weights.to(x.dtype), out=out)
    else:
        _experts_grouped(x, gate_up, down, ids, weights, None, workspace, out)


def experts_and_shared(
    x: Tensor,
    gate_up: Fp8Blocks,
    down: Fp8Blocks,
    ids: Tensor,
    weights: Tensor,
    shared_gate_up: Fp8Blocks,
    shared_down: Fp8Blocks,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """`experts`, and for every row the shared expert."""
    assert x.is_contiguous() and out.is_contiguous() and ids.is_contiguous() and weights.is_contiguous()
    if x.shape[0] <= MOST_FEW_TOKENS:
        _experts_few(x, gate_up, down, ids, weights, (shared_gate_up, shared_down), workspace, out)
    else:
        _experts_grouped(x, gate_up, down, ids, weights, (shared_gate_up, shared_down), workspace, out)


def _swiglu(x: Tensor, gate_up: Fp8Blocks, down: Fp8Blocks, workspace: Workspace) -> Tensor:
    """Of one expert that every row visits."""
    rows, inner = x.shape[0], down.shape[2]
    both = workspace.take("dense_gate_up", (rows, 2 * inner), x.dtype)
    linear(x, gate_up.part(0, 0), None, both[:, :inner])
    linear(x, gate_up.part(0, 1), None, both[:, inner:])
    out = workspace.take("dense_out", (rows, x.shape[1]), x.dtype)
    linear(activated(both, workspace), down.part(0), None, out)
    return out


def _experts_few(
    x: Tensor,
    gate_up: Fp8Blocks,
    down: Fp8Blocks,
    ids: Tensor,
    weights: Tensor,
    shared: tuple[Fp8Blocks, Fp8Blocks] | None,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """`shared`: the weights of the expert that every row visits."""
    device, early = device_code("experts_fp8"), launching.early(x)
    count, width, inner = down.shape
    tokens, top = ids.shape
    shared_gate_up, shared_down = shared or (gate_up, down)
    beside = shared_down.shape[2] if shared is not None else 0
    act = workspace.take("expert_inner", (tokens, top * inner + beside), x.dtype)
    rows = GATE_UP_ROWS
    device.gate_up_few[(top * -(-inner // rows) + -(-beside // rows), tokens)](
        x, gate_up.data, gate_up.scales, shared_gate_up.data, shared_gate_up.scales, ids, act, E=count, TOP=top,
        D=width, I=inner, S=beside, BI=rows, CUTS=_cuts(width), EARLY=early, num_warps=GATE_UP_WARPS,
        **launching.options(early),
    )  # fmt: skip
    device.down_few[(-(-width // DOWN_ROWS), tokens)](
        act, down.data, down.scales, shared_down.data, shared_down.scales, ids, weights, out, E=count, TOP=top, D=width,
        I=inner, S=beside, BN=DOWN_ROWS, CUTS=DOWN_CUTS, EARLY=early, num_warps=DOWN_WARPS, **launching.options(early),
    )  # fmt: skip


def _experts_grouped(
    x: Tensor,
    gate_up: Fp8Blocks,
    down: Fp8Blocks,
    ids: Tensor,
    weights: Tensor,
    shared: tuple[Fp8Blocks, Fp8Blocks] | None,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """`shared`: the weights of the expert that every row visits; of few rows it is in the launches of the others."""
    device, early = device_code("experts_fp8"), launching.early(x)
    count, width, inner = down.shape
    tokens, top = ids.shape
    pairs = tokens * top
    apart = shared is not None and tokens > MOST_TILED_ROWS
    shared_gate_up, shared_down = (gate_up, down) if shared is None or apart else shared
    beside = 0 if shared is None or apart else shared_down.shape[2]
    order, starts = arranged(ids, count, workspace)
    act = workspace.take("expert_inner", (pairs, inner), x.dtype)
    shared_act = workspace.take("shared_inner", (tokens, beside), x.dtype) if beside else act
    part = workspace.take("expert_part", (pairs + (tokens if beside else 0), width), torch.float32)
    rows, columns, warps, stages = grouped_shape(pairs / count, x.element_size())
    blocks, tiles = -(-tokens // rows), -(-inner // columns)
    shape = {"num_warps": warps, "num_stages": stages, **launching.options(early)}
    device.gate_up_grouped[(tiles, blocks, count + -(-beside // (tiles * columns)))](
        x, gate_up.data, gate_up.scales, shared_gate_up.data, shared_gate_up.scales, order, starts, act, shared_act,
        tokens, TOP=top, D=width, I=inner, S=beside, BM=rows, BI=columns, EARLY=early, **shape,
    )  # fmt: skip
    device.down_grouped[(-(-width // columns), blocks, count + (1 if beside else 0))](
        act, shared_act, down.data, down.scales, shared_down.data, shared_down.scales, order, starts, weights, part,
        tokens, pairs, D=width, I=inner, S=beside, BM=rows, BN=columns, EARLY=early, **shape,
    )  # fmt: skip
    added = part[pairs:] if beside else _swiglu(x, *shared, workspace) if shared is not None else None
    combine(part, ids, added, count, out)


def grouped_shape(rows_an_expert: float, element_bytes: int = 2) -> tuple[int, int, int, int]:
    """(Rows, columns, warps, stages) of a program of the grouped form."""
    if element_bytes > 2:  # shared memory has no room for larger ones
        return (16, 32, 4, 2)
    if rows_an_expert <= 16:
        return 16, 64, 4, 4
    return (32, 64, 4, 3) if rows_an_expert <= 32 else (64, 64, 8, 3)
