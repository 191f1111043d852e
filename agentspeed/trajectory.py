"""A session's tokens as training data: exact ids, who made them, and how likely they were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

if TYPE_CHECKING:
    from agentspeed.chat.token_log import TokenLog


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Three sequences of the same length."""

    ids: tuple[int, ...]
    made: tuple[bool, ...]
    """True for ids the model drew, the end ids included; False for prompts, tool results and template ids."""
    logprobs: tuple[float, ...]
    """Natural logarithms for drawn ids of sessions with `record_logprobs`; NaN elsewhere."""

    @classmethod
    def of(cls, mirror: TokenLog) -> Self:
        return cls(
            ids=tuple(mirror.ids), made=tuple(flag == 1 for flag in mirror.made), logprobs=tuple(mirror.logprobs)
        )

    def __eq__(self, other: object) -> bool:
        """NaN stands for "none", and none equals none."""
        if not isinstance(other, Trajectory):
            return NotImplemented
        return (
            self.ids == other.ids
            and self.made == other.made
            and len(self.logprobs) == len(other.logprobs)
            and all(
                a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(self.logprobs, other.logprobs, strict=True)
            )
        )

    def __hash__(self) -> int:
        return hash((self.ids, self.made))  # without the numbers: two NaN have two hashes
