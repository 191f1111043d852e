"""Whether joined steps may run: how far what they give may lie from what the modules give one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Bound:
    """How far rows may lie apart: the norm of a row's difference over the norm of the row."""

    middle: float
    """The median row."""
    worst: float
    """Any row."""
    why: str


BOUNDS: dict[torch.dtype, Bound] = {
    torch.float32: Bound(1e-3, 0.5, "sums of 6e-8 each in another order; a near tie of the router may fall otherwise"),
    torch.bfloat16: Bound(
        0.15, 0.5, "results of 8 bits are rounded in other places in every layer; near ties of the router turn"
    ),
}
"""By the format of the model. Results that have to do with each other by nothing but chance lie about 1.4 apart."""


def objection(what: str, got: Tensor, wanted: Tensor) -> str | None:
    """Why the step that gave `got` [T, N] may not take the place of the one that gave `wanted`; None: it may.

    Of rows that are not finite in `wanted` nothing is known, and nothing is said."""
    bound = BOUNDS[wanted.dtype]
    known = wanted.isfinite().all(1)
    got, wanted = got[known].double(), wanted[known].double()
    if not wanted.shape[0]:
        return None
    if not bool(got.isfinite().all()):
        return f"its {what} are not finite"
    least = torch.finfo(torch.float64).tiny
    apart = (got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=least)
    middle, worst = float(apart.median()), float(apart.max())
    if middle > bound.middle:
        return f"its {what} lie {middle:.2g} apart in the median row, and {bound.middle} is the most ({bound.why})"
    if worst > bound.worst:
        return f"its {what} lie {worst:.2g} apart in one row, and {bound.worst} is the most ({bound.why})"
    return None
