"""What a whole run may spend, over all its turns and tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from agentspeed._base.validate import check_count, check_seconds

LimitName: TypeAlias = Literal["tokens", "seconds", "tool_calls"]
"""The fields of `Limits`: what `Result.limit` names."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`await s.run("...", limits=Limits(tokens=2000, seconds=30, tool_calls=8))`

    A run that reaches one ends with the reason "limit", and the result names it. What branches spend that its tools
    fork is not counted, unless they are adopted. Raises `InvalidRequest` for a value out of range."""

    tokens: int | None = None
    """The most tokens that its turns draw together. The last turn is cut there; calls that nobody could read the
    results of any more are not run, and stay open."""
    seconds: float | None = None
    """From its beginning. A turn that runs then leaves no trace, and a tool that runs is cancelled."""
    tool_calls: int | None = None
    """The most calls that are run. The model is told of each call beyond, and then has to answer."""

    def __post_init__(self) -> None:
        check_count("limits.tokens", self.tokens, none=True)
        check_seconds("limits.seconds", self.seconds)
        check_count("limits.tool_calls", self.tool_calls, least=0, none=True)
