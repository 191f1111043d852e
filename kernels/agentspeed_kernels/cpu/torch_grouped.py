"""Grouped-query attention over paged keys and values on torch: any format, any number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.cpu.torch_attention import RunningMerge, attend_tile, hide_unseen, latents_of, rows_of
from agentspeed_kernels.fp8_cache import heads_in, heads_row
from agentspeed_kernels.tiles import Tile, TilePlan
from agentspeed_kernels.workspace import Workspace


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
    """Heads of queries and keys are normed and turned, the keys on their way into the pool."""
    heads = q.shape[1]
    queries, keys, values = torch.split(qkv, [heads, *[(qkv.shape[1] - heads) // 2] * 2], dim=1)
    q.copy_(_turned(_normed(queries, q_gain, eps), cos, sin))
    turned = _turned(_normed(keys, k_gain, eps), cos, sin)
    for pool, rows in ((key_pool, turned), (value_pool, values)):
        pool.view(-1, pool.shape[-1]).index_copy_(0, slots, _held(rows, pool))


def _held(rows: Tensor, pool: Tensor) -> Tensor:
    """Rows [T, G, W] as the pool has them."""
    return heads_row(*rows.shape[1:]).coded(rows.flatten(1)) if pool.dtype == torch.uint8 else rows.flatten(1)


def _normed(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * gain


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def gqa_rows(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, tiles: TilePlan, scale: float, workspace: Workspace, out: Tensor
) -> None:
    """Two batched products a tile: the batch is a head of the pools with all query heads that read it."""
    tokens, heads, width = q.shape
    merged = RunningMerge(workspace, tokens, heads, width, q.dtype)
    for tile in tiles.tiles:
        keys, values = _heads_of(key_pool, value_pool, tile, q, workspace)
        groups, count, rows = keys.shape[0], tile.rows.size, rows_of(tile, q.device)
        queries = q[rows].view(count, groups, -1, width).permute(1, 0, 2, 3).reshape(groups, -1, width)
        scores = torch.bmm(queries, keys.transpose(1, 2)).to(merged.dtype).mul_(scale)
        scores = scores.view(groups, count, -1, tile.tokens)
        if tile.shape != "full":
            hide_unseen(scores, tile)
        peak = scores.amax(-1, keepdim=True)
        shares = scores.sub_(peak).exp_()
        total = shares.sum(-1, keepdim=True)
        part = torch.bmm(shares.to(q.dtype).view(groups, -1, tile.tokens), values).view(groups, count, -1, width)
        merged.add(rows, _by_row(part / total), _by_row(peak + total.log()))
    _give(merged, tiles, out)


def gqa_extend(
    q: Tensor, key_pool: Tensor, value_pool: Tensor, tiles: TilePlan, scale: float, workspace: Workspace, out: Tensor
) -> None:
    """The flash attention of torch, a head of the pools as one of its batch: nothing is repeated for query heads."""
    tokens, heads, width = q.shape
    merged = RunningMerge(workspace, tokens, heads, width, q.dtype)
    for tile in tiles.tiles:
        keys, values = _heads_of(key_pool, value_pool, tile, q, workspace)
        groups, count, rows = keys.shape[0], tile.rows.size, rows_of(tile, q.device)
        queries = q[rows].view(count, groups, -1, width).permute(1, 2, 0, 3)
        shared = (groups, queries.shape[1], tile.tokens, width)
        held = (keys.unsqueeze(1).expand(shared), values.unsqueeze(1).expand(shared))
        part, weight = attend_tile(queries, *held, tile, scale)
        merged.add(rows, _by_row(part.transpose(1, 2)), _by_row(weight.transpose(1, 2).unsqueeze(-1)))
    _give(merged, tiles, out)


def _heads_of(
    key_pool: Tensor, value_pool: Tensor, tile: Tile, q: Tensor, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Keys and values of a tile, each [G, tokens, W]; views where the pages are neighbours."""

    def read(pool: Tensor, name: str) -> Tensor:
        held = latents_of(pool, tile, workspace, name)
        if held.dtype == torch.uint8:
            held = heads_in(held.shape[-1], q.shape[2]).decoded(held, q.dtype)
        return held.view(tile.tokens, -1, q.shape[2]).transpose(0, 1)

    return read(key_pool, "gathered_keys"), read(value_pool, "gathered_values")


def _by_row(parts: Tensor) -> Tensor:
    """[G, rows, H / G, x] to [rows, H, x]."""
    return parts.transpose(0, 1).reshape(parts.shape[1], -1, parts.shape[3])


def _give(merged: RunningMerge, tiles: TilePlan, out: Tensor) -> None:
    rows = torch.from_numpy(tiles.merge_rows).long().to(out.device)
    out[rows] = merged.sum[rows].to(out.dtype)
