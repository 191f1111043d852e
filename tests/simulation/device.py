"""The simulated device: it computes rows and tokens from what lies in its pages, so whatever is wrong there is heard.

The toy model's row is a function of all rows before it, *as they are read*, and of its own id; the token it draws is a
function of all rows. Nothing is looked up from what ought to be there: a token is right only if every row under it was.

The engine may count on this much: what a step was ordered to read and write is its own from the order to the
acknowledgement, and rows of one branch are carried out in their order. So the device leaves everything else open:
steps overlap, and each row is carried out at a moment of its own, often the first or the last.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import final

from agentspeed_engine.ids import BranchId, PageId
from agentspeed_engine.kv.views import PageCopy
from agentspeed_engine.sched.plan import Drawn, HostCopy, Row, StepPlan, StepResult

_WORD = (1 << 64) - 1
_JUNK = -1
"""What a copy that failed half-way leaves behind: the row of no history."""
_NOTHING = 0
"""What memory holds that was never written."""
_EDGE = 2.0
"""How much more often a row is carried out in the very first or last moment of its step than in between."""


_KEPT = 16
"""Steps whose tokens the device keeps; more than are ever in flight."""


class WrongRow(AssertionError):
    """A step or a copy met rows that are not those it was ordered for."""


def grown(reading: int, value: int) -> int:
    """What was read so far, and one value more, as one number."""
    mixed = (reading ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _WORD
    return mixed ^ mixed >> 29


def next_token(reading: int, vocabulary: int) -> int:
    """The toy model: the token that follows all the rows read."""
    return ((reading * 0x94D049BB133111EB & _WORD) >> 24) % vocabulary


@final
@dataclass(slots=True)
class Mirror:
    """The ids of a branch as its front knows them, and what a device where nothing goes wrong makes of them."""

    ids: list[int] = field(default_factory=list[int])
    rows: list[int] = field(default_factory=list[int])
    readings: list[int] = field(default_factory=list[int])
    """Up to and with the row of the same place."""

    def extend(self, ids: Sequence[int]) -> None:
        reading = self.readings[-1] if self.readings else 0
        for token in ids:
            row = grown(reading, token)
            reading = grown(reading, row)
            self.ids.append(token)
            self.rows.append(row)
            self.readings.append(reading)

    def cut(self, known: int) -> None:
        del self.ids[known:], self.rows[known:], self.readings[known:]

    def ahead(self, vocabulary: int) -> list[int]:
        """The rows with the one of the token that an undisturbed model draws next, before its front has heard of it."""
        return [*self.rows, grown(self.readings[-1], self.following(vocabulary))]

    def copy(self, known: int) -> Mirror:
        return Mirror(self.ids[:known], self.rows[:known], self.readings[:known])

    def following(self, vocabulary: int) -> int:
        """What an undisturbed model draws next."""
        return next_token(self.readings[-1], vocabulary)


@final
@dataclass(slots=True, eq=False)
class Task:
    """One row of a step on its way through the device."""

    row: Row
    copies: tuple[PageCopy, ...]
    expected: Sequence[int] | None
    """The rows that its branch must find and make, for a device that is looked into."""
    early: int
    """What lay where it reads when its step began."""
    token: int = 0


@final
@dataclass(slots=True, eq=False)
class Step:
    """A plan on its way through the device."""

    plan: StepPlan
    tasks: tuple[Task, ...]


@final
class Device:
    """Pages, slots, and what is in them. The world says when a step begins and ends, the device when its rows do."""

    def __init__(self, pages: int, slots: int, page_tokens: int, vocabulary: int, chance: random.Random) -> None:
        self.page_tokens = page_tokens
        self.vocabulary = vocabulary
        self.pages: list[list[int]] = [[_NOTHING] * page_tokens for _ in range(pages)]
        self.slots: list[list[int]] = [[_NOTHING] * page_tokens for _ in range(slots)]
        self._chance = chance
        self._due: list[tuple[float, int, Task]] = []
        self._serial = 0
        self._last: dict[BranchId, float] = {}
        """When the last row of a branch is carried out."""
        self._samples: dict[int, list[Task]] = {}
        """Of the latest steps, in the order of their rows: later steps may name the token of one."""

    # ---- steps ----------------------------------------------------------------------------------------------------
    def begin(self, plan: StepPlan, expected: Sequence[Sequence[int] | None], begins: float, ends: float) -> Step:
        """`expected`: the rows each branch must find and make; None where nobody looks into the device."""
        self.carry_out(begins)
        tasks: list[Task] = []
        for row, rows in zip(plan.rows, expected, strict=True):
            copies = tuple(copy for copy in plan.copies if copy.dst in row.tail_pages)
            task = Task(row, copies, rows, self._reading(row, copies))
            self._look(task)
            at = min(ends, max(begins, begins + (ends - begins) * self._chance.uniform(-_EDGE, 1 + _EDGE)))
            self._last[row.branch] = at = max(at, self._last.get(row.branch, begins))
            self._serial += 1
            heappush(self._due, (at, self._serial, task))
            tasks.append(task)
        self._samples[plan.seq] = [task for task in tasks if task.row.sample is not None]
        _ = self._samples.pop(plan.seq - _KEPT, None)
        return Step(plan, tuple(tasks))

    def carry_out(self, until: float) -> None:
        """Every row that is due."""
        while self._due and self._due[0][0] <= until:
            self._compute(heappop(self._due)[2])

    def stand_still(self, seconds: float) -> None:
        """Whatever is on its way is as far from its end as it was."""
        self._due = [(at + seconds, serial, task) for at, serial, task in self._due]
        self._last = {branch: at + seconds for branch, at in self._last.items()}

    def result(self, step: Step) -> StepResult:
        """Of a step whose rows are all carried out."""
        return StepResult(
            step.plan.seq,
            tuple(
                Drawn(task.row.branch, task.row.epoch, task.token) for task in step.tasks if task.row.sample is not None
            ),
        )

    def copy(self, order: HostCopy, now: float, *, ok: bool) -> None:
        """Carries out one ticket; a failed one leaves junk where it was writing."""
        self.carry_out(now)
        for page, slot in zip(order.pages, order.slots, strict=True):
            if order.direction == "save":
                self.slots[slot] = list(self.pages[page]) if ok else [_JUNK] * self.page_tokens
            else:
                self.pages[page] = list(self.slots[slot]) if ok else [_JUNK] * self.page_tokens

    # ---- one row --------------------------------------------------------------------------------------------------
    def _compute(self, task: Task) -> None:
        row = task.row
        torn = self._reading(row, task.copies) != task.early  # some was read before it changed, some after
        reading = task.early if torn else 0
        for copy in task.copies:
            self.pages[copy.dst][: copy.rows] = self.pages[copy.src][: copy.rows]
        for value in self._path(row):
            reading = grown(reading, value)
        ids = row.ids if row.token_of is None else (self._samples[row.token_of.step][row.token_of.place].token,)
        for position in range(row.tail_start, row.end):
            page, offset = self._place(row, position)
            if position >= row.position:
                self.pages[page][offset] = grown(reading, ids[position - row.position])
            reading = grown(reading, self.pages[page][offset])
        self._look(task, carried_out=True)
        task.token = next_token(reading, self.vocabulary)

    def _path(self, row: Row) -> Iterator[int]:
        """The rows of its path as they lie there."""
        for run in row.path:
            for index in range(run.tokens):
                yield self.pages[run.pages[index // self.page_tokens]][index % self.page_tokens]

    def _reading(self, row: Row, copies: tuple[PageCopy, ...]) -> int:
        """All that others wrote for it, as one number."""
        reading = 0
        for value in self._path(row):
            reading = grown(reading, value)
        for copy in copies:
            for value in self.pages[copy.src][: copy.rows]:
                reading = grown(reading, value)
        return reading

    def _place(self, row: Row, position: int) -> tuple[PageId, int]:
        offset = position - row.tail_start
        return row.tail_pages[offset // self.page_tokens], offset % self.page_tokens

    # ---- for who looks into it ------------------------------------------------------------------------------------
    def _look(self, task: Task, *, carried_out: bool = False) -> None:
        """Each row that is read or written carries the history it must."""
        row, rows = task.row, task.expected
        if rows is None:
            return
        position = 0
        for run in row.path:
            if run.start != position:
                raise WrongRow(f"the path of branch {row.branch} has a gap at {position}")
            position = self._expect(row, run.pages, position, position + run.tokens, rows)
        if position != row.tail_start:
            raise WrongRow(f"the tail of branch {row.branch} starts at {row.tail_start}, its path ends at {position}")
        if carried_out:
            _ = self._expect(row, row.tail_pages, position, row.end, rows)

    def _expect(self, row: Row, pages: Sequence[PageId], start: int, end: int, rows: Sequence[int]) -> int:
        for index, position in enumerate(range(start, end, self.page_tokens)):
            count = min(self.page_tokens, end - position)
            if self.pages[pages[index]][:count] != rows[position : position + count]:
                raise WrongRow(
                    f"branch {row.branch} reads page {pages[index]} for positions {position} to "
                    f"{position + count} and finds rows of another history"
                )
        return end
