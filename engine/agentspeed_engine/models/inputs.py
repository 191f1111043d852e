"""What one forward pass is given: the step's tokens on one flat axis and the pieces of cached context they read.

Every pair (query, token it may see) is named by exactly one run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


def _none() -> Int64s:
    return np.zeros(0, dtype=np.int64)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A piece of the cached context, shared by the queries that read it."""

    pages: Int32s
    """[P], in token order; the last one may be partly filled."""
    start: int
    """Position of its first token."""
    tokens: int
    queries: Int32s
    """[Q] indices on the step's token axis."""
    causal: bool
    """True: a query at position p sees the tokens at positions <= p (a branch's own tail); False: all of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBatch:
    """One step, without any branch in it."""

    ids: Int64s
    """[T]"""
    positions: Int64s
    """[T]"""
    slots: Int64s
    """[T] pool row each token's latent is written to: page * page_tokens + offset. Written before any run is read."""
    runs: tuple[Run, ...]
    select: Int64s
    """[S] indices on the token axis whose logits are wanted; S may be 0."""
    tokens_per_rank: tuple[int, ...] = ()
    """T of every dp rank, where their steps are in lock-step; empty where this one is by itself."""
    hidden: Int64s = field(default_factory=_none)
    """[n] pool rows behind the last one of a branch, in a page it has begun to write: what a former owner of the page
    left there. Kernels that multiply hidden rows by zero need zeros in them before they read the page."""


def no_rows(tokens_per_rank: tuple[int, ...] = ()) -> FlatBatch:
    """A step of which this dp rank has no rows."""
    none = _none()
    return FlatBatch(ids=none, positions=none, slots=none, runs=(), select=none, tokens_per_rank=tokens_per_rank)
