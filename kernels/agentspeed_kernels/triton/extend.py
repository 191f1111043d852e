"""Long extends: the cached context is decompressed in chunks and attended to by ordinary heads.

Two products a chunk make keys and values of all heads, one kernel attends to them and carries its running softmax over
the chunks. Scratch memory is bounded by `CHUNK_BYTES` whatever the context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from agentspeed_kernels.attention import paths
from agentspeed_kernels.fp8_cache import latent_row
from agentspeed_kernels.tiles import Int64s, Piece
from agentspeed_kernels.triton import fp8_cache_kernels
from agentspeed_kernels.triton.device_code import device_code
from agentspeed_kernels.triton.launching import block_of
from agentspeed_kernels.triton.plan import merge_shape, segments
from agentspeed_kernels.uploads import unwaited
from agentspeed_kernels.workspace import Workspace

CHUNK_BYTES = 512 << 20
"""Decompressed keys and values held at once."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendForm:
    """One compiled shape of the extend kernel."""

    rows: int
    tokens: int
    warps: int
    stages: int


WIDE = ExtendForm(rows=128, tokens=64, warps=8, stages=3)
NARROW = ExtendForm(rows=64, tokens=64, warps=4, stages=3)
SMALL = ExtendForm(rows=16, tokens=16, warps=4, stages=2)
"""For formats wider than 2 bytes, which have no room for larger tiles, and for pages of few tokens."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ExtendedBranch:
    """The new tokens of one branch and all the context they see."""

    first: int
    count: int
    """Its query rows are first to first + count - 1 of the step."""
    pages: Tensor
    """[P] int32 on the device, each full but for the last."""
    tokens: int
    seen_first: int
    """Tokens its first query sees; each next one sees one more."""
    unit_row: Tensor
    """[count] int32: rows of `merge`."""
    ascending: Tensor
    """[P] int32: 0, 1, .. P - 1, its pages where they were gathered."""
    tables: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Of `merge`, by the number of parts: the first layer of a step makes them for all."""


class NotOneBranch(ValueError):
    """Rows that are no consecutive tokens of one branch; absorbed attention serves them."""


def prepare_extend(
    pieces: Sequence[Piece], positions: Int64s, page_tokens: int, heads: int, device: torch.device
) -> tuple[ExtendedBranch, ...]:
    """One entry a branch. Raises `NotOneBranch` where the pieces of some rows do not make one path of full pages."""
    branches = []
    for chain in paths(pieces):
        queries = chain[-1].queries
        held = segments(chain, positions, page_tokens)
        steps = np.diff(held.visible)
        if held.tokens.size != 1 or (np.diff(queries) != 1).any() or (steps != 1).any():
            raise NotOneBranch(f"rows {queries[:4]}.. read {held.tokens.size} stretches that are not one path")
        first, count = int(queries[0]), int(queries.size)
        pages = held.pages[: int(held.held[0])]
        units = np.arange(count, dtype=np.int32) * heads
        branches.append(
            ExtendedBranch(
                first=first,
                count=count,
                pages=unwaited(pages, device),
                tokens=int(held.tokens[0]),
                seen_first=int(held.visible[0]),
                unit_row=unwaited(units, device),
                ascending=unwaited(np.arange(pages.size, dtype=np.int32), device),
            )
        )
    return tuple(branches)


def mla_extend(
    q: Tensor,
    pool: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    step: tuple[ExtendedBranch, ...],
    scale: float,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """`q` [T, H, nope + rope], `key_up` [H, R, nope], `value_up` [H, value, R], `out` [T, H, value] contiguous; a pool
    of bytes (`fp8_cache.latent_row`) becomes numbers of q's format where its pages are gathered.

    Writes the rows of the branches in `step` and no others."""
    assert q.stride(2) == 1 and out.is_contiguous() and pool.is_contiguous()
    for branch in step:
        _extend(q, pool, key_up, value_up, branch, scale, workspace, out)


def _extend(
    q: Tensor, pool: Tensor, key_up: Tensor, value_up: Tensor, branch: ExtendedBranch, scale: float,
    workspace: Workspace, out: Tensor,
) -> None:  # fmt: skip
    heads, rank, nope = key_up.shape
    value, page_tokens = value_up.shape[1], pool.shape[1]
    form = form_for(branch.count, q.element_size())
    blocks = -(-branch.count // form.rows) * heads
    parts = max(1, min(16, processors(q.device) // blocks))
    chunk = max(1, CHUNK_BYTES // (heads * (nope + value) * q.element_size() * page_tokens))
    part = workspace.take("extend_part", (parts * branch.count * heads, value), torch.float32)
    weight = workspace.take("extend_weight", (parts * branch.count * heads,), torch.float32)
    mine = out[branch.first : branch.first + branch.count]
    for at in range(0, branch.pages.shape[0], chunk):
        pages = branch.pages[at : at + chunk]
        before = at * page_tokens
        tokens = min(branch.tokens - before, pages.shape[0] * page_tokens)
        latents = _latents(pool, pages, rank, q.shape[2] - nope, q.dtype, workspace)
        keys, turned, values = _decompress(latents, key_up, value_up, form, workspace)
        _attend(
            q[branch.first : branch.first + branch.count], keys, turned, values, part, weight, mine, before, tokens,
            branch, scale * math.log2(math.e), form, parts, (heads, rank, nope), value,
            last=at + chunk >= branch.pages.shape[0],
        )  # fmt: skip
    if parts > 1:
        merge_parts(part, weight, mine, branch, parts)


def _latents(
    pool: Tensor, pages: Tensor, rank: int, rope: int, dtype: torch.dtype, workspace: Workspace
) -> Tensor:  # fmt: skip
    """[pages * page, rank + rope] of the named pages, in scratch memory."""
    from agentspeed_kernels.triton.kernels import gather_pages

    count, page_tokens = pages.shape[0], pool.shape[1]
    latents = workspace.take("extend_latents", (1, count, page_tokens, rank + rope), dtype)
    if pool.dtype == torch.uint8:
        fp8_cache_kernels.decode(pool, pages, latent_row(rank, rope), latents)
    else:
        gather_pages(pool.unsqueeze(0), pages, latents)
    return latents.view(count * page_tokens, rank + rope)


def _decompress(
    latents: Tensor, key_up: Tensor, value_up: Tensor, form: ExtendForm, workspace: Workspace
) -> tuple[Any, Any, Any]:
    """Descriptors of keys [H * tokens, nope], of the latents' rows, and of values [H * tokens, value]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    heads, rank, nope = key_up.shape
    rows, width = latents.shape
    value, take = value_up.shape[1], workspace.take
    compressed = latents[:, :rank].expand(heads, -1, -1)
    keys = take("extend_keys", (heads, rows, nope), latents.dtype)
    values = take("extend_values", (heads, rows, value), latents.dtype)
    torch.bmm(compressed, key_up, out=keys)
    torch.bmm(compressed, value_up.transpose(1, 2), out=values)

    def rows_of(tensor: Tensor, columns: int) -> Any:
        count, size = tensor.shape
        return TensorDescriptor(tensor, [count, size], [size, 1], [form.tokens, columns])

    return (
        rows_of(keys.view(-1, nope), block_of(nope)),
        rows_of(latents, block_of(width - rank)),
        rows_of(values.view(-1, value), block_of(value)),
    )


def _attend(
    q: Tensor, keys: Any, turned: Any, values: Any, part: Tensor, weight: Tensor, out: Tensor, before: int, tokens: int,
    branch: ExtendedBranch, scale2: float, form: ExtendForm, parts: int, up: tuple[int, int, int], value: int, *,
    last: bool,
) -> None:  # fmt: skip
    device = device_code("extend")

    heads, rank, nope = up
    rope = q.shape[2] - nope
    device.attend_chunk[(-(-branch.count // form.rows), heads, parts)](
        q, keys, turned, values, part, weight, out, q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        branch.count, tokens, keys.shape[0] // heads, before, branch.seen_first, scale2,
        HEADS=heads, NOPE=nope, ROPE=rope, RANK=rank, VALUE=value, WIDE_NOPE=block_of(nope), WIDE_ROPE=block_of(rope),
        WIDE_VALUE=block_of(value), BM=form.rows, BN=form.tokens, PARTS=parts, CARRY=before > 0, LAST=last,
        num_warps=form.warps, num_stages=form.stages,
    )  # fmt: skip


def merge_parts(part: Tensor, weight: Tensor, out: Tensor, branch: ExtendedBranch, parts: int) -> None:
    """Joins the partials of several parts of the context in `out` [count, heads, value], the branch's own rows.

    Part z of query t begins at row (z * count + t) * heads."""
    rows = device_code("rows")

    count, heads, value = out.shape
    columns, take, warps = merge_shape(parts)
    columns = min(columns, block_of(value))
    padded = -(-parts // take) * take
    table = branch.tables.get(parts)
    if table is None:
        z = torch.arange(padded, device=out.device, dtype=torch.int32)
        table = torch.where(z < parts, (z * count * heads)[None, :] + branch.unit_row[:, None], -1).contiguous()
        branch.tables[parts] = table
    rows.merge[(count * heads, -(-value // columns))](
        part, weight, out, branch.unit_row, table, padded, heads, 0, UNIT=heads, RANK=value, COLUMNS=columns, TAKE=take,
        SHOT=padded <= take, GROUPS=1, EARLY=False, num_warps=warps,
    )  # fmt: skip


def form_for(count: int, element_bytes: int) -> ExtendForm:
    """Wide blocks, unless half of one would stay empty or they do not fit the registers (AMD; compiled, not run)."""
    if element_bytes > 2:
        return SMALL
    return WIDE if count > NARROW.rows and torch.version.hip is None else NARROW


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
