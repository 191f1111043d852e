"""What the ops of grouped-query attention mean, written to be read; inputs are taken to float64 first."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.reference.definitions import latents_by_row, rope
from agentspeed_kernels.tiles import TilePlan


def kv_append(
    keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, key_pool: Tensor, value_pool: Tensor
) -> tuple[Tensor, Tensor]:
    """The pools after turned keys and values are written; they are not changed themselves."""
    after = [pool.double().clone() for pool in (key_pool, value_pool)]
    for pool, rows in zip(after, (rope(keys, cos, sin), values.double()), strict=True):
        pool.view(-1, pool.shape[-1])[slots] = rows.flatten(1)
    return after[0], after[1]


def gqa(q: Tensor, key_pool: Tensor, value_pool: Tensor, tiles: TilePlan, scale: float, out: Tensor) -> Tensor:
    """`out` after softmax attention of each row over all tokens it sees; head h reads head h // (H / G) of the pools.

    Rows that no tile names keep what `out` has.
    """
    after, (_, heads, width) = out.double().clone(), q.shape
    values_seen = latents_by_row(value_pool, tiles)
    for row, seen in latents_by_row(key_pool, tiles).items():
        keys, values = (held.view(held.shape[0], -1, width) for held in (seen, values_seen[row]))
        # Each head of the pools beside every head of queries that reads it.
        keys, values = (held.repeat_interleave(heads // held.shape[1], 1) for held in (keys, values))
        scores = scale * torch.einsum("hw,chw->hc", q[row].double(), keys)
        after[row] = torch.einsum("hc,chw->hw", scores.softmax(-1), values)
    return after
