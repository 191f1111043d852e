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

    def to_json(self) -> str:
        """Strict JSON: an object with the three arrays, with null for NaN."""
        logprobs = [None if math.isnan(value) else value for value in self.logprobs]
        return json.dumps({"ids": self.ids, "made": self.made, "logprobs": logprobs}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote. Raises `InvalidRequest` for anything else."""
        try:
            found = msgspec.json.decode(text, type=_Written)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"This is no trajectory: {error}.", remedy="Give what to_json() gave.") from error
        if not len(found.ids) == len(found.made) == len(found.logprobs):
            raise InvalidRequest("This is no trajectory: its parts have different lengths.")
        logprobs = tuple(math.nan if value is None else value for value in found.logprobs)
        return cls(ids=found.ids, made=found.made, logprobs=logprobs)

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
