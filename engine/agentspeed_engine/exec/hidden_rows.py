"""Which rows of pages a step hides: behind what a branch has written of a page, a former owner's rows may still lie.

No row that a branch sees is one of them, but kernels that read whole tiles multiply them by a probability of zero, and
zero times no number is none. So they are named in the step in which a branch begins to write a page, of whatever kind:
a fresh one, a copy of its seed, or a stub that it took over.
"""

from __future__ import annotations

from typing import final

import numpy as np

from agentspeed_engine.ids import BranchId, PageId
from agentspeed_engine.models.inputs import Int64s
from agentspeed_engine.sched.plan import Row

_NONE: Int64s = np.zeros(0, dtype=np.int64)


@final
class HiddenRows:
    """Remembers which page each branch of the last two steps writes, two because a row may wait for the step before.
    A branch that is not remembered has its hidden rows named once more than it must."""

    __slots__ = ("_before", "_last", "_page_tokens")

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._last: dict[BranchId, tuple[int, PageId]] = {}
        """(epoch, page): with the epoch the page belongs to the branch for as long as it writes it."""
        self._before: dict[BranchId, tuple[int, PageId]] = {}

    def of(self, rows: tuple[Row, ...]) -> Int64s:
        """[n] pool rows, of the pages that `rows` begin to write and leave partly filled."""
        size, last, before = self._page_tokens, self._last, self._before
        written: dict[BranchId, tuple[int, PageId]] = {}
        found: list[Int64s] = []
        for row in rows:
            held = row.end - row.tail_start
            page = row.tail_pages[(held - 1) // size]
            writes = written[row.branch] = (row.epoch, page)
            if held % size and last.get(row.branch) != writes != before.get(row.branch):
                found.append(np.arange(page * size + held % size, (page + 1) * size, dtype=np.int64))
        self._last, self._before = written, last
        return np.concatenate(found) if found else _NONE
