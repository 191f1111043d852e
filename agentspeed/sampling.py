"""How a turn draws its tokens, as users write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The engine refuses values out of range with `InvalidSampling`. Temperature 0 is greedy.

    What the model says of the next token is changed in this order: `repetition_penalty`; the other two penalties and
    `logit_bias`; the grammar of tools and output; `temperature`, `top_k`, `top_p`, `min_p`.

    Draws are reproducible: noise is keyed by (seed, turn, child, position, vocabulary id), so siblings and retries
    differ from each other, and `seed=` at a call repeats exactly."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    """From -2 to 2: taken from a token's logit for each time that it stands in the message so far, also in what earlier
    turns wrote of it."""
    presence_penalty: float = 0.0
    """From -2 to 2: taken once from the logit of a token that stands there."""
    repetition_penalty: float = 1.0
    """From 0.01 to 100: logits of tokens that stand anywhere in the session so far, template and tool results included,
    are divided by it where they are above 0 and multiplied where they are below (Keskar et al. 2019)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    """By vocabulary id, from -100 to 100: added to the logit; 1024 ids at most."""

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, Mapping):  # what is none is refused where it is used
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
