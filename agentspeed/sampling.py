"""How a turn draws its tokens, as users write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The engine refuses values out of range with `InvalidSampling`. Temperature 0 is greedy.

    Draws are reproducible: noise is keyed by (seed, turn, child, position, vocabulary id), so siblings and retries
    differ from each other, and `seed=` at a call repeats exactly."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
