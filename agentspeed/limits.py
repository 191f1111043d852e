"""What a whole run may spend, over all its turns and tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from agentspeed._base.validate import check_count, check_seconds
from agentspeed.errors import LimitReached

LimitName: TypeAlias = Literal["tokens", "branch_tokens", "seconds", "tool_calls"]
"""The fields of `Limits`: what `Result.limit` names."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`await s.run("...", limits=Limits(tokens=2000, seconds=30, tool_calls=8))`

    A run that reaches one ends with the reason "limit", and the result names it. What its tools use meanwhile spends
    from it too: forks, sub-agents and their runs, any other session. Their turns are cut where nothing is left, and a
    turn that would begin there raises `LimitReached`. Raises `InvalidRequest` for a value out of range."""

    tokens: int | None = None
    """The most tokens that all turns draw together. The last turn is cut there; calls that nobody could read the
    results of any more are not run, and stay open. Turns at once (of forks, of sub-agents) that have drawn more
    together leave no trace and raise `LimitReached`: each may have drawn a few tokens more by then."""
    branch_tokens: int | None = None
    """The same for any one session among them: the run's own, each fork, each call of a sub-agent."""
    seconds: float | None = None
    """From its beginning. A turn that runs then leaves no trace, and a tool that runs is cancelled."""
    tool_calls: int | None = None
    """The most calls that are run, those of sub-agents among them. The model is told of each call beyond, and then has
    to answer."""

    def __post_init__(self) -> None:
        check_count("limits.tokens", self.tokens, none=True)
        check_count("limits.branch_tokens", self.branch_tokens, none=True)
        check_seconds("limits.seconds", self.seconds)
        check_count("limits.tool_calls", self.tool_calls, least=0, none=True)


@final
@dataclass(frozen=True, slots=True)
class Reached:
    """A limit that is used up: which, how much it is, whose, and who spent it."""

    limit: LimitName
    most: float
    owner: str
    spent: Mapping[str, int]

    def __str__(self) -> str:
        by = ", ".join(f"{session_id}: {count}" for session_id, count in self.spent.items())
        return f"limits.{self.limit}={self.most} of the run of session {self.owner}{f' ({by})' if by else ''}"

    def error(self) -> LimitReached:
        """For who cannot go on."""
        return LimitReached(
            f"The turn reached {self}.",
            limit=self.limit,
            spent=self.spent,
            remedy="Give that run a higher limit, or let its tools do less.",
        )
