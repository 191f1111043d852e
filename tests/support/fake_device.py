"""A device that remembers which ids each row was computed from: a step that reads or writes a wrong row fails at once.

The next token is a function of the whole log, so tokens are right only if every row that was read was right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from agentspeed_engine.exec.hidden_rows import HiddenRows
from agentspeed_engine.ids import BranchId, PageId, SlotId, StepSeq
from agentspeed_engine.sched.plan import Drawn, HostCopy, Row, StepPlan, StepResult


class WrongRow(AssertionError):
    """A step used rows that are not those of its branch's log."""


class LeftBehind(AssertionError):
    """A row that no branch sees was still a former owner's when a page was read."""


class FakeDevice:
    """Carries out plans at once. `logs` gives the whole log of a branch, as the test knows it."""

    def __init__(self, page_tokens: int, vocab_size: int, poison: int | None = None) -> None:
        """`poison`: an id of whose rows nothing finite can be computed, and of none that see them."""
        self.poison = poison
        self.page_tokens = page_tokens
        self.vocab_size = vocab_size
        self.pages: dict[PageId, list[tuple[int, ...]]] = {}
        """Each row as the ids it depends on."""
        self.slots: dict[SlotId, list[tuple[int, ...]]] = {}
        self._hidden = HiddenRows(page_tokens)
        self._writer: dict[PageId | SlotId, list[tuple[BranchId, int] | None]] = {}
        """Of each row of pages (and of slots, by numbers below -1) the branch and epoch that wrote it; None: zeros."""
        self.tokens_computed = 0
        self.sampled: dict[StepSeq, list[int]] = {}
        """What each step drew: later ones may be fed with it before anybody knows it."""

    def execute(self, plan: StepPlan, logs: dict[int, Sequence[int]]) -> StepResult:
        for copy in plan.copies:
            self.pages[copy.dst] = list(self.pages[copy.src][: copy.rows])
            self._writers(copy.dst)[: copy.rows] = self._writers(copy.src)[: copy.rows]
        for slot in self._hidden.of(plan.rows).tolist():
            self._writers(PageId(slot // self.page_tokens))[slot % self.page_tokens] = None
        drawn: list[Drawn] = []
        refused: list[tuple[BranchId, int, str]] = []
        sampled = self.sampled[plan.seq] = []
        for row in plan.rows:
            log = tuple(logs[row.branch])
            if row.token_of is not None:
                if len(log) != row.position:
                    raise WrongRow(f"branch {row.branch} is fed a token as unknown that its log has")
                log = (*log, self.sampled[row.token_of.step][row.token_of.place])
            self._check_ids(row, log)
            self._write(row, log)
            self._read(row, log)
            self._read_hidden(row)
            self.tokens_computed += row.tokens
            if row.sample is not None:
                token = next_token(log[: row.end], self.vocab_size)
                sampled.append(token)
                if self.poison in log[: row.end]:
                    refused.append((row.branch, row.epoch, "no finite numbers"))
                else:
                    drawn.append(Drawn(row.branch, row.epoch, token))
        spoilt = frozenset((branch, epoch) for branch, epoch, _ in refused)
        return StepResult(plan.seq, tuple(drawn), tuple(refused), spoilt=spoilt)

    def copy(self, order: HostCopy) -> None:
        """Carries out one ticket."""
        for page, slot in zip(order.pages, order.slots, strict=True):
            if order.direction == "save":
                self.slots[slot] = list(self.pages[page])
                self._writer[SlotId(-2 - slot)] = list(self._writers(page))
            else:
                self.pages[page] = list(self.slots[slot])
                self._writer[page] = list(self._writer[SlotId(-2 - slot)])

    def _check_ids(self, row: Row, log: tuple[int, ...]) -> None:
        if row.token_of is None and tuple(row.ids) != log[row.position : row.end]:
            raise WrongRow(f"branch {row.branch} was fed ids that are not its log's")

    def _write(self, row: Row, log: tuple[int, ...]) -> None:
        for position in range(row.position, row.end):
            page, offset = self._place(row, position)
            rows = self.pages.setdefault(page, [])
            if len(rows) < offset:
                raise WrongRow(f"branch {row.branch} left a gap before position {position}")
            del rows[offset:]
            rows.append(log[: position + 1])
            self._writers(page)[offset] = row.branch, row.epoch

    def _read(self, row: Row, log: tuple[int, ...]) -> None:
        position = 0
        for run in row.path:
            if run.start != position:
                raise WrongRow(f"the path of branch {row.branch} has a gap at {position}")
            for index in range(run.tokens):
                self._expect(run.pages[index // self.page_tokens], index % self.page_tokens, log[: position + 1])
                position += 1
        if position != row.tail_start:
            raise WrongRow(f"the tail of branch {row.branch} starts at {row.tail_start}, its path ends at {position}")
        for position in range(row.tail_start, row.position):
            self._expect(*self._place(row, position), log[: position + 1])

    def _read_hidden(self, row: Row) -> None:
        page, last = self._place(row, row.end - 1)
        if not {*self._writers(page)[last + 1 :]} <= {None, (row.branch, row.epoch)}:
            raise LeftBehind(f"behind row {last} of page {page} lie rows that branch {row.branch} did not write")

    def _writers(self, page: PageId) -> list[tuple[BranchId, int] | None]:
        return self._writer.setdefault(page, [None] * self.page_tokens)

    def _expect(self, page: PageId, offset: int, ids: tuple[int, ...]) -> None:
        rows = self.pages.get(page, [])
        if len(rows) <= offset or rows[offset] != ids:
            raise WrongRow(f"row {offset} of page {page} was not computed from the ids it is read for")

    def _place(self, row: Row, position: int) -> tuple[PageId, int]:
        offset = position - row.tail_start
        return row.tail_pages[offset // self.page_tokens], offset % self.page_tokens


def next_token(log: tuple[int, ...], vocab_size: int) -> int:
    """A fixed function of the whole log (not `hash`, which differs between processes)."""
    digest = hashlib.blake2b(bytes(number % 256 for number in log), digest_size=4).digest()
    return int.from_bytes(digest, "little") % vocab_size
