"""How tokens choose experts, as data: the same rule object goes to every implementation of `route`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRule:
    score: Literal["sigmoid", "softmax"]
    top: int
    groups: int
    """Experts are cut into this many equal groups; 1 means none."""
    top_groups: int
    group_score: Literal["top2", "max"]
    """A group is worth the sum of its two best experts, or its best."""
    normalise: bool
    scale: float
