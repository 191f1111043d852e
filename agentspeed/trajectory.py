"""A session's tokens as training data: exact ids, who made them, and how likely they were."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

import msgspec

from agentspeed.errors import InvalidRequest

if TYPE_CHECKING:
    from agentspeed.chat.token_log import TokenLog


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ids: tuple[int, ...]
    made: tuple[bool, ...]
    logprobs: tuple[float | None, ...]
    draw_logprobs: tuple[float | None, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Four sequences of the same length."""

    ids: tuple[int, ...]
    made: tuple[bool, ...]
    """True for ids the model drew, the end ids included; False for prompts, tool results and template ids."""
    logprobs: tuple[float, ...]
    """Natural logarithms of the drawn ids' probabilities in the model's own distribution, the softmax of its logits, in
    sessions with `record_logprobs`; NaN elsewhere."""
    draw_logprobs: tuple[float, ...]
    """The same in the distribution that drew, the behaviour policy: after penalties, bias, grammar, temperature, top_k,
    top_p and min_p; 0 where one id alone could come."""

    @classmethod
    def of(cls, mirror: TokenLog) -> Self:
        return cls(
            ids=tuple(mirror.ids),
            made=tuple(flag == 1 for flag in mirror.made),
            logprobs=tuple(mirror.logprobs),
            draw_logprobs=tuple(mirror.draw_logprobs),
        )

    def to_json(self) -> str:
        """Strict JSON: an object with the four arrays, with null for NaN."""
        numbers = {"logprobs": _nullable(self.logprobs), "draw_logprobs": _nullable(self.draw_logprobs)}
        return json.dumps({"ids": self.ids, "made": self.made, **numbers}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote. Raises `InvalidRequest` for anything else."""
        try:
            found = msgspec.json.decode(text, type=_Written)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"This is no trajectory: {error}.", remedy="Give what to_json() gave.") from error
        if not len(found.ids) == len(found.made) == len(found.logprobs) == len(found.draw_logprobs):
            raise InvalidRequest("This is no trajectory: its parts have different lengths.")
        return cls(
            ids=found.ids,
            made=found.made,
            logprobs=_numbers(found.logprobs),
            draw_logprobs=_numbers(found.draw_logprobs),
        )

    def __eq__(self, other: object) -> bool:
        """NaN stands for "none", and none equals none."""
        if not isinstance(other, Trajectory):
            return NotImplemented
        return (
            self.ids == other.ids
            and self.made == other.made
            and _nullable(self.logprobs) == _nullable(other.logprobs)
            and _nullable(self.draw_logprobs) == _nullable(other.draw_logprobs)
        )

    def __hash__(self) -> int:
        return hash((self.ids, self.made))  # without the numbers: two NaN have two hashes


def _nullable(values: tuple[float, ...]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _numbers(values: tuple[float | None, ...]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else value for value in values)
