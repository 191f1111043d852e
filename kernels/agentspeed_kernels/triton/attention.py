"""The attention backend for CUDA: decides forms and splits for a step's runs, uploads them once, launches per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from agentspeed_kernels.attention import paths
from agentspeed_kernels.tiles import Int32s, Int64s, Piece
from agentspeed_kernels.triton import fp8_cache_kernels, launching
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.triton.launching import block_of
from agentspeed_kernels.triton.plan import FIXED_TAKE, Cut, RowsPlan, merge_shape, plan_rows, segments
from agentspeed_kernels.workspace import Workspace

ALIGN = 32
"""Sections of the uploaded array begin at multiples of this many int32: compiled code relies on 16 bytes."""
Chip = Literal["sm_90", "cuda", "hip"]
SECTIONS = ("items", "bounds", "rows", "visible", "pages", "unit_row", "table")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One compiled shape of the rows kernel."""

    block_rows: int
    tile: int
    """Tokens of a tile; divides the page."""
    warps: int
    stages: int
    """Tiles in flight (plain Triton) or buffers of the ring (Gluon, even)."""
    hopper: bool = False
    """The Gluon kernels: rank 512, rope 64, compute capability 9; block_rows 64 of bfloat16, 16 of bytes."""


ROWS_16 = Form(block_rows=16, tile=64, warps=8, stages=3)
ROWS_32 = Form(block_rows=32, tile=32, warps=8, stages=3)
ROWS_64 = Form(block_rows=64, tile=32, warps=8, stages=2)
ROWS_16_HIP = Form(block_rows=16, tile=16, warps=4, stages=1)
"""The one that keeps a CDNA4 chip's registers; compiled, not run."""
ROWS_WIDE_FORMAT = Form(block_rows=16, tile=16, warps=4, stages=2)
"""For formats wider than 2 bytes: shared memory has no room for larger tiles."""
HOPPER_LARGE = Form(block_rows=64, tile=64, warps=4, stages=2, hopper=True)
HOPPER_SMALL = Form(block_rows=64, tile=32, warps=4, stages=4, hopper=True)
GROUP_16 = Form(block_rows=16, tile=64, warps=4, stages=3)
GROUP_32 = Form(block_rows=32, tile=64, warps=4, stages=3)
GROUP_64 = Form(block_rows=64, tile=64, warps=4, stages=3)
GROUP_HIP = Form(block_rows=16, tile=32, warps=4, stages=1)
"""Of grouped-query attention."""
BYTES_16 = Form(block_rows=16, tile=64, warps=8, stages=3)
BYTES_32 = Form(block_rows=32, tile=32, warps=8, stages=3)
BYTES_HOPPER = Form(block_rows=16, tile=64, warps=4, stages=2, hopper=True)
BYTES_HIP = Form(block_rows=16, tile=16, warps=4, stages=1)
BYTES_GROUP_16 = Form(block_rows=16, tile=64, warps=4, stages=3)
BYTES_GROUP_32 = Form(block_rows=32, tile=64, warps=4, stages=3)
BYTES_GROUP_HIP = Form(block_rows=16, tile=32, warps=4, stages=1)
"""Of pools in 8 bits, latents and groups; wider blocks have no room for numbers that are made of bytes."""
GROUP_WIDE = 128
"""Wider heads take tiles of half as many tokens, and no blocks of 64 rows: registers have no room for them."""
FEW_PAGES = 3
"""Up to this many pages a program one program of bytes a multiprocessor is faster than two, whose partials are twice as
many (measured likewise)."""
SMALL_PAGES, SMALL_PAGES_SHARED = 48, 24
"""Up to this many pages a program the form with smaller tiles is faster: with one block of rows on a page, and with
several (measured, docs/performance.md)."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What of a model and a device the choice of forms depends on."""

    heads: int
    """Heads of queries that read the same rows of the cache."""
    rank: int
    """Of latents, or the width of a head of keys and values."""
    rope: int
    page_tokens: int
    processors: int
    """Programs among which a plan is cut: multiprocessors of the device, or what of them falls to a group."""
    hopper: bool
    """The Gluon kernels can run: compute capability 9, and `plain` is not asked for."""
    element_bytes: int = 2
    """Of the pool's format."""
    chip: Chip = "sm_90"
    """Whose plain forms to take: a Hopper's, another NVIDIA chip's, an AMD one's."""
    groups: int | None = None
    """Heads of keys and values; a plan is that of each. None: latents, of which there is one for all heads."""

    @property
    def all_heads(self) -> int:
        """Of queries."""
        return self.heads * (self.groups or 1)


@final
@dataclass(frozen=True, slots=True)
class PlanLayout:
    """See `plan.Layout`."""

    block_rows: int
    heads: int
    page_tokens: int
    programs: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class RowsOnDevice:
    """A plan with its arrays on the device: what `mla_rows` is given, the same for every layer of a step."""

    form: Form
    plan: RowsPlan
    arrays: dict[str, Tensor]
    block: Tensor
    """The one allocation the arrays are views of."""
    others: tuple[RowsOnDevice, ...] = ()
    """Plans of other rows of the step, which run behind this one in the same scratch memory."""


def prepare(
    pieces: Sequence[Piece],
    positions: Int64s,
    shape: AttentionShape,
    device: torch.device,
    *,
    cut: Cut | None = None,
    form: Form | None = None,
) -> RowsOnDevice:
    """Plans one step and uploads the plan; the arguments are those of `plan_step`."""
    return upload(*plan_step(pieces, positions, shape, cut=cut, form=form), device)


def plan_step(
    pieces: Sequence[Piece],
    positions: Int64s,
    shape: AttentionShape,
    *,
    cut: Cut | None = None,
    form: Form | None = None,
) -> tuple[RowsPlan, Form]:
    """The plan of one step and the form it is made for.

    `cut="fixed"` is the batch-invariant split: nothing is folded, the form depends on the model alone, and segments are
    cut at fixed places, so that a row meets the same sums in the same order whatever else is in the step. Its price is
    that branches read what they share once each, and more partials."""
    if cut == "fixed":
        pieces = [piece for path in paths(pieces) for piece in path]
        form = form or choose(shape.heads, 0, shape)
    held = segments(pieces, positions, shape.page_tokens)
    rows = np.diff(held.query_at) * shape.heads
    form = form or choose(int(rows.max(initial=0)), int((-(-rows // 64) * held.held).sum()), shape)
    layout = layout_of(form, shape)
    if shape.element_bytes == 1 and form.hopper and cut is None:
        few = (-(-rows // form.block_rows) * held.held).sum() <= FEW_PAGES * layout.programs
        layout = replace(layout, programs=-(-layout.programs // 2)) if few else layout
    return plan_rows(held, layout, cut=cut), form


def layout_of(form: Form, shape: AttentionShape) -> PlanLayout:
    return PlanLayout(form.block_rows, shape.heads, shape.page_tokens, shape.processors)


def choose(rows: int, pages: int, shape: AttentionShape) -> Form:
    """The form for segments with up to `rows` rows, which blocks of 64 rows would read `pages` pages of in all.

    Blocks wider than a segment's rows waste products; narrower ones read its latents once more. Where products are the
    limit, because several blocks read the same pages, larger tiles pay earlier."""
    if shape.element_bytes > 2:
        return fitted(ROWS_WIDE_FORMAT, shape)
    if shape.element_bytes == 1:
        return _choose_bytes(rows, shape)
    if shape.groups is not None:
        return _choose_grouped(rows, shape)
    fits = _fits_hopper(shape)
    if shape.chip == "hip":
        return fitted(ROWS_16_HIP, shape)
    if rows <= 16:
        return fitted(ROWS_16, shape)
    if shape.hopper and fits:
        few = SMALL_PAGES if rows <= 64 else SMALL_PAGES_SHARED
        return HOPPER_SMALL if pages <= few * shape.processors else HOPPER_LARGE
    return fitted(ROWS_64 if rows > 32 and shape.chip == "sm_90" else ROWS_32, shape)


def _fits_hopper(shape: AttentionShape) -> bool:
    return shape.rank == 512 and shape.rope == 64 and shape.page_tokens % 64 == 0


def _choose_bytes(rows: int, shape: AttentionShape) -> Form:
    if shape.groups is not None:
        few, many, hip = BYTES_GROUP_16, BYTES_GROUP_32, BYTES_GROUP_HIP
    elif shape.hopper and _fits_hopper(shape):
        few, many, hip = BYTES_HOPPER, BYTES_HOPPER, BYTES_HIP
    else:
        few, many, hip = BYTES_16, BYTES_32, BYTES_HIP
    form = hip if shape.chip == "hip" else few if rows <= 16 else many
    wide = shape.groups is not None and shape.rank > GROUP_WIDE
    return fitted(replace(form, tile=form.tile // 2) if wide else form, shape)


def _choose_grouped(rows: int, shape: AttentionShape) -> Form:
    if shape.chip == "hip":
        form = GROUP_HIP
    elif rows <= 16:
        form = GROUP_16
    else:
        form = GROUP_64 if rows > 32 and shape.chip == "sm_90" and shape.rank <= GROUP_WIDE else GROUP_32
    return fitted(form if shape.rank <= GROUP_WIDE else replace(form, tile=form.tile // 2), shape)


def fitted(form: Form, shape: AttentionShape) -> Form:
    """The form with tiles that divide the page."""
    return replace(form, tile=math.gcd(form.tile, shape.page_tokens))


def upload(plan: RowsPlan, form: Form, device: torch.device) -> RowsOnDevice:
    """One copy to the device for all arrays of a plan."""
    parts: list[Int32s] = [getattr(plan, name).reshape(-1) for name in SECTIONS]
    starts = np.concatenate([[0], np.cumsum([-(-max(part.size, 1) // ALIGN) * ALIGN for part in parts])])
    flat = np.zeros(int(starts[-1]), np.int32)
    for start, part in zip(starts, parts, strict=False):
        flat[start : start + part.size] = part
    block = torch.from_numpy(flat)
    block = block.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else block
    arrays = {
        name: block[start : start + max(part.size, 1)]
        for name, start, part in zip(SECTIONS, starts.tolist(), parts, strict=False)
    }
    return RowsOnDevice(form=form, plan=plan, arrays=arrays, block=block)


def mla_rows(q: Tensor, pool: Tensor, step: RowsOnDevice, scale: float, workspace: Workspace, out: Tensor) -> None:
    """Attention of `q` [T, H, rank + rope] over the paged latents of `pool`; writes every row of the plan in `out`.

    All three are contiguous and of one format, or the pool is bytes (`fp8_cache.latent_row`). A pool of numbers must
    hold finite ones everywhere: hidden rows of a page are multiplied by zero. Those of bytes may hold anything."""
    for some in (step, *step.others):
        launch_rows(q, pool, some, scale, workspace, out)
        if some.plan.unit_row.size:
            launch_merge(some, workspace, out)


def launch_rows(q: Tensor, pool: Tensor, step: RowsOnDevice, scale: float, workspace: Workspace, out: Tensor) -> None:
    """The first of the two launches: results of rows with one item, partials of the others."""
    assert q.is_contiguous() and pool.is_contiguous() and out.is_contiguous()
    plan, form, arrays = step.plan, step.form, step.arrays
    rank, page_tokens = out.shape[-1], pool.shape[1]
    rope = q.shape[-1] - rank
    part, weight = partials(step, rank, workspace)
    if pool.dtype == torch.uint8:
        fp8_cache_kernels.latent_rows(q, pool, step, scale, part, weight, out)
        return
    fixed = (arrays["rows"], arrays["visible"], arrays["pages"], arrays["items"], arrays["bounds"])
    rest = (part, weight, out, scale * math.log2(math.e))
    if form.hopper:
        rows_hopper = device_code("rows_hopper")

        latents, turned = hopper_descriptors(pool, form.tile)
        rows_hopper.attend_rows_hopper[(plan.programs,)](
            q, latents, turned, *fixed, *rest, PAGE=page_tokens, T=form.tile, RING=form.stages, EDGE=plan.edge,
            num_warps=form.warps, maxnreg=168,
        )  # fmt: skip
        return
    rows = device_code("rows")

    split = _power_of_two(rank) and _power_of_two(rope) and rope >= 16
    wide = rank if split else block_of(rank + rope)
    latents, turned = descriptors(pool, form.tile, wide, rope if split else wide)
    early = launching.early(q)
    rows.attend_rows[(plan.programs,)](
        q, latents, turned, *fixed, *rest, R=form.block_rows, T=form.tile, PAGE=page_tokens, RANK=rank, ROPE=rope,
        WIDE=wide, SPLIT=split, ONE=plan.one, RUN=plan.run, EDGE=plan.edge, STAGES=form.stages, EARLY=early,
        num_warps=form.warps, num_stages=form.stages, **launching.options(early),
    )  # fmt: skip


def launch_merge(step: RowsOnDevice, workspace: Workspace, out: Tensor, groups: int = 1) -> None:
    """The second launch: joins the partials of all rows that have several; with `groups` of them the plan is that of
    each."""
    rows = device_code("rows")

    part, weight = partials(step, out.shape[-1], workspace, groups)
    units, parts = step.plan.table.shape
    fixed = step.plan.fixed
    columns, take, warps = merge_shape(FIXED_TAKE if fixed else parts)
    rank = out.shape[-1]
    columns, early = min(columns, block_of(rank)), launching.early(out)
    rows.merge[(units * step.plan.unit, -(-rank // columns), groups)](
        part, weight, out, step.arrays["unit_row"], step.arrays["table"], parts, out.shape[1] // groups,
        part.shape[0] // groups, UNIT=step.plan.unit, RANK=rank, COLUMNS=columns, TAKE=take,
        SHOT=parts <= take and not fixed, GROUPS=groups, EARLY=early, num_warps=warps, **launching.options(early),
    )  # fmt: skip


def partials(step: RowsOnDevice, rank: int, workspace: Workspace, groups: int = 1) -> tuple[Tensor, Tensor]:
    """What of each row the first launch leaves for the second, one group's slots after another's, and its weight."""
    count = groups * max(step.plan.slots, 1) * step.form.block_rows
    part = workspace.take("mla_part", (count, rank), torch.float32)
    return part, workspace.take("mla_weight", (count,), torch.float32)


def descriptors(pool: Tensor, tile: int, wide: int, rope: int) -> tuple[Any, Any]:
    """The pool as rows, to be read in tiles of `wide` and of `rope` columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = pool.view(-1, pool.shape[-1])
    shape, strides = list(flat.shape), [flat.stride(0), 1]
    return (
        TensorDescriptor(flat, shape, strides, [tile, wide]),
        TensorDescriptor(flat, shape, strides, [tile, rope]),
    )


def hopper_descriptors(pool: Tensor, tile: int) -> tuple[Any, Any]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    flat = pool.view(-1, pool.shape[-1])
    layout = gl.NVMMASharedLayout(128, 16)
    shape, strides = list(flat.shape), [flat.stride(0), 1]
    return (
        TensorDescriptor(flat, shape, strides, [tile, 256], layout),
        TensorDescriptor(flat, shape, strides, [tile, 64], layout),
    )


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
