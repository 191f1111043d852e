"""What a former owner left in a page is named in the step in which another branch begins to write it, and then only."""

from __future__ import annotations

from agentspeed_engine.exec.batch import Batcher
from agentspeed_engine.ids import BranchId, PageId, StepSeq
from agentspeed_engine.kv.views import PageCopy
from agentspeed_engine.sched.plan import Row, StepPlan

PAGE = 4
TAIL = (PageId(5), PageId(2))


def row(position: int, tokens: int = 1, *, branch: int = 1, epoch: int = 1, tail: tuple[PageId, ...] = TAIL) -> Row:
    return Row(BranchId(branch), epoch, position, tuple(range(tokens)), (), 0, tail, None)


def hidden(batcher: Batcher, *rows: Row, copies: tuple[PageCopy, ...] = ()) -> list[int]:
    return batcher.step_input(StepPlan(StepSeq(1), rows, copies)).batch.hidden.tolist()


def test_behind_a_prompt_lies_the_rest_of_its_last_page() -> None:
    assert hidden(Batcher(PAGE), row(0, 6)) == [2 * PAGE + 2, 2 * PAGE + 3]


def test_behind_a_full_page_lies_nothing() -> None:
    assert hidden(Batcher(PAGE), row(0, 8)) == []


def test_tokens_that_go_on_in_a_page_hide_what_was_cleared_when_it_was_begun() -> None:
    batcher = Batcher(PAGE)
    assert hidden(batcher, row(0)) == [21, 22, 23]
    assert hidden(batcher, row(1)) == hidden(batcher, row(2)) == hidden(batcher, row(3)) == []
    assert hidden(batcher, row(4)) == [9, 10, 11], "the next page is begun"


def test_a_row_that_waits_a_step_has_its_page_still() -> None:
    batcher = Batcher(PAGE)
    assert hidden(batcher, row(0)) != []
    assert hidden(batcher, row(0, branch=2, tail=(PageId(9),))) == [37, 38, 39]
    assert hidden(batcher, row(1)) == []


def test_a_page_that_came_back_to_a_branch_may_have_been_another_ones_meanwhile() -> None:
    batcher = Batcher(PAGE)
    assert hidden(batcher, row(0)) == [21, 22, 23]
    assert hidden(batcher, row(1, epoch=2)) == [22, 23]


def test_a_copied_page_has_only_the_rows_of_its_seed() -> None:
    assert hidden(Batcher(PAGE), row(2), copies=(PageCopy(PageId(7), PageId(5), 2),)) == [23]


def test_every_branch_of_a_step_has_its_own() -> None:
    assert hidden(Batcher(PAGE), row(0, 3), row(1, branch=2, tail=(PageId(9),))) == [23, 38, 39]
