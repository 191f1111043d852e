"""What a `Sampling` may say: checked before a turn is queued, so that no step ever meets a bad value."""

from __future__ import annotations

import math

from agentspeed_engine.protocol.codes import EngineFault
from agentspeed_engine.protocol.messages import Sampling

MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-6
"""Below it a turn is greedy. The noise of two ids differs by 41 at most, so only logits within 41e-6 of the largest
could still be drawn: they differ by rounding alone."""


MAX_BIASED = 1024
MOST_BIAS = 100.0
MOST_PENALTY = 2.0
"""Of frequency and presence, either way; the two bounds above are those of OpenAI's API."""
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0


def counts_message(sampling: Sampling) -> bool:
    """Whether a penalty goes by the ids of the message so far."""
    return bool(sampling.frequency_penalty or sampling.presence_penalty)


def counts_log(sampling: Sampling) -> bool:
    """Whether a penalty goes by all ids so far."""
    return sampling.repetition_penalty != 1.0


def validate_sampling(sampling: Sampling, vocab_size: int) -> None:
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
    penalties = {"frequency_penalty": sampling.frequency_penalty, "presence_penalty": sampling.presence_penalty}
    for name, value in penalties.items():
        if not -MOST_PENALTY <= value <= MOST_PENALTY:
            raise _fault(name, value, f"between -{MOST_PENALTY:g} and {MOST_PENALTY:g}; 0 is none")
    if not LEAST_REPETITION <= sampling.repetition_penalty <= MOST_REPETITION:
        bounds = f"between {LEAST_REPETITION:g} and {MOST_REPETITION:g}; 1 is none"
        raise _fault("repetition_penalty", sampling.repetition_penalty, bounds)
    if len(sampling.logit_bias) > MAX_BIASED:
        raise EngineFault(
            "invalid_sampling",
            f"logit_bias names {len(sampling.logit_bias)} ids.",
            f"At most {MAX_BIASED}; a grammar (output=) allows and forbids any number.",
        )
    for number, bias in sampling.logit_bias:
        if not 0 <= number < vocab_size:
            raise _fault("an id of logit_bias", number, f"one of the vocabulary: at least 0 and below {vocab_size}")
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            raise _fault(f"the logit_bias of id {number}", bias, f"between -{MOST_BIAS:g} and {MOST_BIAS:g}")


def _fault(name: str, value: object, allowed: str) -> EngineFault:
    return EngineFault("invalid_sampling", f"{name} is {value}.", f"It must be {allowed}.")
