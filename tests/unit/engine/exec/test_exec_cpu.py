"""The executor seam: what reaches an executor, what leaves it, and tokens that no step input knows yet."""

from __future__ import annotations

import dataclasses
import queue
from pathlib import Path

import numpy as np
import pytest

from agentspeed_engine.errors import BrokenInvariant
from agentspeed_engine.exec.batch import Batcher
from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.executor import Executor, Refusal, Token
from agentspeed_engine.exec.noop import NoopModel
from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.exec.worker import Worker
from agentspeed_engine.ids import BranchId, PageId, StepSeq
from agentspeed_engine.kv.views import PageCopy, TurnSpec
from agentspeed_engine.protocol.messages import Grammar, Sampling
from agentspeed_engine.sched.plan import Row, StepPlan, StepResult, TokenOf

SIZE, PAGE = 64, 4


def turn(number: int, *, logprobs: int | None = None, grammar: str | None = None) -> TurnSpec:
    return TurnSpec(turn=number, branch=BranchId(number), sampling=Sampling(temperature=0.0, logprobs=logprobs),
                    draw_key=(0, 0, 0), stop_strings=(), grammar=None if grammar is None else Grammar(source=grammar),
                    consumed_ids=(), prompt_tokens=1)  # fmt: skip


def row(number: int, position: int, ids: tuple[int, ...] = (), *, spec: TurnSpec | None = None,
        token_of: TokenOf | None = None) -> Row:  # fmt: skip
    pages = tuple(PageId(4 * number + index) for index in range(4))
    return Row(BranchId(number), 1, position, ids, (), 0, pages, spec, token_of)


def plan(seq: int, *rows: Row) -> StepPlan:
    return StepPlan(StepSeq(seq), rows)


def executor(depth: int = 0) -> CpuExecutor:
    return CpuExecutor(NoopModel(SIZE, 0.0, PAGE), Vocabulary(Path("none"), SIZE, ()), depth=depth)


def carried_out(executor: Executor, step: StepInput) -> list[int]:
    """The ids of all samples."""
    sampled = executor.collect(executor.launch(step))
    return [one.id for one in sampled if isinstance(one, Token)]


def test_a_step_input_has_no_branch_and_no_epoch_in_it() -> None:
    step = Batcher(PAGE).step_input(
        StepPlan(StepSeq(3), (row(1, 0, (5, 6), spec=turn(1)),), (PageCopy(PageId(1), PageId(2), 3),), (7,))
    )
    assert {field.name for field in dataclasses.fields(step)} == {
        "step",
        "batch",
        "unknown",
        "copies",
        "samples",
        "ended",
    }
    assert (step.step, step.copies, step.ended) == (3, (PageCopy(PageId(1), PageId(2), 3),), (7,))
    assert [(sample.spec.turn, sample.position) for sample in step.samples] == [(1, 2)]


def test_every_token_of_a_step_has_its_id_position_and_pool_row() -> None:
    rows = (row(1, 3, (5, 6, 7)), row(0, 9, (8,), spec=turn(1)), row(2, 0, (9, 10), spec=turn(2)))
    batch = Batcher(PAGE).step_input(plan(1, *rows)).batch
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [3, 4, 5, 9, 0, 1]
    assert batch.slots.tolist() == [19, 20, 21, 9, 32, 33]
    assert batch.select.tolist() == [3, 5]
    assert [run.pages.tolist() for run in batch.runs] == [[4, 5], [0, 1, 2], [8]]
    assert [run.queries.tolist() for run in batch.runs] == [[0, 1, 2], [3], [4, 5]]


def test_an_empty_step_is_one() -> None:
    step = Batcher(PAGE).step_input(plan(1))
    assert (len(step.batch.ids), step.batch.runs, step.samples) == (0, (), ())
    assert carried_out(executor(), step) == []


def test_a_token_that_is_not_known_yet_is_the_one_that_the_earlier_step_sampled() -> None:
    batcher, one = Batcher(PAGE), executor(depth=1)
    first = batcher.step_input(
        plan(4, row(0, 0, (1, 2)), row(1, 5, (20,), spec=turn(1)), row(2, 5, (30,), spec=turn(2)))
    )
    second = batcher.step_input(
        plan(5, row(2, 6, token_of=TokenOf(StepSeq(4), 1), spec=turn(2)), row(1, 6, (50,), spec=turn(1)))
    )
    assert second.unknown.at.tolist() == [0]
    pending = [one.launch(first), one.launch(second)]
    assert [pend.step for pend in pending] == [4, 5]
    ids = [[token.id for token in one.collect(pend) if isinstance(token, Token)] for pend in pending]
    assert ids == [[21, 31], [32, 51]]
    third = batcher.step_input(plan(6, row(2, 7, token_of=TokenOf(StepSeq(5), 0), spec=turn(2))))
    assert carried_out(one, third) == [33], "also when the step it names was collected in between"


def test_a_token_of_a_step_that_was_not_in_flight_is_a_bug_and_not_a_wrong_id() -> None:
    batcher, one = Batcher(PAGE), executor(depth=1)
    for seq in (1, 2):
        _ = carried_out(one, batcher.step_input(plan(seq, row(1, seq, (20,), spec=turn(1)))))
    with pytest.raises(BrokenInvariant, match="step 3 names a token of step 1"):
        _ = one.launch(batcher.step_input(plan(3, row(1, 3, token_of=TokenOf(StepSeq(1), 0), spec=turn(1)))))


def test_log_probabilities_leave_only_for_the_turns_that_asked() -> None:
    step = Batcher(PAGE).step_input(plan(1, row(0, 0, (1,), spec=turn(1)), row(1, 0, (2,), spec=turn(2, logprobs=2))))
    one = executor()
    plain, told = one.collect(one.launch(step))
    assert plain == Token(2)
    assert isinstance(told, Token) and told.logprob is not None and len(told.top) == 2
    assert np.isclose(told.logprob, 10.0 - np.log(np.exp(10.0) + SIZE - 1))


def test_a_turn_that_cannot_be_prepared_says_why_and_is_refused_in_a_step_as_well() -> None:
    one, spec = executor(), turn(1, grammar="no such grammar")
    reason = one.prepare(spec)
    assert reason is not None and "tokenizer.json" in reason
    step = Batcher(PAGE).step_input(plan(1, row(0, 0, (1,), spec=spec), row(1, 0, (2,), spec=turn(2))))
    refused, drawn = one.collect(one.launch(step))
    assert isinstance(refused, Refusal) and "tokenizer.json" in refused.reason
    assert drawn == Token(3), "others go on"


# ---- the worker ---------------------------------------------------------------------------------------------------
class Slow:
    """An executor whose steps are done when a test says so; it notes the order of calls."""

    page_tokens = PAGE
    model_seconds = sampling_seconds = 0.0

    def __init__(self, done: set[int]) -> None:
        self.calls: list[tuple[str, int]] = []
        self._done = done

    def launch(self, step: StepInput) -> Flight:
        self.calls.append(("launch", step.step))
        return Flight(step.step, step.step in self._done)

    def collect(self, pending: Flight) -> tuple[Token, ...]:
        self.calls.append(("collect", pending.step))
        return ()


@dataclasses.dataclass
class Flight:
    step: int
    ready: bool

    def done(self) -> bool:
        return self.ready


@pytest.mark.parametrize(("done", "order"), [
    (set(), ["launch 1", "launch 2", "collect 1", "collect 2"]),
    ({1, 2}, ["launch 1", "collect 1", "launch 2", "collect 2"]),
])  # fmt: skip
def test_what_is_done_is_reported_before_the_next_step_and_nothing_waits_while_a_plan_does(
    done: set[int], order: list[str]
) -> None:
    slow, plans, reports = Slow(done), queue.SimpleQueue[StepPlan | None](), list[StepResult | BaseException]()

    def report(result: StepResult | BaseException) -> None:
        reports.append(result)
        if len(reports) == 2:
            plans.put(None)

    for seq in (1, 2):
        plans.put(plan(seq, row(0, seq, (1,))))
    Worker(slow).run(plans, report)  # type: ignore[arg-type]
    assert [f"{call} {step}" for call, step in slow.calls] == order
    assert [result.seq for result in reports if isinstance(result, StepResult)] == [1, 2]


class Late:
    """Plans of which the second comes only after the worker has looked for it in vain."""

    def __init__(self, looks: int) -> None:
        """`looks`: how often in vain."""
        one, two = plan(1, row(0, 1, (1,))), plan(2, row(0, 2, (1,)))
        self._coming: list[StepPlan | None] = [one, *[None] * looks, two]

    def empty(self) -> bool:
        return True

    def get(self, timeout: float | None) -> StepPlan | None:
        if not self._coming:
            return None
        coming = self._coming.pop(0)
        if coming is None:
            assert timeout is not None, "a step is in flight, and may end meanwhile"
            raise queue.Empty
        return coming


@pytest.mark.parametrize(("depth", "order"), [
    (0, ["launch 1", "collect 1", "launch 2", "collect 2"]),
    (1, ["launch 1", "launch 2", "collect 1"]),
])  # fmt: skip
def test_a_plan_that_comes_while_a_step_runs_is_launched_before_that_step_is_waited_for(
    depth: int, order: list[str]
) -> None:
    slow = Slow(set())
    Worker(slow, depth=depth).run(Late(looks=2 * depth), lambda _: None)  # type: ignore[arg-type]
    assert [f"{call} {step}" for call, step in slow.calls][: len(order)] == order


def test_a_bug_in_a_step_is_reported_and_nothing_after_it_is_carried_out() -> None:
    plans, reports = queue.SimpleQueue[StepPlan | None](), list[StepResult | BaseException]()
    plans.put(plan(1, row(0, 1, (1,))))
    plans.put(plan(2, row(0, 2, token_of=TokenOf(StepSeq(0), 0))))
    plans.put(plan(3, row(0, 3, (1,))))
    Worker(executor()).run(plans, reports.append)
    assert [type(report) for report in reports] == [StepResult, BrokenInvariant]
