"""What sessions have grown by, learnt from those that ended: what room is kept for where sessions keep their places."""

from __future__ import annotations

from typing import Final, final

_MEMORY: Final = 16
"""Of the last so many, about, the averages are."""
_TURNS: Final = 3
"""A session that is at work is expected to go on for so many turns at least."""


@final
class Growth:
    """Averages over tokens; nothing is known before the first turn ends."""

    __slots__ = ("_turn", "_turns_seen", "_visit", "_visits_seen")

    def __init__(self) -> None:
        self._turn = self._visit = 0.0
        self._turns_seen = self._visits_seen = 0

    def turn_ended(self, tokens: int) -> None:
        """A turn has added so many tokens to its session."""
        self._turns_seen = min(self._turns_seen + 1, _MEMORY)
        self._turn += (tokens - self._turn) / self._turns_seen

    def visit_ended(self, tokens: int) -> None:
        """A session's turns at one place have added so many, all together."""
        self._visits_seen = min(self._visits_seen + 1, _MEMORY)
        self._visit += (tokens - self._visit) / self._visits_seen

    def to_come(self, grown: int) -> float:
        """Tokens that a session is expected to add yet, which has added `grown` at its place: what is left of an
        average visit, and no less than a few turns, or than such a visit where that is less."""
        few = _TURNS * self._turn
        return max(self._visit - grown, min(few, self._visit) if self._visits_seen else few)

    def snapshot(self) -> tuple[float, ...]:
        """All of it, hashable."""
        return tuple(getattr(self, name) for name in self.__slots__)
