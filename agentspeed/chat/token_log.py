"""The front's own record of a session's log: every id, who made it, and which message it belongs to.

It is what an engine's death cannot take: the next use opens a new branch with exactly these ids.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from agentspeed.messages import Assistant, Message

_NOT_ASKED: Final = array("d", [math.nan])
"""The log-probability of a token where none was asked for."""


@final
@dataclass(frozen=True, slots=True)
class Span:
    """One whole message and the tokens [start, end) that carry it, template text included."""

    message: Message
    start: int
    end: int


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a mirror can be cut back to."""

    tokens: int
    spans: tuple[Span, ...]
    open_at: int | None
    owed: tuple[int, ...]


@final
class TokenLog:
    """Ids with their origin. Cut, copied and appended to in step with the engine's log."""

    def __init__(self) -> None:
        self.ids = array("I")
        self.made = bytearray()
        """1 where the model drew the id."""
        self.logprobs = array("d")
        """Of drawn ids in the model's own distribution, when asked for; NaN elsewhere."""
        self.draw_logprobs = array("d")
        """Of drawn ids in the distribution that they were drawn from, when asked for; NaN elsewhere."""
        self.plain = False
        """A text instead of a conversation: it has no messages, and the model goes on with it wherever it is cut."""
        self.spans: list[Span] = []
        self.open_at: int | None = None
        """Where the text of an assistant message that is not closed begins; None when all messages are closed."""
        self.owed: tuple[int, ...] = ()
        """Template ids that close the last message but were not drawn: appended before anything else is."""
        self.marks: dict[str, Checkpoint] = {}
        self.hidden: list[tuple[int, int]] = []
        """Stop texts: (tokens known when a turn ended at one, characters at the end of its text that are the stop text
        and what its last token wrote after it). The model has them before its eyes; no message shows them."""
        self.computed = 0
        """Of how many of the first ids an engine has computed the rows: an engine that is started anew computes them
        again, which is not new work."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(span.message for span in self.spans)

    def digest(self, tokens: int) -> int:
        """Tells logs apart by their first `tokens` ids."""
        return zlib.crc32(memoryview(self.ids)[:tokens])

    def append(self, ids: Sequence[int]) -> None:
        """Ids of a template or a message."""
        self.ids.extend(ids)
        self.made.extend(bytes(len(ids)))
        self.logprobs.extend(_NOT_ASKED * len(ids))
        self.draw_logprobs.extend(_NOT_ASKED * len(ids))

    def drew(self, ids: Sequence[int], logprobs: Sequence[float], draw_logprobs: Sequence[float]) -> None:
        """Ids the model drew; each of the other two is empty or as long."""
        count = len(ids)
        self.ids.extend(ids)
        self.made.extend(b"\x01" * count)
        self.logprobs.extend(logprobs or _NOT_ASKED * count)
        self.draw_logprobs.extend(draw_logprobs or _NOT_ASKED * count)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(len(self.ids), tuple(self.spans), self.open_at, self.owed)

    def back_to(self, point: Checkpoint) -> None:
        """Exactly as it was at `point`; later marks are forgotten."""
        del self.ids[point.tokens :]
        del self.made[point.tokens :]
        del self.logprobs[point.tokens :]
        del self.draw_logprobs[point.tokens :]
        self.spans = list(point.spans)
        self.open_at, self.owed = point.open_at, point.owed
        self.marks = {name: mark for name, mark in self.marks.items() if mark.tokens <= point.tokens}
        self.hidden = [place for place in self.hidden if place[0] <= point.tokens]
        self.computed = min(self.computed, point.tokens)

    def at(self, tokens: int) -> Checkpoint:
        """The checkpoint for any token position: a message cut in its middle is no message, an assistant's is open; one
        that ends there owes the template ids that closed it."""
        if self.plain:
            return Checkpoint(tokens, (), min(self.open_at or 0, tokens), ())
        whole = [span for span in self.spans if span.end <= tokens]
        start = whole[-1].end if whole else 0
        cut = self.spans[len(whole)] if len(whole) < len(self.spans) else None
        open_at = self.open_at if self.open_at is not None and self.open_at <= tokens else None
        if cut is not None and tokens > start:
            drawn = self.made.find(1, max(cut.start, start), cut.end)
            open_at = drawn if 0 <= drawn <= tokens else None
        owed: tuple[int, ...] = ()
        if tokens == len(self.ids):
            owed = self.owed
        elif cut is not None and whole and isinstance(whole[-1].message, Assistant):
            owed = tuple(self.ids[tokens : cut.start])
        return Checkpoint(tokens, tuple(whole), open_at, owed)

    def marks_in(self, other: TokenLog) -> dict[str, Checkpoint]:
        """The named marks up to which another log has the same ids."""
        return {
            name: point
            for name, point in self.marks.items()
            if point.tokens <= len(other) and self.digest(point.tokens) == other.digest(point.tokens)
        }

    def copy(self, tokens: int, point: Checkpoint | None = None) -> TokenLog:
        """The first `tokens` of this mirror, sharing nothing. `point`: what a mark knows of that place."""
        if point is None:
            point = self.at(tokens) if tokens < len(self.ids) else self.checkpoint()
        other = TokenLog()
        other.plain = self.plain
        other.ids = self.ids[:tokens]
        other.made = self.made[:tokens]
        other.logprobs = self.logprobs[:tokens]
        other.draw_logprobs = self.draw_logprobs[:tokens]
        other.spans = list(point.spans)
        other.open_at, other.owed = point.open_at, point.owed
        other.marks = {name: mark for name, mark in self.marks.items() if mark.tokens <= tokens}
        other.hidden = [place for place in self.hidden if place[0] <= tokens]
        other.computed = min(self.computed, tokens)
        return other
