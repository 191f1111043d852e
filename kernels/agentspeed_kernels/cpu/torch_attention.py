"""Attention over paged latents on torch: two matrix products a tile and a running log-sum-exp merge."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import CacheRow, latent_row
from agentspeed_kernels.tiles import Tile, TilePlan
from agentspeed_kernels.workspace import Workspace


def mla_rows(q: Tensor, pool: Tensor, tiles: TilePlan, scale: float, workspace: Workspace, out: Tensor) -> None:
    rank = out.shape[-1]
    heads, width = q.shape[1], q.shape[2]
    row = latent_row(rank, width - rank)
    merged = RunningMerge(workspace, q.shape[0], heads, rank, q.dtype)
    for tile in tiles.tiles:
        latents = read_rows(latents_of(pool, tile, workspace), row, q.dtype)
        rows = rows_of(tile, q.device)
        scores = (q[rows].reshape(-1, width) @ latents.T).view(tile.rows.size, heads, -1)
        scores = scores.to(merged.dtype).mul_(scale)
        if tile.shape != "full":
            hide_unseen(scores, tile)
        peak = scores.amax(-1, keepdim=True)
        shares = scores.sub_(peak).exp_()
        total = shares.sum(-1, keepdim=True)
        part = (shares.to(q.dtype).view(-1, tile.tokens) @ latents[:, :rank]).view(tile.rows.size, heads, rank)
        merged.add(rows, part / total, peak + total.log())
    out.copy_(merged.sum)


def mla_extend(
    q: Tensor,
    pool: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    tiles: TilePlan,
    scale: float,
    workspace: Workspace,
    out: Tensor,
) -> None:
    """Keys and values are decompressed a tile at a time; cheaper than absorbed attention once many rows share them."""
    rank, value = key_up.shape[1], out.shape[-1]
    row = latent_row(rank, q.shape[2] - key_up.shape[2])
    merged = RunningMerge(workspace, q.shape[0], q.shape[1], value, q.dtype)
    # Widths must be equal: the narrower of keys and values is padded with zeros.
    padded = q if q.shape[2] >= value else torch.nn.functional.pad(q, (0, value - q.shape[2]))
    for tile in tiles.tiles:
        latents = read_rows(latents_of(pool, tile, workspace), row, q.dtype)
        keys, values = _decompress(latents, key_up, value_up, rank, q.shape[2], workspace)
        rows = rows_of(tile, q.device)
        queries = padded[rows].transpose(0, 1).unsqueeze(0)
        part, weight = attend_tile(queries, keys.unsqueeze(0), values.unsqueeze(0), tile, scale)
        part = part[0, :, :, :value].transpose(0, 1)
        merged.add(rows, part, weight[0].transpose(0, 1).unsqueeze(-1))
    out.copy_(merged.sum)


def _decompress(
    latents: Tensor, key_up: Tensor, value_up: Tensor, rank: int, width: int, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    heads, value, tokens = key_up.shape[0], value_up.shape[1], latents.shape[0]
    nope = key_up.shape[2]
    keys = workspace.take("extend_keys", (heads, tokens, max(width, value)), latents.dtype)
    values = workspace.take("extend_values", (heads, tokens, max(width, value)), latents.dtype)
    compressed = latents[:, :rank].expand(heads, -1, -1)
    keys[:, :, :nope] = torch.bmm(compressed, key_up)
    keys[:, :, nope:width] = latents[:, rank:]
    keys[:, :, width:] = 0
    values[:, :, :value] = torch.bmm(compressed, value_up.transpose(1, 2))
    values[:, :, value:] = 0
    return keys, values


def latents_of(pool: Tensor, tile: Tile, workspace: Workspace, name: str = "gathered") -> Tensor:
    """[tokens, width]: a view when the pages are neighbours, else gathered once, into the scratch memory `name`."""
    page_tokens, width = pool.shape[1], pool.shape[2]
    if tile.contiguous:
        first = int(tile.pages[0]) * page_tokens + tile.offset
        return pool.view(-1, width)[first : first + tile.tokens]
    gathered = workspace.take(name, (tile.pages.size, page_tokens, width), pool.dtype)
    torch.index_select(pool, 0, torch.from_numpy(tile.pages).to(pool.device), out=gathered)
    return gathered.view(-1, width)[tile.offset : tile.offset + tile.tokens]


def read_rows(held: Tensor, row: CacheRow, dtype: torch.dtype) -> Tensor:
    """Rows of a pool as numbers: as they are, or, of rows in 8 bits, what those stand for."""
    return row.decoded(held, dtype) if held.dtype == torch.uint8 else held


def attend_tile(queries: Tensor, keys: Tensor, values: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of `queries` [B, H, rows, W] to the tile's tokens, and its log-sum-exp [B, H, rows]."""
    if queries.device.type == "cpu":
        mask = None if tile.shape != "ragged" else seen_mask(tile, queries.dtype)
        # The public function does not return the log-sum-exp that merging needs.
        part, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, tile.shape == "diagonal", attn_mask=mask, scale=scale
        )
        return part, weight
    scores = queries @ keys.transpose(-1, -2)
    scores = (scores if scores.dtype == torch.float64 else scores.float()).mul_(scale)
    if tile.shape != "full":
        scores.masked_fill_(hidden_from(tile, scores.device), float("-inf"))
    weight = scores.logsumexp(-1)
    return scores.sub_(weight.unsqueeze(-1)).exp_().to(values.dtype) @ values, weight


def rows_of(tile: Tile, device: torch.device) -> slice | Tensor:
    """Neighbouring rows as a slice: a view instead of a copy."""
    if bool((np.diff(tile.rows) == 1).all()):
        return slice(int(tile.rows[0]), int(tile.rows[-1]) + 1)
    return torch.from_numpy(tile.rows).long().to(device)


def hidden_from(tile: Tile, device: torch.device) -> Tensor:
    """[rows, tokens]: what each row does not see."""
    return torch.arange(tile.tokens, device=device) >= torch.from_numpy(tile.visible).to(device)[:, None]


def hide_unseen(scores: Tensor, tile: Tile) -> None:
    """Takes what a row does not see out of its scores [..., rows, heads, tokens]."""
    scores.masked_fill_(hidden_from(tile, scores.device)[:, None, :], float("-inf"))


def seen_mask(tile: Tile, dtype: torch.dtype) -> Tensor:
    """[1, 1, rows, tokens] to add to scores."""
    hidden = hidden_from(tile, torch.device("cpu"))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]


@final
class RunningMerge:
    """The attention of each row over the tiles added so far: `sum` is normalised, `weight` its log-sum-exp."""

    __slots__ = ("dtype", "sum", "weight")

    def __init__(self, workspace: Workspace, rows: int, heads: int, width: int, dtype: torch.dtype) -> None:
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.sum = workspace.take("merge_sum", (rows, heads, width), self.dtype).zero_()
        self.weight = workspace.take("merge_weight", (rows, heads, 1), self.dtype).fill_(float("-inf"))

    def add(self, rows: slice | Tensor, part: Tensor, weight: Tensor) -> None:
        before = self.weight[rows]
        weight = weight.to(self.dtype)
        after = torch.logaddexp(before, weight)
        held = self.sum[rows].mul_((before - after).exp_())
        self.sum[rows] = held.add_(part.to(self.dtype) * (weight - after).exp_())
        self.weight[rows] = after
