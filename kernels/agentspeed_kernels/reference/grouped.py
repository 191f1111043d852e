"""What the ops of grouped-query attention mean, written to be read; inputs are taken to float64 first."""

from __future__ import annotations

import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import heads_in, heads_row
from agentspeed_kernels.reference.definitions import numbers_of, rms_norm, rope, seen, shares
from agentspeed_kernels.tiles import TilePlan


def qkv_append(
    qkv: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    heads: int,
    key_pool: Tensor,
    value_pool: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Queries, and the pools after keys and values are written; these are not changed themselves. Of pools in 8 bits
    what they stand for, and the rows as they are before they are taken to 8 bits.)

    Each head of queries and keys is normed by its gain, if there is one, and turned."""
    groups = (qkv.shape[1] - heads) // 2
    q, keys, values = torch.split(qkv.double(), [heads, groups, groups], dim=1)
    q = rope(q if q_gain is None else rms_norm(q, q_gain, eps), cos, sin)
    keys = rope(keys if k_gain is None else rms_norm(keys, k_gain, eps), cos, sin)
    held = heads_row(groups, qkv.shape[2])
    after = [numbers_of(pool, held).clone() for pool in (key_pool, value_pool)]
    for pool, rows in zip(after, (keys, values), strict=True):
        pool.view(-1, pool.shape[-1])[slots] = rows.flatten(1)
    return q, after[0], after[1]


def gqa(q: Tensor, key_pool: Tensor, value_pool: Tensor, tiles: TilePlan, scale: float, out: Tensor) -> Tensor:
    """`out` after softmax attention of each row over all tokens it sees; head h reads head h // (H / G) of the pools.

    Rows that no tile names keep what `out` has.
    """
    after, (_, heads, width) = out.double().clone(), q.shape
    key_pool, value_pool = (
        numbers_of(pool, heads_in(pool.shape[-1], width)) if pool.dtype == torch.uint8 else pool.double()
        for pool in (key_pool, value_pool)
    )
    places, often = seen(tiles, q.shape[0], key_pool.shape[1])
    # Each head of the pools beside every head of queries that reads it.
    groups = key_pool.shape[2] // width
    keys, values = (
        pool.flatten(0, 1)[places].view(-1, groups, width).repeat_interleave(heads // groups, 1)
        for pool in (key_pool, value_pool)
    )
    weights = shares(scale * torch.einsum("thw,chw->thc", q.double(), keys), often)
    named = often.any(1)
    after[named] = torch.einsum("thc,chw->thw", weights, values)[named]
    return after
