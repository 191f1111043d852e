"""What a `Sampling` may say: checked before a turn is queued, so that no step ever meets a bad value."""

from __future__ import annotations

import math

from agentspeed_engine.protocol.codes import EngineFault
from agentspeed_engine.protocol.messages import Sampling

MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-6
"""Below it a turn is greedy. The noise of two ids differs by 41 at most, so only logits within 41e-6 of the largest
could still be drawn: they differ by rounding alone."""


def validate_sampling(sampling: Sampling) -> None:
    """Raises `EngineFault` (invalid_sampling) naming the value and what it may be."""
    if not math.isfinite(sampling.temperature) or sampling.temperature < 0:
        raise _fault("temperature", sampling.temperature, "a finite number, 0 (greedy) or more")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise _fault("top_k", sampling.top_k, "None or at least 1")
    if not 0.0 < sampling.top_p <= 1.0:
        raise _fault("top_p", sampling.top_p, "above 0 and at most 1")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise _fault("min_p", sampling.min_p, "between 0 and 1")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise _fault("logprobs", sampling.logprobs, f"None or between 0 and {MAX_LOGPROBS}")


def _fault(name: str, value: object, allowed: str) -> EngineFault:
    return EngineFault("invalid_sampling", f"{name} is {value}.", f"It must be {allowed}.")
