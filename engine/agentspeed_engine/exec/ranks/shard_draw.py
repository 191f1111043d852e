"""Draws from logits whose vocabulary is cut over ranks, without gathering them: every rank tells a few numbers of its
piece, hears those of all, and all come to the same id.

Noise is a function of the vocabulary id (`exec.sampler`), so the best of every rank's best is what one process draws.
Edges of top-k and top-p lie mostly among the few highest candidates of every rank, which are told in one round. Where
they do not, they are found by digits: a round tells how many candidates, or how much probability, each value of a digit
has, so what is sent does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.exec.sampler import Draw, gumbel, not_finite, ruled_out
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_engine.protocol.sampling import LEAST_TEMPERATURE

Doubles: TypeAlias = NDArray[np.float64]
T = TypeVar("T")
Rounds: TypeAlias = Generator[Doubles, Doubles, T]
"""Yields what this rank tells, is sent what all told ([ranks, ...]), and returns what came of it, equal on all."""

_DIGITS = ((53, 11), (42, 11), (31, 11), (20, 11), (9, 11), (0, 9))
"""(Shift, bits) of the digits of a 64-bit key, from the highest on."""
_SIGN = np.uint64(1 << 63)
HIGHEST = 256
"""Candidates of each rank that are told before anything is searched by digits."""
_NOBODY = -1.0
"""In place of an id."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ShardSample:
    """One token to be drawn, as a rank needs to know it."""

    sampling: Sampling
    key: tuple[int, int, int]
    position: int
    allowed: NDArray[np.bool_] | None
    """[ids of this rank]; None: all."""
    adjustment: Adjustment | None
    """Of the logits of this rank, whose first id it calls 0; None: they stay as they are."""


def together(rounds: Rounds[T], gather: Callable[[Doubles], Doubles]) -> T:
    """Carries rounds out. `gather`: gives [ranks, ...] for what this rank tells."""
    try:
        told = next(rounds)
        while True:
            told = rounds.send(gather(told))
    except StopIteration as end:
        result: T = end.value
        return result


def draw_shards(logits: NDArray[Any], first: int, samples: Sequence[ShardSample]) -> Rounds[list[Draw | EngineFault]]:
    """`logits` [S, ids of this rank] of any float dtype, the first of them being id `first`; one row a sample.

    One round where all are greedy, one more where some are not, and one for each of top-k and top-p, or seven where an
    edge lies below the highest candidates."""
    rows = [_Row(row, first, sample) for row, sample in zip(logits, samples, strict=True)]
    most = max((row.asked for row in rows), default=0)
    told = np.full((len(rows), 5 + 2 * most), _NOBODY)
    for line, row in zip(told, rows, strict=True):
        row.tell(line)
    heard = yield told
    for index, row in enumerate(rows):
        row.hear(heard[:, index])
    hot = [row for row in rows if row.hot]
    if hot:
        yield from _truncate(hot)
        finals = np.array([row.best() for row in hot])
        heard = yield finals
        for index, row in enumerate(hot):
            row.settle(heard[:, index])
    return [row.outcome() for row in rows]


def _truncate(rows: list[_Row]) -> Rounds[None]:
    """Top-k first, then top-p of what is left, then min-p; ties at an edge are kept, as in one process."""
    counted = [row for row in rows if row.sampling.top_k is not None]
    if counted:
        edges = yield from _edges([_Search(row.scaled, None, float(row.sampling.top_k or 0), 0.0) for row in counted])
        for row, edge in zip(counted, edges, strict=True):
            row.keep(row.scaled >= edge)
    weighed = [row for row in rows if row.sampling.top_p < 1.0]
    if weighed:
        searches = [_Search(row.scaled, np.exp(row.scaled), 0.0, row.sampling.top_p) for row in weighed]
        edges = yield from _edges(searches)
        for row, edge in zip(weighed, edges, strict=True):
            row.floor = edge
    for row in rows:
        if row.sampling.min_p > 0.0:
            row.keep((row.scaled >= row.floor) & (np.exp(row.scaled) >= row.sampling.min_p))
        else:
            row.keep(row.scaled >= row.floor)


@final
class _Row:
    """One sample on this rank."""

    def __init__(self, logits: NDArray[Any], first: int, sample: ShardSample) -> None:
        self._logits, self._first, self._sample = logits, first, sample
        self.sampling = sample.sampling
        self.asked = sample.sampling.logprobs or 0
        self._fault: EngineFault | None = None
        adjusted = logits if sample.adjustment is None else sample.adjustment.of(logits)
        self._masked = adjusted if sample.allowed is None else np.where(sample.allowed, adjusted, -np.inf)
        self.floor = -np.inf
        self._ids = np.zeros(0, np.int64)
        self.scaled: Doubles = np.zeros(0)
        """Of the candidates that are left here: logits over temperature, 0 being the largest anywhere."""
        self._chosen, self._logit, self._draw_logprob = 0, 0.0, 0.0
        self._log_sum = 0.0
        self._top: tuple[tuple[int, float], ...] = ()

    @property
    def hot(self) -> bool:
        return self._fault is None and self.sampling.temperature >= LEAST_TEMPERATURE

    def tell(self, line: Doubles) -> None:
        """(largest logit, sum of exponentials below it, largest that may be drawn, its id, its logit as it was), then
        (logit, id) of the likeliest."""
        largest = self._logits.max()
        best = int(self._masked.argmax())
        line[0] = largest
        if self.sampling.logprobs is not None and np.isfinite(largest):
            line[1] = np.exp(self._logits.astype(np.float64) - float(largest)).sum()
        else:
            line[1] = 0.0
        line[2:5] = self._masked[best], self._first + best, self._logits[best]
        count = min(self.asked, len(self._logits))
        if count and not np.isnan(largest):
            edge = np.partition(self._logits, len(self._logits) - count)[len(self._logits) - count]
            ids = np.flatnonzero(self._logits >= edge)
            ids = ids[np.lexsort((ids, -self._logits[ids]))][:count]
            line[5 : 5 + 2 * count : 2] = self._logits[ids]
            line[6 : 6 + 2 * count : 2] = self._first + ids

    def hear(self, told: Doubles) -> None:
        """What every rank told, [ranks, ...]."""
        largest = float(told[:, 0].max())
        if not np.isfinite(largest):
            self._fault = not_finite()
            return
        best = float(told[:, 2].max())
        if best == -np.inf:
            self._fault = ruled_out()
            return
        at = _lowest(told[:, 2] == best, told[:, 3])
        self._chosen, self._logit = int(told[at, 3]), float(told[at, 4])
        if self.sampling.logprobs is not None:
            present = np.isfinite(told[:, 0])  # a rank may hold nothing but minus infinity
            sums = told[present, 1] * np.exp(told[present, 0] - largest)
            self._log_sum = largest + float(np.log(sums.sum()))
            pairs = told[:, 5:].reshape(-1, 2)
            pairs = pairs[pairs[:, 1] != _NOBODY]
            pairs = pairs[np.lexsort((pairs[:, 1], -pairs[:, 0]))][: self.asked]
            self._top = tuple((int(number), float(logit - self._log_sum)) for logit, number in pairs)
        if self.hot:
            exact = self._masked.astype(np.float64)
            with np.errstate(over="ignore"):  # what is that far below the largest has no probability
                scaled = (exact - best) / self.sampling.temperature
            self._ids = np.flatnonzero(np.isfinite(scaled))
            self.scaled = scaled[self._ids]

    def keep(self, which: NDArray[np.bool_]) -> None:
        self._ids, self.scaled = self._ids[which], self.scaled[which]

    def best(self) -> tuple[float, ...]:
        """(score, id, logit as it was, logit over temperature, sum of exponentials) of this rank's candidates."""
        if not len(self._ids):
            return -np.inf, _NOBODY, 0.0, 0.0, 0.0
        ids = self._ids + self._first
        scores = self.scaled + gumbel(self._sample.key, self._sample.position, ids)
        at = int(scores.argmax())
        total = float(np.exp(self.scaled).sum()) if self.sampling.logprobs is not None else 0.0
        return float(scores[at]), float(ids[at]), float(self._logits[self._ids[at]]), float(self.scaled[at]), total

    def settle(self, told: Doubles) -> None:
        at = _lowest(told[:, 0] == told[:, 0].max(), told[:, 1])
        self._chosen, self._logit = int(told[at, 1]), float(told[at, 2])
        if self.sampling.logprobs is not None:
            self._draw_logprob = float(told[at, 3] - np.log(told[:, 4].sum()))

    def outcome(self) -> Draw | EngineFault:
        if self._fault is not None:
            return self._fault
        if self.sampling.logprobs is None:
            return Draw(self._chosen, None, (), None)
        return Draw(self._chosen, self._logit - self._log_sum, self._top, self._draw_logprob)


def _lowest(among: NDArray[np.bool_], ids: Doubles) -> int:
    """Of the ranks in question the one with the lowest id, which one process would find first."""
    return int(np.where(among, ids, np.inf).argmin())


@final
class _Search:
    """For the lowest value above which there is less than a target: of candidates, or of their weights."""

    def __init__(self, values: Doubles, weights: Doubles | None, target: float, share: float) -> None:
        """`share`: of the sum of all ranks' weights, instead of a target."""
        self._weights = weights
        self._values, self._target, self._share = values, target, share
        self._keys = np.zeros(0, np.uint64)
        self._found = np.uint64(0)
        self.edge: float | None = None

    def tell_highest(self, line: Doubles) -> None:
        """(How many there are, the sum of their weights), then the highest."""
        count = len(self._values)
        highest = self._values if count <= HIGHEST else np.partition(self._values, count - HIGHEST)[-HIGHEST:]
        line[0], line[1] = count, count if self._weights is None else self._weights.sum()
        line[2 : 2 + len(highest)] = highest

    def hear_highest(self, told: Doubles) -> None:
        """What every rank told. Of what is above the lowest that was told by a rank with more, nothing is missing."""
        if self._share:
            self._target, self._share = self._share * float(told[:, 1].sum()), 0.0
        cut = max((float(rank[2:].min()) for rank in told if rank[0] > HIGHEST), default=-np.inf)
        values = told[:, 2:].ravel()
        values = np.sort(values[(values > cut) & np.isfinite(values)])[::-1]
        weights = np.ones(len(values)) if self._weights is None else np.exp(values)
        reached = np.flatnonzero(np.cumsum(weights) >= self._target)
        if len(reached):
            self.edge = float(values[reached[0]])
        elif cut == -np.inf:  # all there are
            self.edge = float(values[-1])

    def begin(self) -> None:
        """By digits of keys that are in the order of the values."""
        bits = self._values.view(np.uint64)
        self._keys = np.where(bits & _SIGN, ~bits, bits | _SIGN)

    def tell(self, line: Doubles, shift: int, bits: int) -> None:
        digits = (self._keys >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        line[: 1 << bits] = np.bincount(digits.astype(np.intp), self._weights, minlength=1 << bits)

    def hear(self, line: Doubles, shift: int, bits: int) -> None:
        held = line[: 1 << bits]
        above = np.append(np.cumsum(held[:0:-1])[::-1], 0.0)
        there = np.flatnonzero((held > 0) & (above < self._target))
        digit = int(there[0]) if len(there) else int(np.flatnonzero(held)[-1])
        self._target -= float(above[digit])
        self._found |= np.uint64(digit << shift)
        mine = (self._keys >> np.uint64(shift)) & np.uint64((1 << bits) - 1) == digit
        self._keys = self._keys[mine]
        if self._weights is not None:
            self._weights = self._weights[mine]

    def settle(self) -> None:
        """After the last digit."""
        bits = self._found ^ _SIGN if self._found & _SIGN else ~self._found
        self.edge = float(np.array(bits, np.uint64).view(np.float64))


def _edges(searches: list[_Search]) -> Rounds[list[float]]:
    told = np.full((len(searches), 2 + HIGHEST), -np.inf)
    for line, search in zip(told, searches, strict=True):
        search.tell_highest(line)
    every = yield told
    for index, search in enumerate(searches):
        search.hear_highest(every[:, index])
    deep = [search for search in searches if search.edge is None]
    for search in deep:
        search.begin()
    for shift, bits in _DIGITS if deep else ():
        told = np.zeros((len(deep), 1 << bits))
        for line, search in zip(told, deep, strict=True):
            search.tell(line, shift, bits)
        heard = (yield told).sum(0)
        for line, search in zip(heard, deep, strict=True):
            search.hear(line, shift, bits)
    for search in deep:
        search.settle()
    return [-np.inf if search.edge is None else search.edge for search in searches]
