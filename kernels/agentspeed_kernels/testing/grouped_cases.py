"""Cases of the ops of grouped-query attention, for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import heads_row
from agentspeed_kernels.reference import grouped
from agentspeed_kernels.signature import CacheFormat
from agentspeed_kernels.testing.cache_cases import appended, pool_of
from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace

Pairs = list[tuple[Tensor, Tensor]]
Planned = Callable[[int, int, int], Any]
"""(Heads of queries, heads of keys and values, their width) to the plan that a kernel takes."""


class Draws(Protocol):
    """Seeded tensors in a case's format and manner."""

    rows: int
    rope: int
    heads: int
    device: torch.device
    kind: torch.dtype
    cache: CacheFormat | None

    def tensor(self, *shape: int) -> Tensor: ...
    def gain(self, width: int) -> Tensor: ...
    def angles(self) -> tuple[Tensor, Tensor]: ...
    def empty(self, *shape: int) -> Tensor: ...


def qkv_append(call: Callable[..., Any], draw: Draws) -> Pairs:
    """Queries and keys with norms of their heads, with one of them, and without."""
    width, groups, heads = draw.rope, draw.heads, 2 * draw.heads
    qkv = draw.tensor(draw.rows, heads + 2 * groups + 1, width)[:, 1:]
    (cos, sin), order = draw.angles(), torch.randperm(120, generator=torch.Generator().manual_seed(3))
    slots = order[: draw.rows].to(draw.device)
    row = heads_row(groups, width)
    pairs: Pairs = []
    for q_gain, k_gain in ((None, None), (draw.gain(width), draw.gain(width)), (None, draw.gain(width))):
        pools = [pool_of(draw.empty(3, 40, groups * width).nan_to_num_(0.5), row, draw) for _ in range(2)]
        q, given = draw.empty(draw.rows, heads, width), (qkv, q_gain, k_gain, 1e-6, cos, sin, slots)
        wanted, *after = _meant(grouped.qkv_append, *given, heads, *pools)
        before = [pool.clone() for pool in pools]
        call(*given, q, *pools)
        pairs.append((q, wanted))
        for of_pool in zip(pools, before, after, strict=True):
            pairs += appended(*of_pool, slots, row, draw)
    return pairs


def gqa(call: Callable[..., Any], draw: Draws, attentions: Sequence[tuple[Tensor, TilePlan, Planned]]) -> Pairs:
    """Each head of the pools by one head of queries, by several, and by all; in long pages by several.

    `attentions`: pools of latents, what is attended to of them, and the plan of that for a kernel."""
    pairs: Pairs = []
    several = (2 * draw.heads, draw.heads)
    small, *long = attentions
    shapes = product([small], ((draw.heads, draw.heads), several, (draw.heads, 1)))
    for (latents, tiles, planned), (heads, groups) in (*shapes, *product(long, (several,))):
        width = 2 * draw.rope
        # What no token was written to is no number in the pools either.
        unwritten = latents[..., :1].isnan()
        key_pool, value_pool = (
            pool_of(
                draw.tensor(*latents.shape[:2], groups * width).masked_fill_(unwritten, float("nan")),
                heads_row(groups, width),
                draw,
            )
            for _ in range(2)
        )
        q = draw.tensor(draw.rows, heads + 1, width)[:, :heads]
        out = draw.tensor(draw.rows, heads, width)
        wanted = _meant(grouped.gqa, q, key_pool, value_pool, tiles, width**-0.5, out)
        plan = planned(heads, groups, width)
        call(q, key_pool, value_pool, plan, width**-0.5, Workspace(draw.device), out)
        pairs.append((out, wanted))
    return pairs


def _meant(definition: Callable[..., Any], *given: Any) -> Any:
    """What a definition gives for arguments that may lie on a device."""
    return definition(*(one.cpu() if isinstance(one, Tensor) else one for one in given))
