"""What the ops of an indexer and of attention to chosen tokens mean; inputs are taken to float64 first.

After DeepSeek-V3.2-Exp (DeepSeek-AI 2025), section 2.1. Positive factors of its scores change no order and are left
out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.reference.definitions import rope
from agentspeed_kernels.tiles import TilePlan


def index_append(
    raw: Tensor, gain: Tensor, shift: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor
) -> Tensor:
    """The pool after normed keys, their first coordinates turned, are written; it is not changed itself."""
    raw = raw.double()
    centred = raw - raw.mean(-1, keepdim=True)
    row = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * gain.double() + shift.double()
    turned = 2 * cos.shape[-1]
    after = pool.double().clone()
    after[slots] = torch.cat([rope(row[:, :turned], cos, sin), row[:, turned:]], dim=-1)
    return after


def index_scores(q: Tensor, x: Tensor, weight: Tensor, pool: Tensor, tiles: TilePlan) -> dict[int, dict[int, float]]:
    """Of each row: what every row of the pool that it sees is worth, in the order of positions."""
    keys, shares = pool.double().reshape(-1, pool.shape[-1]), x.double() @ weight.double().T
    found: dict[int, dict[int, float]] = {}
    for row, slots in slots_by_row(tiles, pool.shape[1]).items():
        heads = (keys[torch.tensor(slots)] @ q[row].double().T).relu()
        found[row] = dict(zip(slots, (heads @ shares[row]).tolist(), strict=True))
    return found


def index_select(q: Tensor, x: Tensor, weight: Tensor, pool: Tensor, tiles: TilePlan, top: int) -> Tensor:
    """[T, n]: the `top` rows of the pool that are worth most, the earlier position first among equals, then -1."""
    scores = index_scores(q, x, weight, pool, tiles)
    width = min(top, max(map(len, scores.values()), default=0))
    chosen = torch.full((q.shape[0], width), -1, dtype=torch.int64)
    for row, held in scores.items():
        ranked = sorted(held, key=lambda slot, held=held: -held[slot])[:width]  # type: ignore[misc]
        chosen[row, : len(ranked)] = torch.tensor(ranked)
    return chosen


def mla_selected(q: Tensor, pool: Tensor, chosen: Tensor, scale: float, rank: int) -> Tensor:
    """Softmax attention of each row over the latents it chose; it chose one at least."""
    out = torch.zeros(q.shape[0], q.shape[1], rank, dtype=torch.float64)
    latents = pool.double().reshape(-1, pool.shape[-1])
    for row, slots in enumerate(chosen):
        seen = latents[slots[slots >= 0]]
        out[row] = (scale * (q[row].double() @ seen.T)).softmax(-1) @ seen[:, :rank]
    return out


def slots_by_row(tiles: TilePlan, page_tokens: int) -> dict[int, list[int]]:
    """The rows of the pool that each row sees, in the order of positions."""
    found: dict[int, list[int]] = {}
    for tile in sorted(tiles.tiles, key=lambda tile: tile.start):
        slots = [int(page) * page_tokens + at for page in tile.pages for at in range(page_tokens)]
        slots = slots[tile.offset : tile.offset + tile.tokens]
        for row, visible in zip(tile.rows.tolist(), tile.visible.tolist(), strict=True):
            found.setdefault(row, []).extend(slots[:visible])
    return found
