"""Rank 0 and those that follow it: what each is told, tokens that no step knows yet, and copies that all must make."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.automata import refusal
from agentspeed_engine.exec.batch import Batcher
from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.executor import CopyFailed, Executor, Refusal, Sampled
from agentspeed_engine.exec.noop import NoopModel
from agentspeed_engine.exec.ranks.follower import Follower
from agentspeed_engine.exec.ranks.group import GroupBroken
from agentspeed_engine.exec.ranks.orders import (
    Channel,
    CopyOrder,
    StepDone,
    batch_of,
    drawn_of,
    step_done,
    step_order,
)
from agentspeed_engine.exec.ranks.sides import Followers
from agentspeed_engine.exec.sampler import not_finite, ruled_out
from agentspeed_engine.exec.vocabulary import Vocabulary
from agentspeed_engine.ids import BranchId, NodeId, PageId, StepSeq
from agentspeed_engine.kv.views import NodeRun, PageCopy, TurnSpec
from agentspeed_engine.models.inputs import FlatBatch
from agentspeed_engine.protocol.messages import Grammar, Sampling
from agentspeed_engine.sched.plan import Row, StepPlan, TokenOf
from tests.support.thread_ranks import Meeting, ThreadGroup, leading

SIZE, PAGE = 64, 4
VOCABULARY = Vocabulary(Path("none"), SIZE, ())
HOT = Sampling(temperature=1.5, top_k=40, top_p=0.9, logprobs=3, repetition_penalty=1.3)


class Piece:
    """Logits by chance, the same on every rank, of which it gives those of its ids; it keeps what it was told."""

    page_tokens = PAGE

    def __init__(self, ids: range = range(SIZE), failing: str = "") -> None:
        self._ids, self._failing = ids, failing
        self.first_id = ids.start
        self.moved: list[object] = []

    def logits(self, batch: FlatBatch) -> NDArray[np.float64]:
        rows = [np.random.default_rng(int(one)).normal(size=SIZE) for one in batch.ids[batch.select]]
        return np.array(rows).reshape(-1, SIZE)[:, self._ids.start : self._ids.stop]

    def copy_rows(self, src_page: int, dst_page: int, rows: int) -> None:
        self.moved.append((src_page, dst_page, rows))

    def reserve_host(self, slots: int) -> None:
        raise NotImplementedError

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self.moved.append(("save", tuple(pages), tuple(slots)))
        if self._failing:
            raise CopyFailed(self._failing)

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self.moved.append(("load", tuple(slots), tuple(pages)))


def pieces(count: int, failing: str = "") -> list[Piece]:
    share = SIZE // count
    return [Piece(range(rank * share, (rank + 1) * share), failing if rank else "") for rank in range(count)]


def turn(number: int, sampling: Sampling = HOT, grammar: str | None = None) -> TurnSpec:
    return TurnSpec(turn=number, branch=BranchId(number), sampling=sampling, draw_key=(3, number, 0), stop_strings=(),
                    grammar=None if grammar is None else Grammar(source=grammar), consumed_ids=(), prompt_tokens=1,
                    seen=np.arange(9, dtype=np.uint32).tobytes())  # fmt: skip


def row(
    number: int, position: int, ids: tuple[int, ...], spec: TurnSpec | None, token_of: TokenOf | None = None
) -> Row:
    pages = tuple(PageId(4 * number + index) for index in range(4))
    return Row(BranchId(number), 1, position, ids, (), 0, pages, spec, token_of)


def carried_out(executor: Executor) -> list[Sampled]:
    """Three steps, of which the later ones name tokens of the one before."""
    batcher, specs = Batcher(PAGE), [turn(1), turn(2, Sampling(temperature=0.0, logprobs=0)), turn(3)]
    plans = [StepPlan(StepSeq(1), tuple(row(spec.turn, 0, (spec.turn,), spec) for spec in specs))]
    for seq in (2, 3):
        rows = (row(s.turn, seq - 1, (), s, TokenOf(StepSeq(seq - 1), at)) for at, s in enumerate(specs))
        copies = (PageCopy(PageId(1), PageId(seq), 3),)
        plans.append(StepPlan(StepSeq(seq), tuple(rows), copies, ended=(9,)))
    return [executor.collect(executor.launch(batcher.step_input(plan))) for plan in plans]


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_sample_what_one_process_samples_also_after_tokens_that_were_not_known(count: int) -> None:
    wanted = carried_out(CpuExecutor(Piece(), VOCABULARY, depth=1))
    models = pieces(count)
    with leading(models, VOCABULARY, depth=1) as executor:
        got = carried_out(executor)
    for mine, theirs in zip(got, wanted, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert not isinstance(one, Refusal) and not isinstance(other, Refusal)
            assert (one.id, [number for number, _ in one.top]) == (other.id, [number for number, _ in other.top])
            assert one.logprob == pytest.approx(other.logprob, abs=1e-12)
            assert one.draw_logprob == pytest.approx(other.draw_logprob, abs=1e-12)
    assert all(model.moved == [(1, 2, 3), (1, 3, 3)] for model in models), "every rank copies pages"


def test_a_turn_that_cannot_be_sampled_is_refused_alone() -> None:
    rows = (row(1, 0, (1,), turn(1, grammar="no grammar")), row(2, 0, (2,), turn(2)))
    step = Batcher(PAGE).step_input(StepPlan(StepSeq(1), rows))
    with leading(pieces(2), VOCABULARY) as executor:
        first, second = executor.collect(executor.launch(step))
    assert isinstance(first, Refusal) and not isinstance(second, Refusal)


def test_a_host_copy_counts_when_every_rank_has_made_it() -> None:
    models = pieces(2)
    with leading(models, VOCABULARY) as executor:
        executor.save([1, 2], [5, 6])
        executor.load([5], [3])
        assert all(model.moved == [("save", (1, 2), (5, 6)), ("load", (5,), (3,))] for model in models)
    with leading(pieces(3, failing="no memory"), VOCABULARY) as executor:
        with pytest.raises(CopyFailed, match="rank 1: no memory; rank 2: no memory"):
            executor.save([1], [5])
        executor.load([5], [1])  # the next one is not taken for the last


def test_a_rank_that_makes_no_host_copy_is_named_by_a_deadline() -> None:
    (ours, theirs), (steps, their_steps) = socket.socketpair(), socket.socketpair()
    with ours, theirs, steps, their_steps:
        followers = Followers([steps], [ours], seconds=0.05)
        with pytest.raises(GroupBroken) as broken:
            followers.copy(CopyOrder("save", (1,), (2,)), lambda: None)
    assert broken.value.late == 1


def test_a_bug_in_a_host_copy_ends_the_rank_as_one_in_a_step_does() -> None:
    class Broken(Piece):
        def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
            raise ValueError("a bug")

    (steps, their_steps), (copies, their_copies) = socket.socketpair(), socket.socketpair()
    group = ThreadGroup(Meeting(2), 1)
    with steps, their_steps, copies, their_copies, ThreadPoolExecutor(1) as pool:
        follower = Follower(Broken(), group, Channel(their_steps), Channel(their_copies))
        ended = pool.submit(follower.run)
        Channel(copies).send(msgspec.msgpack.encode(CopyOrder("save", (1,), (2,))))
        try:
            with pytest.raises(ValueError, match="a bug"):
                ended.result(5)
        finally:
            steps.shutdown(socket.SHUT_RDWR)
        with pytest.raises(GroupBroken):  # nobody waits for this rank
            _ = group.gather(np.zeros(1))


def test_a_step_arrives_as_it_was_told() -> None:
    path = (NodeRun(NodeId(1), 0, 8, (PageId(7), PageId(9))),)
    rows = [Row(BranchId(number), 1, 8, (4, 5, 6), path, 8, (PageId(20 + number),), turn(number)) for number in (1, 2)]
    batch = Batcher(PAGE).step_input(StepPlan(StepSeq(1), tuple(rows))).batch
    arrived = batch_of(step_order(batch, (), ()))
    assert batch.hidden.size
    for name in ("ids", "positions", "slots", "select", "hidden"):
        assert np.array_equal(getattr(arrived, name), getattr(batch, name))
        assert getattr(arrived, name).flags.writeable
    assert len(arrived.runs) == len(batch.runs) == 3
    for mine, theirs in zip(arrived.runs, batch.runs, strict=True):
        assert (mine.start, mine.tokens, mine.causal) == (theirs.start, theirs.tokens, theirs.causal)
        assert np.array_equal(mine.pages, theirs.pages) and np.array_equal(mine.queries, theirs.queries)


def test_of_a_refusal_it_arrives_too_whether_rows_may_be_at_fault() -> None:
    faults = [not_finite(), ruled_out(), EngineFault("bad_weights", "A file is cut short.", "Download it again.")]
    sent = msgspec.msgpack.encode(step_done(faults, 0.0, 0.0))
    told = drawn_of(msgspec.msgpack.decode(sent, type=StepDone))
    found = [refusal(one) for one in told if isinstance(one, EngineFault)]
    assert found == [refusal(one) for one in faults]
    assert [one.spoilt for one in found] == [True, False, False], "a code that others raise too says nothing of rows"


def test_a_step_without_rows_passes_every_rank() -> None:
    with leading([NoopModel(SIZE, 0.0, PAGE, ids=range(at, at + 32)) for at in (0, 32)], VOCABULARY) as executor:
        assert executor.collect(executor.launch(Batcher(PAGE).step_input(StepPlan(StepSeq(1), ())))) == ()
