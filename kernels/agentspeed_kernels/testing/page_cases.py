"""Cases of the ops that move pages of a pool, for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import latent_row
from agentspeed_kernels.reference import definitions
from agentspeed_kernels.signature import CacheFormat
from agentspeed_kernels.testing.cache_cases import pool_of

Pairs = list[tuple[Tensor, Tensor]]
Call = Callable[..., Any]


class Draws(Protocol):
    """Seeded tensors in a case's format and manner."""

    rows: int
    rank: int
    rope: int
    kind: torch.dtype
    cache: CacheFormat | None
    device: torch.device

    def tensor(self, *shape: int) -> Tensor: ...


def copy_rows(call: Call, draw: Draws) -> Pairs:
    pool = _layers(draw, 2 * draw.rows)
    moves = torch.tensor([[i, draw.rows + i, 1 + i % 4] for i in range(draw.rows)], dtype=torch.int32)
    wanted = definitions.copy_rows(pool.cpu(), moves)
    call(pool, moves.to(draw.device))
    return [(pool, wanted)]


def gather_pages(call: Call, draw: Draws) -> Pairs:
    pool, pages = _layers(draw, 2 * draw.rows), _some_pages(draw)
    # What must not survive.
    packed = torch.full_like(_layers(draw, draw.rows), 255 if draw.cache else float("nan"))
    call(pool, pages, packed)
    return [(packed, definitions.gather_pages(pool.cpu(), pages.cpu()))]


def scatter_pages(call: Call, draw: Draws) -> Pairs:
    pool, pages = _layers(draw, 2 * draw.rows), _some_pages(draw)
    packed = _layers(draw, draw.rows)
    wanted = definitions.scatter_pages(pool.cpu(), pages.cpu(), packed.cpu())
    call(pool, pages, packed)
    return [(pool, wanted)]


def _layers(draw: Draws, pages: int) -> Tensor:
    """A pool of two layers."""
    return pool_of(draw.tensor(2, pages, 4, draw.rank + draw.rope), latent_row(draw.rank, draw.rope), draw)


def _some_pages(draw: Draws) -> Tensor:
    order = torch.randperm(2 * draw.rows, generator=torch.Generator().manual_seed(3))[: draw.rows]
    return order.to(torch.int32).to(draw.device)
