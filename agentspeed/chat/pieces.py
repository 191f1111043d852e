"""What the text of a turn is made of, as it is told apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """Text between the reasoning marks."""

    text: str


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A call whose tool is known; its arguments are still arriving."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of a call's arguments, as JSON text."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class CallReady:
    """A whole call. `arguments` is the JSON text of an object; `id` is the call's, where the model writes one."""

    index: int
    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallBroken:
    """Something between call marks that is not a call: only without a grammar, or when a turn was `cut` inside it."""

    index: int
    raw: str
    why: str
    cut: bool = False


Piece: TypeAlias = TextPiece | ReasoningPiece | CallOpened | CallDelta | CallReady | CallBroken


def mark_started(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of the text may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks if len(mark) > length):
            return length
    return 0
