"""Grouped-query attention on a GPU: keys and values appended, blocks of few rows, and the rows of long extends."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import heads_in, heads_row
from agentspeed_kernels.triton import fp8_cache_kernels, launching
from agentspeed_kernels.triton.attention import GROUP_WIDE, RowsOnDevice, launch_merge, partials
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.triton.extend import ExtendedBranch, ExtendForm, form_for, merge_parts, processors
from agentspeed_kernels.triton.launching import block_of
from agentspeed_kernels.workspace import Workspace

LEAST_COLUMNS = 16
"""Of a tile: matrix instructions take no fewer."""
WIDE_HEADS = ExtendForm(rows=64, tokens=32, warps=8, stages=3)
MOST_SINGLE_HEADS, HEADS_TOGETHER = 32, 16
"""Up to this many tokens a program appends one head, above it so many."""
MOST_PARTS = 16
"""Parts that the context of a long extend is cut into at most."""


def qkv_append(
    qkv: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
) -> None:
    """Heads of queries and keys are normed and turned in float32; a negative slot writes nothing to the pools."""
    together = 1 if qkv.shape[0] <= MOST_SINGLE_HEADS else min(HEADS_TOGETHER, block_of(qkv.shape[1]))
    _append(qkv, q_gain, k_gain, eps, cos, sin, slots, q, key_pool, value_pool, together)


def qkv_append_by_head(
    qkv: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
) -> None:
    """The same whose sums have one order, however many tokens there are: each head has a program of its own."""
    _append(qkv, q_gain, k_gain, eps, cos, sin, slots, q, key_pool, value_pool, 1)


def _append(
    qkv: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, eps: float, cos: Tensor, sin: Tensor, slots: Tensor,
    q: Tensor, key_pool: Tensor, value_pool: Tensor, together: int,
) -> None:  # fmt: skip
    grouped = device_code("grouped")

    assert qkv.stride(2) == 1 and q.is_contiguous() and key_pool.is_contiguous() and value_pool.is_contiguous()
    assert cos.is_contiguous() and sin.is_contiguous()
    tokens, heads, _ = q.shape
    groups, half, early = (qkv.shape[1] - heads) // 2, cos.shape[1], launching.early(qkv)
    scales_at = heads_row(groups, 2 * half).scales_at if key_pool.dtype == torch.uint8 else 0
    grouped.qkv_append[(tokens, -(-qkv.shape[1] // together))](
        qkv, q_gain if q_gain is not None else q, k_gain if k_gain is not None else q, cos, sin, slots, q, key_pool,
        value_pool, qkv.stride(0), qkv.stride(1), eps, HEADS=heads, GROUPS=groups, HALF=half, BLOCK=block_of(half),
        BH=together, Q_NORM=q_gain is not None, K_NORM=k_gain is not None, ROW=key_pool.shape[-1],
        SCALES_AT=scales_at, EARLY=early, num_warps=1 if together == 1 else 4, **launching.options(early),
    )  # fmt: skip


def gqa_rows(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, step: RowsOnDevice, scale: float, workspace: Workspace, out: Tensor
) -> None:
    """Attention of `q` [T, H, W] over the pages of both pools; writes every row of the plan in `out` [T, H, W].

    Pools and `out` are contiguous. Pools of numbers must hold finite ones everywhere: hidden rows of a page are
    multiplied by zero. Those of bytes (`fp8_cache.heads_row`) may hold anything."""
    for some in (step, *step.others):
        launch_rows(q, key_pool, value_pool, some, scale, workspace, out)
        if some.plan.unit_row.size:
            launch_merge(some, workspace, out, groups_of(key_pool, q.shape[2]))


def groups_of(pool: Tensor, width: int) -> int:
    """Heads of that width in a row of a pool of numbers or of bytes."""
    return heads_in(pool.shape[2], width).heads if pool.dtype == torch.uint8 else pool.shape[2] // width


def launch_rows(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, step: RowsOnDevice, scale: float, workspace: Workspace, out: Tensor
) -> None:
    """The first of the two launches: results of rows with one item, partials of the others."""
    grouped = device_code("grouped")

    assert q.stride(2) == 1 and key_pool.is_contiguous() and value_pool.is_contiguous() and out.is_contiguous()
    plan, form, arrays = step.plan, step.form, step.arrays
    _, heads, width = q.shape
    groups, page_tokens, wide = groups_of(key_pool, width), key_pool.shape[1], _columns(width)
    part, weight = partials(step, width, workspace, groups)
    if key_pool.dtype == torch.uint8:
        fp8_cache_kernels.group_rows(q, key_pool, value_pool, step, scale, part, weight, out)
        return
    early = launching.early(q)
    grouped.attend_groups[(plan.programs, groups)](
        q, _tiles(key_pool, form.tile, wide), _tiles(value_pool, form.tile, wide), arrays["rows"], arrays["visible"],
        arrays["pages"], arrays["items"], arrays["bounds"], part, weight, out, q.stride(0), q.stride(1),
        heads // groups, max(plan.slots, 1), scale * math.log2(math.e), R=form.block_rows, T=form.tile,
        PAGE=page_tokens, W=width, WIDE=wide, ONE=plan.one, RUN=plan.run, EDGE=plan.edge, STAGES=form.stages,
        EARLY=early, num_warps=form.warps, num_stages=form.stages, **launching.options(early),
    )  # fmt: skip


def gqa_extend(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, step: tuple[ExtendedBranch, ...], scale: float,
    workspace: Workspace, out: Tensor,
) -> None:  # fmt: skip
    """As `gqa_rows`, for the rows of the branches in `step` and no others. Of pools of bytes the branch's pages are
    written as numbers once, to scratch memory as large as these."""
    assert q.stride(2) == 1 and key_pool.is_contiguous() and value_pool.is_contiguous() and out.is_contiguous()
    for branch in step:
        own = slice(branch.first, branch.first + branch.count)
        if key_pool.dtype == torch.uint8:
            keys, values = (
                _numbers(pool, branch.pages, q, workspace, name)
                for pool, name in ((key_pool, "extend_keys"), (value_pool, "extend_values"))
            )
            _extend(q[own], keys, values, replace(branch, pages=branch.ascending), scale, workspace, out[own])
        else:
            _extend(q[own], key_pool, value_pool, branch, scale, workspace, out[own])


def _numbers(pool: Tensor, pages: Tensor, q: Tensor, workspace: Workspace, name: str) -> Tensor:
    """The named pages of a pool of bytes as a pool in the format of q [T, H, W]."""
    row = heads_in(pool.shape[2], q.shape[2])
    held = workspace.take(name, (pages.shape[0], pool.shape[1], row.numbers), q.dtype)
    fp8_cache_kernels.decode(pool, pages, row, held)
    return held


def _extend(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, branch: ExtendedBranch, scale: float, workspace: Workspace,
    out: Tensor,
) -> None:  # fmt: skip
    grouped = device_code("grouped")

    count, heads, width = q.shape
    groups, page_tokens, wide = key_pool.shape[2] // width, key_pool.shape[1], _columns(width)
    rows = count * heads // groups
    form = _form_for(rows, q, page_tokens)
    blocks = -(-rows // form.rows)
    parts = max(1, min(MOST_PARTS, processors(q.device) // (blocks * groups)))
    left = parts * count * heads if parts > 1 else 1
    part = workspace.take("extend_part", (left, width), torch.float32)
    weight = workspace.take("extend_weight", (left,), torch.float32)
    grouped.extend_groups[(blocks, groups, parts)](
        q, _tiles(key_pool, form.tokens, wide), _tiles(value_pool, form.tokens, wide), branch.pages, part, weight, out,
        q.stride(0), q.stride(1), count, branch.tokens, branch.seen_first, heads // groups, scale * math.log2(math.e),
        PAGE=page_tokens, W=width, WIDE=wide, BM=form.rows, BN=form.tokens, PARTS=parts, num_warps=form.warps,
        num_stages=form.stages,
    )  # fmt: skip
    if parts > 1:
        merge_parts(part, weight, out, branch, parts)


def _form_for(rows: int, q: Tensor, page_tokens: int) -> ExtendForm:
    """With tiles that divide the page."""
    form = form_for(rows, q.element_size())
    if q.shape[2] > GROUP_WIDE and q.element_size() <= 2:
        form = WIDE_HEADS
    return replace(form, tokens=math.gcd(form.tokens, page_tokens))


def _tiles(pool: Tensor, tokens: int, columns: int) -> Any:
    """The pool as rows, to be read in tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = pool.view(-1, pool.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), [flat.stride(0), 1], [tokens, columns])


def _columns(width: int) -> int:
    return max(LEAST_COLUMNS, block_of(width))
