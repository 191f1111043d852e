"""Rows on their way to the experts that they chose and back: what an all-to-all carries, and how it is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """One rank's rows between a router and the sum of what its experts gave."""

    x: Tensor
    """[N, D] rows: those of this rank, then those sent here, then what the experts made of them."""
    places: Tensor
    """[N, top] int64: the expert copies each row chose."""
    weights: Tensor
    """[N, top]"""
    sends: tuple[Tensor, ...]
    """For every rank of the axis, in order: indices of the home rows that go there, each once."""
    base: Tensor | None
    """[home, D] that the experts' results are added to; None: zeros."""
    home: int
    """Rows of this rank."""
    counts: tuple[int, ...] = ()
    """Rows that came from every rank of the axis, once they are sent."""


Rows = tuple[Tensor, Tensor, Tensor]
"""(x, places, weights) of rows that are sent together."""


def outgoing(value: Routed) -> list[Rows]:
    """What goes to every rank of the axis."""
    return [(value.x[index], value.places[index], value.weights[index]) for index in value.sends]


def received(value: Routed, arrived: Sequence[Rows]) -> Routed:
    """`arrived` is from every rank of the axis, in order."""
    x, places, weights = (torch.cat(parts) for parts in zip(*arrived, strict=True))
    return replace(value, x=x, places=places, weights=weights, counts=tuple(len(rows[0]) for rows in arrived))


def returning(value: Routed) -> list[Tensor]:
    """What goes back to every rank of the axis."""
    return list(torch.split(value.x, list(value.counts)))


def combined(value: Routed, arrived: Sequence[Tensor]) -> Tensor:
    """[home, D]: every row's base and what came back for it, in the order of the ranks."""
    x = value.x
    total = x.new_zeros(value.home, x.shape[1]) if value.base is None else value.base.clone()
    for index, rows in zip(value.sends, arrived, strict=True):
        total[index] += rows
    return total
