"""The simulated device: every row remembers the history it was computed from, so a page that is reused too early is
seen by whoever reads it.

The toy model draws a token that is a function of the whole history, so tokens are right only if every row was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from agentspeed_engine.ids import PageId
from agentspeed_engine.sched.plan import Drawn, HostCopy, Row, StepPlan, StepResult

_WORD = (1 << 64) - 1
_JUNK = -1
"""What a copy that failed half-way leaves behind: the row of no history."""


class WrongRow(AssertionError):
    """A step or a copy met rows that are not those it was ordered for."""


def grown(history: int, token: int) -> int:
    """The history one token later, as one number."""
    mixed = (history ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _WORD
    return mixed ^ mixed >> 29


def next_token(history: int, vocabulary: int) -> int:
    """The toy model: the token that follows a history."""
    return ((history * 0x94D049BB133111EB & _WORD) >> 24) % vocabulary


@final
@dataclass(slots=True)
class Mirror:
    """The ids of a branch as its front knows them, and the row that each must have on the device."""

    ids: list[int] = field(default_factory=list[int])
    rows: list[int] = field(default_factory=list[int])

    def extend(self, ids: Sequence[int]) -> None:
        history = self.rows[-1] if self.rows else 0
        for token in ids:
            history = grown(history, token)
            self.ids.append(token)
            self.rows.append(history)

    def cut(self, known: int) -> None:
        del self.ids[known:]
        del self.rows[known:]

    def copy(self, known: int) -> Mirror:
        return Mirror(self.ids[:known], self.rows[:known])

    def following(self, vocabulary: int) -> int:
        """What an undisturbed model draws next."""
        return next_token(self.rows[-1], vocabulary)


@final
@dataclass(frozen=True, slots=True)
class Order:
    """A plan on its way through the device, with the rows every branch in it must find and make."""

    plan: StepPlan
    rows: tuple[list[int], ...]


@final
class Device:
    """Pages, slots, and what is in them. Time is the world's: it says when a step begins and when it ends."""

    def __init__(self, pages: int, slots: int, page_tokens: int, vocabulary: int) -> None:
        self.page_tokens = page_tokens
        self.vocabulary = vocabulary
        self.pages: list[list[int]] = [[] for _ in range(pages)]
        self.slots: list[list[int]] = [[] for _ in range(slots)]

    def begin(self, order: Order) -> None:
        """Everything that a step reads of its path is there when it begins."""
        for row, rows in zip(order.plan.rows, order.rows, strict=True):
            self._read_path(row, rows)

    def end(self, order: Order) -> StepResult:
        """The step is carried out as late as it can be: what it reads must have stayed, what it writes must be its."""
        plan = order.plan
        for copy in plan.copies:
            self.pages[copy.dst] = self.pages[copy.src][: copy.rows]
        drawn: list[Drawn] = []
        for row, rows in zip(plan.rows, order.rows, strict=True):
            self._write(row, rows)
            self._read_path(row, rows)
            self._read_tail(row, rows)
            if row.sample is not None:
                drawn.append(Drawn(row.branch, row.epoch, next_token(rows[-1], self.vocabulary)))
        return StepResult(plan.seq, tuple(drawn))

    def copy(self, order: HostCopy, *, ok: bool) -> None:
        """Carries out one ticket; a failed one leaves junk where it was writing."""
        for page, slot in zip(order.pages, order.slots, strict=True):
            if order.direction == "save":
                self.slots[slot] = list(self.pages[page]) if ok else [_JUNK] * self.page_tokens
            else:
                self.pages[page] = list(self.slots[slot]) if ok else [_JUNK] * self.page_tokens

    def _write(self, row: Row, rows: list[int]) -> None:
        for position in range(row.position, row.position + len(row.ids)):
            page, offset = self._place(row, position)
            held = self.pages[page]
            if len(held) < offset:
                raise WrongRow(f"a row of branch {row.branch} at {position} leaves a gap in page {page}")
            del held[offset:]
            held.append(rows[position])

    def _read_path(self, row: Row, rows: list[int]) -> None:
        position = 0
        for run in row.path:
            if run.start != position:
                raise WrongRow(f"the path of branch {row.branch} has a gap at {position}")
            for page in run.pages:
                count = min(self.page_tokens, run.start + run.tokens - position)
                self._expect(row, page, 0, rows[position : position + count], position)
                position += count
        if position != row.tail_start:
            raise WrongRow(f"the tail of branch {row.branch} starts at {row.tail_start}, its path ends at {position}")

    def _read_tail(self, row: Row, rows: list[int]) -> None:
        end = row.position + len(row.ids)
        for index, page in enumerate(row.tail_pages):
            position = row.tail_start + index * self.page_tokens
            count = min(self.page_tokens, end - position)
            if count <= 0:
                return
            self._expect(row, page, 0, rows[position : position + count], position)

    def _expect(self, row: Row, page: PageId, offset: int, rows: list[int], position: int) -> None:
        if self.pages[page][offset : offset + len(rows)] != rows:
            raise WrongRow(f"branch {row.branch} reads page {page} for positions {position} to "
                           f"{position + len(rows)} and finds rows of another history")

    def _place(self, row: Row, position: int) -> tuple[PageId, int]:
        offset = position - row.tail_start
        return row.tail_pages[offset // self.page_tokens], offset % self.page_tokens
