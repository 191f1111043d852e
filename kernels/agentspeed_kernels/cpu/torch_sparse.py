"""An indexer's keys, its choice of tokens and attention to them on torch: any format, any number of rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agentspeed_kernels.cpu.torch_attention import hidden_from, latents_of, rows_of
from agentspeed_kernels.tiles import Tile, TilePlan
from agentspeed_kernels.workspace import Workspace

_GATHERED = 1 << 22
"""Elements of latents that are gathered at once."""


def index_append(
    raw: Tensor, gain: Tensor, shift: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
) -> None:
    wide = _wide(raw)
    row = torch.nn.functional.layer_norm(wide, (raw.shape[-1],), gain.to(wide.dtype), shift.to(wide.dtype), eps)
    half = cos.shape[-1]
    low, high = row[:, :half], row[:, half : 2 * half]
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin, row[:, 2 * half :]], dim=-1)
    pool.index_copy_(0, slots, turned.to(pool.dtype))


def index_select(
    q: Tensor, x: Tensor, weight: Tensor, pool: Tensor, plan: TilePlan, top: int, workspace: Workspace
) -> Tensor:
    """Tile by tile in the order of positions; the sort is stable, so the earlier of equals stays before the later. A
    score that is no number comes first; its row chooses nothing, and attention to nothing is no number either."""
    tokens, wide = q.shape[0], weight.dtype
    shares = x.to(wide) @ weight.T
    most = int(np.bincount(plan.rows, weights=plan.visible).max()) if plan.count else 0
    best = torch.full((tokens, min(top, most)), float("-inf"), dtype=wide, device=q.device)
    chosen = torch.full(best.shape, -1, dtype=torch.int64, device=q.device)
    for tile in sorted(plan.tiles, key=lambda tile: tile.start):
        rows = rows_of(tile, q.device)
        keys = latents_of(pool, tile, workspace, "gathered_index").to(wide)
        queries = q[rows].to(wide)
        heads = (queries.reshape(-1, keys.shape[-1]) @ keys.T).relu_().view(*queries.shape[:2], -1)
        scores = (shares[rows].unsqueeze(1) @ heads).squeeze(1)
        if tile.shape != "full":
            scores.masked_fill_(hidden_from(tile, q.device), float("-inf"))
        scores = torch.cat([best[rows], scores], dim=1)
        slots = torch.cat([chosen[rows], _slots(tile, pool).expand(scores.shape[0], -1)], dim=1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : best.shape[1]]
        best[rows], chosen[rows] = scores.gather(1, order), slots.gather(1, order)
    return chosen.masked_fill_((best == float("-inf")) | best.isnan().any(1, keepdim=True), -1)


def mla_selected(q: Tensor, pool: Tensor, chosen: Tensor, scale: float, out: Tensor) -> None:
    rank, latents = out.shape[-1], pool.view(-1, pool.shape[-1])
    block = max(1, _GATHERED // max(1, chosen.shape[1] * pool.shape[-1]))
    for first in range(0, q.shape[0], block):
        rows = slice(first, first + block)
        seen = latents[chosen[rows].clamp(min=0)]
        scores = _wide(q[rows] @ seen.transpose(1, 2)).mul_(scale)
        scores.masked_fill_((chosen[rows] < 0).unsqueeze(1), float("-inf"))
        out[rows] = scores.softmax(-1).to(q.dtype) @ seen[:, :, :rank]


def _slots(tile: Tile, pool: Tensor) -> Tensor:
    """Rows of the pool, one for each token of the tile."""
    page_tokens = pool.shape[1]
    pages = torch.from_numpy(tile.pages).long().to(pool.device)
    slots = (pages.unsqueeze(1) * page_tokens + torch.arange(page_tokens, device=pool.device)).flatten()
    return slots[tile.offset : tile.offset + tile.tokens]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
