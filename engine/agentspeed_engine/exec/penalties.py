"""What penalties and a bias make of a row of logits: which ids they touch, and by how much, from what was drawn before.

The counts are of the token log and of nothing else: a turn that was preempted, or put back by a live fork, is penalised
as one that ran undisturbed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.protocol.sampling import counts_log, counts_message


@final
@dataclass(frozen=True, slots=True, eq=False)
class Adjustment:
    """Of one row. A logit l becomes (l / scale where l > 0, else l * scale) + shift."""

    ids: NDArray[np.int64]
    """[N], each once."""
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]

    def of(self, logits: NDArray[Any]) -> NDArray[Any]:
        """[vocab] in float32, or float64 where `logits` are, which are not changed. What is minus infinity stays."""
        adjusted = logits.astype(np.promote_types(logits.dtype, np.float32))
        held = adjusted[self.ids]
        most = np.finfo(adjusted.dtype).max
        with np.errstate(over="ignore"):
            changed = np.where(held > 0, held / self.scale, held * self.scale) + self.shift
        adjusted[self.ids] = np.where(np.isinf(held), held, np.clip(changed, -most, most))
        return adjusted


@final
class Penalties:
    """Of one turn whose sampling has penalties or a bias."""

    def __init__(self, spec: TurnSpec, vocab_size: int) -> None:
        self._sampling = spec.sampling
        self._counts: NDArray[np.int64] | None = None
        """[vocab] how often each id stands in the message."""
        self._before: NDArray[np.bool_] | None = None
        """[vocab] the ids of the log before the turn."""
        if counts_message(spec.sampling) or counts_log(spec.sampling):
            self._counts = np.bincount(_ids(spec.counted), minlength=vocab_size)
        if counts_log(spec.sampling):
            self._before = np.zeros(vocab_size, np.bool_)
            self._before[_ids(spec.seen)] = True
        self._bias = np.zeros(vocab_size, np.float64)
        for number, bias in spec.sampling.logit_bias:
            self._bias[number] = bias
        self._biased = self._bias != 0
        self._drawn: list[int] = []
        """By this turn, as far as the latest adjustment saw."""

    def at(self, earlier: int) -> Adjustment:
        """For the draw after the turn's first `earlier` ids."""
        if self._counts is None:
            ids = np.flatnonzero(self._biased)
            return Adjustment(ids, np.ones(len(ids), np.float32), self._bias[ids].astype(np.float32))
        while len(self._drawn) > earlier:  # draws that the core did not take: a live fork or a preemption
            self._counts[self._drawn.pop()] -= 1
        stands = self._counts > 0
        repeated = stands if self._before is None else stands | self._before
        ids = np.flatnonzero(repeated | self._biased)
        rule = self._sampling
        scale = np.where(repeated[ids], rule.repetition_penalty, 1.0).astype(np.float32)
        shift = self._bias[ids] - rule.frequency_penalty * self._counts[ids] - rule.presence_penalty * stands[ids]
        return Adjustment(ids, scale, shift.astype(np.float32))

    def drew(self, token: int) -> None:
        """The id drawn after the latest adjustment."""
        if self._counts is not None:
            self._drawn.append(token)
            self._counts[token] += 1


def penalises(spec: TurnSpec) -> bool:
    """Whether the turn has any."""
    return counts_message(spec.sampling) or counts_log(spec.sampling) or bool(spec.sampling.logit_bias)


def _ids(packed: bytes) -> NDArray[np.int64]:
    """Of ids as a token log packs them."""
    return np.frombuffer(packed, np.uint32).astype(np.int64)
