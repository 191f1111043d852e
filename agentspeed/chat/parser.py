"""Splits the text of a turn, as it arrives, into text, reasoning and tool calls by the grammar's own tags.

However the text is split over calls of `feed`, the pieces joined are the same, and no piece ever holds part of a mark:
what may become a mark is kept back until it is one or cannot be one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias, final

from agentspeed.chat.call_reader import CallReader
from agentspeed.chat.key_values import ArgumentKinds
from agentspeed.chat.pieces import CallBroken as CallBroken
from agentspeed.chat.pieces import CallDelta as CallDelta
from agentspeed.chat.pieces import CallOpened as CallOpened
from agentspeed.chat.pieces import CallReady as CallReady
from agentspeed.chat.pieces import Piece as Piece
from agentspeed.chat.pieces import ReasoningPiece as ReasoningPiece
from agentspeed.chat.pieces import TextPiece as TextPiece
from agentspeed.chat.pieces import mark_started
from agentspeed.chat.tags import DEFAULT_TAGS, Tags
from agentspeed.errors import InvalidRequest
from agentspeed.tools.schema import Schema

_Mode: TypeAlias = Literal["text", "reasoning", "call"]
_SPACE: Final = " \t\r\n"


@final
class TurnParser:
    """The parser of one turn. `starts_thinking` is for templates that end a prompt with the opening reasoning mark;
    `tools` are the parameters of each tool by name, by which values without quotes are read."""

    def __init__(
        self,
        tags: Tags = DEFAULT_TAGS,
        *,
        reasoning: bool = False,
        starts_thinking: bool = False,
        tools: Mapping[str, Schema] | None = None,
        marked: bool = True,
    ) -> None:
        """`marked` False: nothing in the text is a mark."""
        self._tags = tags
        self._form = tags.calls
        self._kinds = ArgumentKinds(tools or {})
        self._marked = marked
        starts_thinking = marked and (starts_thinking or tags.thinking)
        self._may_think = reasoning or starts_thinking or tags.thinks
        self._mode: _Mode = "reasoning" if starts_thinking else "text"
        self._held = ""
        self._call: CallReader | None = None
        self._calls = 0
        self._at_start = True
        self._between = False
        """After a call: space is none of the text, and the next call needs no opening of its own."""
        self._lead = "" if starts_thinking or not marked else tags.lead
        self._fresh = starts_thinking and tags.roomy
        """Ends of lines that come now are the template's."""
        self._done = False
        self._firsts: dict[tuple[_Mode, bool], frozenset[str]] = {}
        """By the two things that decide which marks may come where nothing waits: with what they begin."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after this much text."""
        if self._done:
            raise InvalidRequest("feed() after finish(): a parser serves one turn.", remedy="Make a new TurnParser.")
        pieces: list[Piece] = []
        if self._is_plain(text):
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
            rest = self._without_end(self._held)
            if not (self._between and rest.isspace()):
                self._emit(rest, pieces)
        self._held, self._call, self._done = "", None, True
        return pieces

    def _is_plain(self, text: str) -> bool:
        waits = self._call is not None or self._held or self._lead or self._fresh or self._between
        if waits:
            return False
        state = self._mode, self._at_start
        firsts = self._firsts.get(state)
        if firsts is None:
            firsts = self._firsts[state] = frozenset(mark[0] for mark in self._marks())
        return firsts.isdisjoint(text)

    def _step(self, pieces: list[Piece]) -> bool:
        """Consumes up to the next mark; False when more text is needed."""
        if self._call is not None:
            return self._step_call(self._call, pieces)
        if not self._led():
            return False
        marks = self._marks()
        found = _first_mark(self._held, marks)
        if found is None:
            safe = len(self._held) - mark_started(self._held, marks)
            if self._between and self._held[:safe].isspace():
                safe = 0
            self._emit(self._held[:safe], pieces)
            self._held = self._held[safe:]
            return False
        place, mark = found
        said = self._held[:place]
        if self._may_go_on(mark, self._held[place:], marks):
            self._emit(said, pieces)
            self._held = self._held[place:]
            return False
        if not (self._between and said.isspace()):
            self._emit(said, pieces)
        if not self._at_start and (mark == self._tags.think_open or (self._form.only_at_start and not self._between)):
            self._held = self._held[place:]  # it stood at the start of what was held, and not of the message
            return True
        self._held = self._held[place + len(mark) :]
        self._enter(mark)
        return True

    @staticmethod
    def _may_go_on(mark: str, rest: str, marks: tuple[str, ...]) -> bool:
        """Whether what is a mark now may be the beginning of a longer one."""
        return any(len(other) > len(rest) and other.startswith(rest) and other != mark for other in marks)

    def _led(self) -> bool:
        """Leaves out what stands before a text and is none of it; False when more text is needed to tell."""
        if self._fresh:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return False
            self._fresh = False
        if self._lead:
            if self._may_think:
                bare = self._held.lstrip(_SPACE)
                if self._tags.think_open.startswith(bare) and len(bare) < len(self._tags.think_open):
                    return False
                if bare.startswith(self._tags.think_open):
                    self._held, self._lead = bare, ""
                    return True
            if self._lead.startswith(self._held) and len(self._held) < len(self._lead):
                return False
            self._held = self._held.removeprefix(self._lead)
            self._lead = ""
        return True

    def _step_call(self, call: CallReader, pieces: list[Piece]) -> bool:
        rest = call.read(self._held, pieces)
        if rest is None:
            self._held = ""
            return False
        self._held, self._call, self._between = rest, None, True
        return True

    def _marks(self) -> tuple[str, ...]:
        if not self._marked:
            return ()
        tags, form = self._tags, self._form
        if self._mode == "reasoning":
            closed = tags.think_close
            return (closed, f"\n{closed}") if tags.roomy else (closed,)
        if form.only_at_start and not self._at_start and not self._between:
            calls: tuple[str, ...] = ()
        else:
            calls = _with_lead(form.lead, form.trigger)
        if self._between:
            calls += _with_lead(form.joint, form.next_trigger)
            end = form.section_close.strip(_SPACE)
            calls += (end,) if end else ()
        if self._may_think and self._at_start:
            calls += (tags.think_open,)
        return (*calls, tags.text_end) if tags.text_end else calls

    def _enter(self, mark: str) -> None:
        tags, form = self._tags, self._form
        bare = mark.lstrip(_SPACE)
        if self._between and mark == form.joint + form.next_trigger:
            bare = form.next_trigger.lstrip(_SPACE)  # what joins calls may be more than space
        if self._mode == "reasoning":
            self._mode, self._at_start, self._fresh = "text", False, tags.roomy
        elif mark == tags.think_open:
            self._mode, self._at_start, self._fresh = "reasoning", False, tags.roomy
        elif self._between and bare == form.section_close.strip(_SPACE):
            pass
        elif bare in (form.trigger.lstrip(_SPACE), form.next_trigger.lstrip(_SPACE)):
            self._call = CallReader(self._calls, form, bare, self._kinds)
            self._calls += 1
            self._at_start = self._between = False

    def _without_end(self, text: str) -> str:
        """The end of a turn's text without what only may follow a text."""
        return text.removesuffix(self._tags.text_end) if self._tags.text_end and self._marked else text

    def _emit(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._mode == "text":
            if not text.isspace():
                self._at_start = False
            self._between = False
        pieces.append(self._piece(text))

    def _piece(self, text: str) -> Piece:
        return ReasoningPiece(text) if self._mode == "reasoning" else TextPiece(text)


def _with_lead(lead: str, mark: str) -> tuple[str, ...]:
    return (lead + mark, mark) if lead and mark else (mark,) if mark else ()


def _first_mark(text: str, marks: tuple[str, ...]) -> tuple[int, str] | None:
    """The first mark, and of those that begin there the longest."""
    found = [(place, -len(mark), mark) for mark in marks if (place := text.find(mark)) >= 0]
    if not found:
        return None
    place, _, mark = min(found)
    return place, mark


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
