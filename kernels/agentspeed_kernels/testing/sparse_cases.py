"""Cases of the ops of an indexer, for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from agentspeed_kernels.reference import sparse
from agentspeed_kernels.tiles import TilePlan
from agentspeed_kernels.workspace import Workspace

Pairs = list[tuple[Tensor, Tensor]]
TOP = 14
"""Fewer than the later rows of a case see, more than some of the first do."""


class Draws(Protocol):
    """Seeded tensors in a case's format and manner."""

    rows: int
    hidden: int
    rank: int
    rope: int
    heads: int
    kind: torch.dtype

    def tensor(self, *shape: int) -> Tensor: ...
    def weight(self, *shape: int) -> Tensor: ...
    def gain(self, width: int) -> Tensor: ...
    def angles(self) -> tuple[Tensor, Tensor]: ...
    def empty(self, *shape: int) -> Tensor: ...


def index_append(call: Callable[..., Any], draw: Draws) -> Pairs:
    """Of a key some coordinates turn, or all of them."""
    pairs: Pairs = []
    for width in (draw.rope + 6, draw.rope):
        raw, (cos, sin) = draw.tensor(draw.rows, width + 3)[:, 3:], draw.angles()
        gain, shift = draw.gain(width), draw.gain(width) - 1
        pool = draw.tensor(2 * draw.rows, width)
        slots = torch.randperm(2 * draw.rows, generator=torch.Generator().manual_seed(3))[: draw.rows]
        wanted = sparse.index_append(raw, gain, shift, 1e-6, cos, sin, slots, pool)
        call(raw, gain, shift, 1e-6, cos, sin, slots, pool)
        pairs.append((pool, wanted))
    return pairs


def index_select(call: Callable[..., Any], draw: Draws, tiles: TilePlan, pages: tuple[int, int]) -> Pairs:
    """`pages`: how many the tiles name, and the tokens of one. Equal scores may come by rounding, so what was chosen is
    compared by what it is worth; none is chosen twice."""
    wide = torch.float64 if draw.kind == torch.float64 else torch.float32
    pairs: Pairs = []
    for top in (TOP, 1000):
        q, x = draw.tensor(draw.rows, draw.heads, draw.rope), draw.tensor(draw.rows, draw.hidden)
        weight, pool = draw.weight(draw.heads, draw.hidden).to(wide), draw.tensor(*pages, draw.rope)
        got = call(q, x, weight, pool, tiles, top, Workspace())
        wanted = sparse.index_select(q, x, weight, pool, tiles, top)
        worth = sparse.index_scores(q, x, weight, pool, tiles)
        pairs.append(((got < 0).sum(1).double(), (wanted < 0).sum(1).double()))
        for row in range(draw.rows):
            found, best = (sorted(set(chosen[row].tolist()) - {-1}) for chosen in (got, wanted))
            values = [sorted(worth[row][slot] for slot in slots) for slots in (found, best)]
            pairs.append((torch.tensor(values[0]).double(), torch.tensor(values[1]).double()))
    return pairs


def mla_selected(call: Callable[..., Any], draw: Draws) -> Pairs:
    """Each row chooses for itself, some of them few."""
    pool, count = draw.tensor(7, 4, draw.rank + draw.rope), 11
    noise = torch.Generator().manual_seed(4)
    chosen = torch.stack([torch.randperm(28, generator=noise)[:count] for _ in range(draw.rows)])
    for row in range(draw.rows):
        chosen[row, 1 + row % count :] = -1
    q = draw.tensor(draw.rows, draw.heads, draw.rank + draw.rope)
    out, scale = draw.empty(draw.rows, draw.heads, draw.rank), (draw.rank + draw.rope) ** -0.5
    call(q, pool, chosen, scale, out)
    return [(out, sparse.mla_selected(q, pool, chosen, scale, draw.rank))]
