"""Splits the text of a turn, as it arrives, into text, reasoning and tool calls by the grammar's own tags.

However the text is split over calls of `feed`, the pieces joined are the same, and no piece ever holds part of a mark:
what may become a mark is kept back until it is one or cannot be one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

from agentspeed.errors import InvalidRequest
from agentspeed.front.tags import DEFAULT_TAGS, Tags


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
    """A whole call. `arguments` is the JSON text of an object."""

    index: int
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """Something between call marks that is not a call: only without a grammar, or when a turn was `cut` inside it."""

    index: int
    raw: str
    why: str
    cut: bool = False


Piece: TypeAlias = TextPiece | ReasoningPiece | CallOpened | CallDelta | CallReady | CallBroken
_Mode: TypeAlias = Literal["text", "reasoning", "call"]

_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@final
class TurnParser:
    """The parser of one turn. `starts_thinking` is for templates that end a prompt with the opening reasoning mark."""

    def __init__(self, tags: Tags = DEFAULT_TAGS, *, reasoning: bool = False, starts_thinking: bool = False) -> None:
        self._tags = tags
        self._may_think = reasoning or starts_thinking
        self._mode: _Mode = "reasoning" if starts_thinking else "text"
        self._held = ""
        self._call: _CallReader | None = None
        self._calls = 0
        self._at_start = True
        self._done = False

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after this much text."""
        if self._done:
            raise InvalidRequest("feed() after finish(): a parser serves one turn.", remedy="Make a new TurnParser.")
        pieces: list[Piece] = []
        if self._call is None and not self._held and not any(mark[0] in text for mark in self._marks()):
            self._emit(text, pieces)  # nearly every delta: nothing in it can be part of a mark
            return pieces
        self._held += text
        while self._step(pieces):
            pass
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        """What was kept back, now that nothing follows. A call that never closed is broken, unless it was whole."""
        pieces: list[Piece] = []
        if self._call is not None:
            pieces.extend(self._call.cut_short())
        elif self._held:
            pieces.append(self._piece(self._held))
        self._held, self._call, self._done = "", None, True
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Consumes up to the next mark; False when more text is needed."""
        if self._call is not None:
            return self._step_call(self._call, pieces)
        marks = self._marks()
        found = _first_mark(self._held, marks)
        if found is None:
            safe = len(self._held) - _mark_started(self._held, marks)
            self._emit(self._held[:safe], pieces)
            self._held = self._held[safe:]
            return False
        place, mark = found
        self._emit(self._held[:place], pieces)
        if mark == self._tags.think_open and not self._at_start:
            self._held = self._held[place:]
            return True
        self._held = self._held[place + len(mark) :]
        self._enter(mark)
        return True

    def _step_call(self, call: _CallReader, pieces: list[Piece]) -> bool:
        rest = call.read(self._held, pieces)
        if rest is None:
            self._held = ""
            return False
        self._held, self._call = rest, None
        return True

    def _marks(self) -> tuple[str, ...]:
        if self._mode == "reasoning":
            return (self._tags.think_close,)
        if self._may_think and self._at_start:
            return (self._tags.call_open, self._tags.think_open)
        return (self._tags.call_open,)

    def _enter(self, mark: str) -> None:
        if mark == self._tags.call_open:
            self._call = _CallReader(self._calls, self._tags.call_close)
            self._calls += 1
            self._at_start = False
        elif mark == self._tags.think_open:
            self._mode, self._at_start = "reasoning", False
        else:
            self._mode, self._at_start = "text", False

    def _emit(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._mode == "text" and not text.isspace():
            self._at_start = False
        pieces.append(self._piece(text))

    def _piece(self, text: str) -> Piece:
        return ReasoningPiece(text) if self._mode == "reasoning" else TextPiece(text)


class _CallReader:
    """Reads one call between its marks; a mark inside a JSON string is part of the string."""

    def __init__(self, index: int, close: str) -> None:
        self._index = index
        self._close = close
        self._raw = ""
        self._name: str | None = None
        self._arguments_at = 0
        self._arguments_end: int | None = None
        self._sent = 0
        self._json = _JsonDepth()

    def read(self, text: str, pieces: list[Piece]) -> str | None:
        """Takes what belongs to the call; gives what follows its closing mark, or None while it is open."""
        fresh = len(self._raw)
        self._raw += text
        for place in range(fresh, len(self._raw)):
            if self._json.take(self._raw[place]) == 1 and self._arguments_end is None:
                self._arguments_end = place + 1
            if self._json.in_string or not self._raw.endswith(self._close, 0, place + 1):
                continue
            rest = self._raw[place + 1 :]
            self._raw = self._raw[: place + 1 - len(self._close)]
            self._progress(pieces)
            pieces.append(self._whole())
            return rest
        self._progress(pieces)
        return None

    def cut_short(self) -> list[Piece]:
        """The turn ended inside the call."""
        body = self._raw
        for length in range(min(len(body), len(self._close) - 1), 0, -1):
            if body.endswith(self._close[:length]):
                self._raw = body[:-length]
                break
        return [self._whole(cut=True)]

    def _progress(self, pieces: list[Piece]) -> None:
        """Announces the name once it is certain, and arguments as far as they go."""
        if self._name is None:
            head = _HEAD.match(self._raw)
            if head is None:
                return
            self._name = str(json.loads(head[1]))
            self._arguments_at = self._sent = head.end()
            pieces.append(CallOpened(self._index, self._name))
        end = self._arguments_end
        if end is None:
            end = len(self._raw) - (0 if self._json.in_string else _mark_started(self._raw, (self._close,)))
        if end > self._sent:
            pieces.append(CallDelta(self._index, self._raw[self._sent : end]))
            self._sent = end

    def _whole(self, *, cut: bool = False) -> Piece:
        try:
            call = json.loads(self._raw)
        except json.JSONDecodeError as error:
            why = f"it {'was cut short' if cut else 'is not a call'}: {error}"
            return CallBroken(self._index, self._raw, why, cut)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return CallBroken(self._index, self._raw, 'it has no "name"', cut)
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return CallBroken(self._index, self._raw, 'its "arguments" are not an object', cut)
        exact = self._raw[self._arguments_at : self._arguments_end] if self._name is not None else ""
        written = exact or json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
        return CallReady(self._index, call["name"], written)


class _JsonDepth:
    """How deep inside JSON a character is, and whether it is inside a string."""

    __slots__ = ("_depth", "_escaped", "in_string")

    def __init__(self) -> None:
        self._depth = 0
        self._escaped = False
        self.in_string = False

    def take(self, character: str) -> int | None:
        """The depth that a closing bracket goes back to; None for any other character."""
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self.in_string = False
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth
        return None


def _first_mark(text: str, marks: tuple[str, ...]) -> tuple[int, str] | None:
    found = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    return min(found) if found else None


def _mark_started(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of the text may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks)) - 1)
    for length in range(longest, 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks if len(mark) > length):
            return length
    return 0


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            joined[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, ReasoningPiece) and isinstance(last, ReasoningPiece):
            joined[-1] = ReasoningPiece(last.text + piece.text)
        else:
            joined.append(piece)
    return joined
