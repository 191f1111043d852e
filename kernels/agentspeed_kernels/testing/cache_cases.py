"""Pools of the conformance suite, in the format of the activations or in 8 bits, and what of them is compared."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from agentspeed_kernels.fp8_cache import CacheRow
from agentspeed_kernels.signature import CacheFormat

Pairs = list[tuple[Tensor, Tensor]]
SLACK: dict[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""How far a number may be off before it is taken to 8 bits, relative to the largest of its head: some roundings of the
activations, or those of the float32 in which rows are scaled."""


class Draws(Protocol):
    """The formats of a case."""

    kind: torch.dtype
    cache: CacheFormat | None


def pool_of(numbers: Tensor, row: CacheRow, draw: Draws) -> Tensor:
    """[..., numbers] as a pool of the case has them."""
    return row.coded(numbers) if draw.cache == "fp8" else numbers


def appended(pool: Tensor, before: Tensor, wanted: Tensor, slots: Tensor, row: CacheRow, draw: Draws) -> Pairs:
    """`pool` and `before` [..., a row], the pool after rows were written to `slots` and before, beside what the
    definition gives, float64 [..., numbers].

    In 8 bits a written number is the nearest to what it stands for, give or take `SLACK`: where rounding puts that
    between two of them both are right. All other rows keep their bytes."""
    if draw.cache is None:
        return [(pool, wanted)]
    written, exact = (held.cpu().reshape(-1, held.shape[-1]) for held in (pool, wanted))
    slots, others = slots.cpu(), torch.ones(written.shape[0], dtype=torch.bool)
    others[slots] = False
    kept = (written[others].double(), before.cpu().reshape(written.shape)[others].double())
    got, exact = row.decoded(written[slots], torch.float64), exact[slots]
    near = ((got - exact).abs() <= _rounding(exact, row, SLACK[draw.kind])).double()
    return [kept, (got, got), (near, torch.ones_like(near))]


def _rounding(exact: Tensor, row: CacheRow, slack: float) -> Tensor:
    """The most by which each number may differ: half a step of its format where it stands, and the slack."""
    heads = exact[:, : row.heads * row.width].reshape(-1, row.heads, row.width)
    peak = heads.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak / 448, 1)
    places = (heads.abs() / scale).clamp(min=2.0**-6).log2().floor()
    numbers = 2 ** (places - 4) * scale + slack * peak
    plain = exact[:, row.heads * row.width :]
    turned = plain.abs() * 2.0**-8 + slack * plain.abs().amax(-1, keepdim=True) if row.plain else plain
    return torch.cat([numbers.flatten(1), turned], dim=1)
