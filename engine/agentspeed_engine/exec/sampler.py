"""Draws one token from one row of logits: Gumbel-max with counter-based noise (Gumbel 1954; Maddison et al. 2014).

Noise is a pure function of (draw key, position, vocabulary id). A branch's tokens therefore never depend on who shares
its batch, and a turn that is preempted and resumed draws what it would have drawn undisturbed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.penalties import Adjustment
from agentspeed_engine.protocol.messages import Sampling
from agentspeed_engine.protocol.sampling import LEAST_TEMPERATURE

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@final
@dataclass(frozen=True, slots=True)
class Draw:
    """The drawn id, and what was asked to be reported."""

    id: int
    logprob: float | None
    """Of the softmax of the unmodified logits, as `top` is."""
    top: tuple[tuple[int, float], ...]
    draw_logprob: float | None
    """Of the distribution that it was drawn from; 0 of a greedy draw."""


@final
class NotFinite(EngineFault):
    """The logits are no finite numbers: rows that the turn read may be at fault, which no other refusal says."""


def draw(
    logits: NDArray[Any],
    sampling: Sampling,
    key: tuple[int, int, int],
    position: int,
    allowed: NDArray[np.bool_] | None = None,
    adjustment: Adjustment | None = None,
) -> Draw:
    """`logits` [vocab] of any float dtype are not changed. `position` is that of the token drawn.

    `allowed` [vocab] masks by grammar; the caller makes sure that it allows at least one id. `adjustment`: what
    penalties and a bias make of the logits. Raises `EngineFault` for logits nothing can be drawn from: what a model
    with broken weights computes; `NotFinite` where they are no finite numbers."""
    if not np.isfinite(logits.max()):  # the largest is NaN when any is
        raise not_finite()
    adjusted = logits if adjustment is None else adjustment.of(logits)
    masked = adjusted if allowed is None else np.where(allowed, adjusted, -np.inf)
    chosen = int(masked.argmax())
    if masked[chosen] == -np.inf:
        raise ruled_out()
    draw_logprob = 0.0
    if sampling.temperature >= LEAST_TEMPERATURE:
        exact = masked.astype(np.float64)
        with np.errstate(over="ignore"):  # what is that far below the largest has no probability
            scaled = (exact - exact[chosen]) / sampling.temperature
        candidates = _candidates(scaled, sampling)
        scores = scaled[candidates] + gumbel(key, position, candidates)
        chosen = int(candidates[int(scores.argmax())])
        if sampling.logprobs is not None:
            draw_logprob = float(scaled[chosen]) - _log_sum_exp(scaled[candidates])
    if sampling.logprobs is None:
        return Draw(chosen, None, (), None)
    exact = logits.astype(np.float64)
    logprobs = exact - _log_sum_exp(exact)
    count = min(sampling.logprobs, len(logits))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        edge = np.partition(logprobs, len(logprobs) - count)[len(logprobs) - count]
        best = np.flatnonzero(logprobs >= edge)  # all that tie at the edge, so that the lowest ids are the ones taken
        best = best[np.lexsort((best, -logprobs[best]))][:count]
        top = tuple((int(number), float(logprobs[number])) for number in best)
    return Draw(chosen, float(logprobs[chosen]), top, draw_logprob)


def not_finite() -> NotFinite:
    """Of logits of which the largest is no finite number: NaN when any is NaN."""
    return NotFinite(
        "bad_weights",
        "The model computed logits that are no finite numbers.",
        "Its weights are damaged, or too large for the dtype: check them, or use float32.",
    )


def ruled_out() -> EngineFault:
    """Of logits that are minus infinity wherever the grammar allows an id."""
    return EngineFault(
        "bad_weights",
        "The model rules out every id that the grammar allows.",
        "Its logits there are minus infinity: check its weights, or loosen the grammar.",
    )


def gumbel(key: tuple[int, int, int], position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise, one value per vocabulary id (splitmix64 as the counter-based generator)."""
    with np.errstate(over="ignore"):
        state = np.zeros(1, dtype=np.uint64)
        for part in (*key, position):
            state = _mix(state + np.uint64(part & 0xFFFFFFFFFFFFFFFF) * _GOLDEN + _GOLDEN)
        bits = _mix(state + (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    # 53 bits at the centres of their cells: never 0 and never 1, so both logarithms are finite.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def _candidates(scaled: NDArray[np.float64], sampling: Sampling) -> NDArray[np.int64]:
    """Ids that survive top-k, then top-p, then min-p; ties at the edge are kept, so that order cannot matter."""
    ids = np.flatnonzero(np.isfinite(scaled))
    if sampling.top_k is not None and sampling.top_k < len(ids):
        edge = np.partition(scaled[ids], len(ids) - sampling.top_k)[len(ids) - sampling.top_k]
        ids = ids[scaled[ids] >= edge]
    if sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        return ids
    values = scaled[ids]
    probabilities = np.exp(values - values.max())
    probabilities /= probabilities.sum()
    keep = probabilities >= sampling.min_p * probabilities.max()
    if sampling.top_p < 1.0:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        edge = probabilities[order][before < sampling.top_p].min()
        keep &= probabilities >= edge
    kept: NDArray[np.int64] = ids[keep]
    return kept


def _log_sum_exp(logits: NDArray[np.float64]) -> float:
    peak = float(logits.max())
    return peak + float(np.log(np.exp(logits - peak).sum()))
