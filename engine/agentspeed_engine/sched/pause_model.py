"""How long branches stay at rest, learnt from the pauses seen: what "furthest next use" is computed from.

One rule serves opposite workloads. For a branch that has rested `elapsed` seconds the law gives the mean residual
life E[X - elapsed | X > elapsed]. Regular pauses (agents in turn) make it fall with `elapsed`, so the branch that
came to rest last is used last; heavy-tailed pauses (tools that mostly answer at once and sometimes take minutes) make
it grow, so the branch that has rested longest is used last. Neither LRU nor MRU is built in: the data choose.
"""

from __future__ import annotations

import math
from typing import final

_SHORTEST = 1e-3
_BINS_PER_DOUBLING = 4
_BINS = 112
"""1 ms up to about 3 days: a longer pause counts as the longest one."""
_MEMORY = 1024.0
"""Observations remembered: beyond it every count is halved, so that a changed workload is learnt anew."""
_PRIOR_WEIGHT = 0.5
"""How many observations the prior is worth. It is scale free: a branch silent for t is expected back in about t."""
_PRIOR_SCALE = 1.0
_KERNEL = ((-1, 0.25), (0, 0.5), (1, 0.25))
"""A pause seen once makes pauses about a fifth shorter and longer likely too."""


@final
class PauseModel:
    """An empirical law of pauses over logarithmic bins, with a heavy-tailed prior for what was never seen."""

    __slots__ = ("_above", "_counts", "_dirty", "_mass")

    def __init__(self) -> None:
        self._counts = [0.0] * _BINS
        self._above = [0.0] * (_BINS + 1)
        self._mass = [0.0] * (_BINS + 1)
        self._dirty = False

    @property
    def observations(self) -> float:
        """Weight of what was observed, at most about a thousand."""
        self._refresh()
        return self._above[0]

    def observe(self, seconds: float) -> None:
        """Counts one finished pause."""
        middle = _bin(seconds)
        for offset, weight in _KERNEL:
            self._counts[min(max(middle + offset, 0), _BINS - 1)] += weight
        self._dirty = True
        if self.observations > _MEMORY:
            self._counts = [count / 2 for count in self._counts]
            self._dirty = True

    def residual(self, elapsed: float) -> float:
        """Expected seconds until next use of a branch that has rested `elapsed` seconds."""
        self._refresh()
        here = _bin(elapsed)
        above = self._above[here + 1]
        mass = self._mass[here + 1]
        # Of the bin that `elapsed` lies in, the part not yet passed; a law of few values must not jump at a bin's edge.
        upper = _UPPERS[here]
        part = self._counts[here] * min(1.0, max(0.0, (upper - elapsed) / (upper - _LOWERS[here])))
        seen = above + part
        seen_residual = mass - elapsed * above + part * max(0.0, upper - elapsed) / 2
        prior = _PRIOR_WEIGHT * _PRIOR_SCALE / (_PRIOR_SCALE + elapsed)
        return (seen_residual + prior * (elapsed + _PRIOR_SCALE)) / (seen + prior)

    def quantile(self, share: float) -> float | None:
        """The pause that `share` of those seen did not exceed; None before anything was seen."""
        self._refresh()
        total = self._above[0]
        if total == 0.0:
            return None
        for index in range(_BINS):
            if total - self._above[index + 1] >= share * total:
                return _centre(index)
        return _centre(_BINS - 1)

    def snapshot(self) -> tuple[float, ...]:
        """The counts, hashable."""
        return tuple(self._counts)

    @classmethod
    def restored(cls, snapshot: tuple[float, ...]) -> PauseModel:
        """The law that `snapshot` was taken of."""
        law = cls()
        law._counts = list(snapshot)
        law._dirty = True
        return law

    def _refresh(self) -> None:
        if not self._dirty:
            return
        above = mass = 0.0
        for index in range(_BINS - 1, -1, -1):
            above += self._counts[index]
            mass += self._counts[index] * _centre(index)
            self._above[index] = above
            self._mass[index] = mass
        self._dirty = False


def _bin(seconds: float) -> int:
    if seconds <= _SHORTEST:
        return 0
    return min(int(math.log2(seconds / _SHORTEST) * _BINS_PER_DOUBLING), _BINS - 1)


def _lower(index: int) -> float:
    return 0.0 if index == 0 else _SHORTEST * math.exp2(index / _BINS_PER_DOUBLING)


def _upper(index: int) -> float:
    return _SHORTEST * math.exp2((index + 1) / _BINS_PER_DOUBLING)


_LOWERS = tuple(_lower(index) for index in range(_BINS))
_UPPERS = tuple(_upper(index) for index in range(_BINS))
"""Asked for every branch at rest when rows must go."""


def _centre(index: int) -> float:
    return _SHORTEST * math.exp2((index + 0.5) / _BINS_PER_DOUBLING)
