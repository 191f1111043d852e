"""Decompressed attention with the products of torch and everything between them in C: float32, any number of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentspeed_kernels.cpu.torch_attention import latents_of, rows_of
from agentspeed_kernels.tiles import Tile, TilePlan
from agentspeed_kernels.workspace import Workspace

NEVER = -1e30
"""Below every finite score; its difference to itself is 0, not NaN."""


def mla_extend(
    functions: dict[str, Any],
    q: Tensor,
    pool: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    tiles: TilePlan,
    scale: float,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """`out` must be contiguous; rows without a tile keep what they had."""
    assert out.is_contiguous()
    rows, heads, value = out.shape
    threads = torch.get_num_threads()
    held = workspace.take("extend_held", (rows, heads, value), torch.float32).zero_()
    most = workspace.take("extend_most", (rows, heads), torch.float32).fill_(NEVER)
    weight = workspace.take("extend_weight", (rows, heads), torch.float32).zero_()
    for tile in tiles.tiles:
        latents = _latents(functions["take_back"], pool, tile, key_up.shape[1], q.shape[2] - key_up.shape[2], workspace)
        part, peaks, sums = _part(functions["soften"], q, latents, key_up, value_up, tile, scale, workspace, threads)
        functions["merge"](
            part.data_ptr(),
            peaks.data_ptr(),
            sums.data_ptr(),
            tile.rows.ctypes.data,
            held.data_ptr(),
            most.data_ptr(),
            weight.data_ptr(),
            heads,
            tile.rows.size,
            value,
            threads,
        )
    functions["normalise"](
        held.data_ptr(),
        weight.data_ptr(),
        tiles.merge_rows.ctypes.data,
        out.data_ptr(),
        heads,
        tiles.merge_rows.size,
        value,
        threads,
    )


def _latents(take_back: Any, pool: Tensor, tile: Tile, rank: int, rope: int, workspace: Workspace) -> Tensor:
    """float32 [tokens, rank + rope]"""
    if pool.dtype != torch.uint8:
        return latents_of(pool, tile, workspace)
    latents = workspace.take("extend_latents", (tile.tokens, rank + rope), torch.float32)
    take_back(
        pool.data_ptr(),
        pool.shape[1],
        rank,
        rope,
        tile.pages.ctypes.data,
        tile.offset,
        tile.tokens,
        latents.data_ptr(),
        torch.get_num_threads(),
    )
    return latents


def _part(
    soften: Any,
    q: Tensor,
    latents: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    tile: Tile,
    scale: float,
    workspace: Workspace,
    threads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile's shares times its values, unnormalised [H, n, value], with peaks and sums [H, n]."""
    heads, rank, nope = key_up.shape
    value, count = value_up.shape[1], tile.rows.size
    take = workspace.take
    compressed = latents[:, :rank]
    keys = take("extend_keys", (heads, tile.tokens, nope), torch.float32)
    torch.bmm(compressed.expand(heads, -1, -1), key_up, out=keys)
    values = take("extend_values", (tile.tokens, heads * value), torch.float32)
    torch.mm(compressed, value_up.view(heads * value, rank).T, out=values)
    queries = q[rows_of(tile, q.device)]
    scores = take("extend_scores", (heads, count, tile.tokens), torch.float32)
    torch.bmm(queries[:, :, :nope].transpose(0, 1), keys.transpose(1, 2), out=scores)
    # Turned keys are the same for all heads: one product for all of them.
    turned = take("extend_turned", (heads, count, q.shape[2] - nope), torch.float32)
    turned.copy_(queries[:, :, nope:].transpose(0, 1))
    flat = scores.view(heads * count, tile.tokens)
    flat.addmm_(turned.view(heads * count, -1), latents[:, rank:].T)
    peaks = take("extend_peaks", (heads, count), torch.float32)
    sums = take("extend_sums", (heads, count), torch.float32)
    soften(
        scores.data_ptr(),
        tile.visible.ctypes.data,
        scale,
        peaks.data_ptr(),
        sums.data_ptr(),
        heads,
        count,
        tile.tokens,
        threads,
    )
    part = take("extend_part", (heads, count, value), torch.float32)
    torch.bmm(scores, values.view(tile.tokens, heads, value).transpose(0, 1), out=part)
    return part, peaks, sums
