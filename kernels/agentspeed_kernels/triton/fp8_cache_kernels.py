"""Pools in 8 bits on a GPU: attention of few rows reads them as they lie, long extends numbers made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import CacheRow, heads_in, latent_row
from agentspeed_kernels.triton import launching
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.triton.launching import block_of
from agentspeed_kernels.triton.plan import RowsPlan

LEAST_PAIRS = 16
"""Of numbers in a tile: matrix instructions take no fewer columns."""
SCALES = 4
"""Columns of a tile of scales, of which one is used: the fewest bytes that are copied as a tile."""
DECODED_TOKENS = 16
"""Of a program that writes numbers for bytes."""


class TileForm(Protocol):
    """What `attention.Form` says."""

    @property
    def block_rows(self) -> int: ...
    @property
    def tile(self) -> int: ...
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def hopper(self) -> bool: ...


class PlannedRows(Protocol):
    """A plan on a device: `attention.RowsOnDevice`."""

    @property
    def form(self) -> TileForm: ...
    @property
    def plan(self) -> RowsPlan: ...
    @property
    def arrays(self) -> Mapping[str, Tensor]: ...


def latent_rows(
    q: Tensor, pool: Tensor, step: PlannedRows, scale: float, part: Tensor, weight: Tensor, out: Tensor
) -> None:
    """The launch of `mla_rows` that `attention.launch_rows` makes, for a pool of bytes [P, page, `latent_row`]."""
    plan, form, arrays = step.plan, step.form, step.arrays
    rank = out.shape[-1]
    rope = q.shape[-1] - rank
    row, early = _checked(latent_row(rank, rope), pool), launching.early(q)
    fixed = (arrays["rows"], arrays["visible"], arrays["pages"], arrays["items"], arrays["bounds"])
    rest = (part, weight, out, scale * math.log2(math.e))
    if form.hopper:
        device_code("rows_fp8_hopper").attend_rows[(plan.programs,)](
            q, *_hopper_tiles(pool), pool.view(torch.float32), *fixed, *rest, R=form.block_rows, PAGE=pool.shape[1],
            RING=form.stages, EDGE=plan.edge, num_warps=form.warps,
        )  # fmt: skip
        return
    wide, wide_rope = max(LEAST_PAIRS, block_of(rank) // 2), block_of(rope)
    device_code("rows_fp8").attend_rows[(plan.programs,)](
        q, _tiles(pool, torch.int16, form.tile, wide), _tiles(pool, torch.float32, form.tile, SCALES),
        _tiles(pool, torch.bfloat16, form.tile, wide_rope), *fixed, *rest, R=form.block_rows, T=form.tile,
        PAGE=pool.shape[1], RANK=rank, ROPE=rope, WIDE=wide, WIDE_ROPE=wide_rope, SCALES_AT=row.scales_at // 4,
        TURNED_AT=row.plain_at // 2, ONE=plan.one, RUN=plan.run, EDGE=plan.edge, STAGES=form.stages, ASM=in_assembly(q),
        EARLY=early, num_warps=form.warps, num_stages=form.stages, **launching.options(early),
    )  # fmt: skip


def group_rows(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, step: PlannedRows, scale: float, part: Tensor, weight: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """The launch of `gqa_rows` that `grouped.launch_rows` makes, for pools of bytes [P, page, `heads_row`]."""
    plan, form, arrays = step.plan, step.form, step.arrays
    _, heads, width = q.shape
    row, early = _checked(heads_in(key_pool.shape[2], width), key_pool), launching.early(q)
    wide = max(LEAST_PAIRS, block_of(width) // 2)
    pools = [
        _tiles(pool, dtype, form.tile, columns)
        for pool in (key_pool, value_pool)
        for dtype, columns in ((torch.int16, wide), (torch.float32, SCALES))
    ]
    device_code("grouped_fp8").attend_groups[(plan.programs, row.heads)](
        q, *pools, arrays["rows"], arrays["visible"], arrays["pages"], arrays["items"], arrays["bounds"], part, weight,
        out, q.stride(0), q.stride(1), heads // row.heads, max(plan.slots, 1), scale * math.log2(math.e),
        R=form.block_rows, T=form.tile, PAGE=key_pool.shape[1], W=width, WIDE=wide, SCALES_AT=row.scales_at // 4,
        ONE=plan.one, RUN=plan.run, EDGE=plan.edge, STAGES=form.stages, ASM=in_assembly(q), EARLY=early,
        num_warps=form.warps, num_stages=form.stages, **launching.options(early),
    )  # fmt: skip


def decode(pool: Tensor, pages: Tensor, row: CacheRow, out: Tensor) -> None:
    """out [pages, page, numbers of a row] = what the bytes of the named pages of `pool` [P, page, bytes] stand for."""
    page, tokens = pool.shape[1], math.gcd(DECODED_TOKENS, pool.shape[1])
    device_code("elementwise").decode_pages[(pages.shape[0], page // tokens, row.heads)](
        pool, pages, out, pool.stride(0), HEADS=row.heads, WIDTH=row.width, PLAIN=row.plain,
        BYTES=_checked(row, pool).nbytes, SCALES_AT=row.scales_at, PLAIN_AT=row.plain_at, PAGE=page, TOKENS=tokens,
        BLOCK=block_of(row.width), BLOCK_PLAIN=block_of(row.plain), num_warps=4,
    )  # fmt: skip


def in_assembly(given: Tensor) -> bool:
    """Whether bits are moved in NVIDIA's instructions (`device.fp8_numbers.pairs`)."""
    return given.is_cuda and torch.version.hip is None


def _checked(row: CacheRow, pool: Tensor) -> CacheRow:
    assert pool.dtype == torch.uint8 and pool.shape[-1] == row.nbytes and pool.is_contiguous()
    return row


def _tiles(pool: Tensor, dtype: torch.dtype, tokens: int, columns: int) -> Any:
    """The pool as rows of another format, to be read in tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = pool.view(dtype)
    count, width = flat.shape[0] * flat.shape[1], flat.shape[2]
    return TensorDescriptor(flat.view(count, width), [count, width], [width, 1], [tokens, columns])


def _hopper_tiles(pool: Tensor) -> tuple[Any, Any]:
    """The pool as rows of int16 and of bfloat16, to be read in tiles of 64 tokens and 64 columns."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(128, 16)

    def described(dtype: torch.dtype) -> Any:
        flat = pool.view(dtype).view(-1, pool.shape[2] // 2)
        return TensorDescriptor(flat, list(flat.shape), [flat.stride(0), 1], [64, 64], layout)

    return described(torch.int16), described(torch.bfloat16)
