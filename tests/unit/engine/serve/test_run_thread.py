"""The engine loop in a thread: the same frames and rules; host copies; a bug that must not be swallowed."""

from __future__ import annotations

import itertools
import json
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentspeed_engine.clock import VirtualClock
from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.copies import Copied, Copier
from agentspeed_engine.exec.executor import CopyFailed
from agentspeed_engine.exec.torch_model import TorchModel
from agentspeed_engine.ids import PageId, SlotId, TicketId
from agentspeed_engine.models.catalog import load
from agentspeed_engine.sched.plan import HostCopy, StepPlan
from agentspeed_engine.sched.state import Out
from agentspeed_engine.serve.in_thread import EngineThread
from agentspeed_engine.serve.loop import EngineLoop
from agentspeed_engine.serve.options import EngineOptions, build, options_from, parse_options
from agentspeed_engine.serve.schedulers import Heard
from tests.support.engine_client import Front, LinkClosed
from tests.support.random_checkpoint import make_checkpoint
from tests.support.remembering_model import RememberingModel

NOOP = EngineOptions(model="noop:512:0", pages=100, context_limit=2048, check_every_step=True)


def test_a_thread_serves_the_frames_of_a_process() -> None:
    engine = EngineThread(NOOP)
    with engine.connect() as first, engine.connect() as second:
        front, other = Front(first), Front(second)
        assert front.welcome.vocab_size == 512
        branch = front.open([1, 2])
        assert front.generate(branch, max_tokens=3).ids == [3, 4, 5]
        (child,) = front.fork(branch)
        assert front.generate(child, [9], max_tokens=1).ids == [10]
        other.open([1])
        assert front.counts()["links"] == 2
        engine.close()
        with pytest.raises(LinkClosed):
            front.open([1])


def test_a_closed_engine_thread_is_gone() -> None:
    before = set(threading.enumerate())
    engine = EngineThread(NOOP)
    assert set(threading.enumerate()) - before
    engine.close()
    assert not set(threading.enumerate()) - before


def test_an_engine_that_ends_by_itself_closes_no_pipe_that_somebody_is_about_to_write_to() -> None:
    engine = EngineThread(NOOP)
    loop = engine._loop
    with loop._pipe:  # as `stop` has it, between its look at the pipe and its write
        loop.stop()
        engine._thread.join(timeout=0.5)
        assert engine._thread.is_alive()
        assert os.fstat(loop._wake_write)
    engine.close()
    loop.stop()
    with pytest.raises(OSError, match="Bad file descriptor"):
        _ = os.fstat(loop._wake_write)


def test_options_that_cannot_be_are_refused_before_a_thread_starts() -> None:
    before = set(threading.enumerate())
    with pytest.raises(EngineFault, match="L1"):
        EngineThread(EngineOptions(model="noop:512:0", pages=2, context_limit=2048))
    assert not set(threading.enumerate()) - before


# ---- options ------------------------------------------------------------------------------------------------------
def test_options_come_from_json_and_from_flags_alike() -> None:
    text = parse_options('{"model": "m", "pages": 7, "dtype": "float64", "check_every_step": true}')
    flags = options_from({"model": "m", "pages": "7", "dtype": "float64", "check_every_step": "true"})
    assert text == flags


@pytest.mark.parametrize(
    "wrong",
    [{"page_tokens": 0}, {"threads": 0}, {"dtype": "float8"}, {"outbox_bytes": 1}, {"ticket_deadline": 0},
     {"ticket_deadline": "nan"}, {"pages": 1.5}, {"unknown": 1}, {"model": None}],
)  # fmt: skip
def test_a_wrong_option_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(EngineFault, match=next(iter(wrong))) as fault:
        options_from({"model": "noop:64:0"} | wrong)
    assert fault.value.code == "bad_options"


def test_without_a_limit_the_context_is_what_the_pool_can_carry() -> None:
    core = build(EngineOptions(model="noop:64:0", pages=11, page_tokens=16)).core
    assert core.context_limit == 160
    core.check()


def test_without_pages_the_pool_is_bounded_and_valid() -> None:
    core = build(EngineOptions(model="noop:64:0")).core
    core.check()
    assert core.context_limit == 65_536


# ---- host copies --------------------------------------------------------------------------------------------------
class Reports:
    """What the copier's thread said."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Copied | Exception] = queue.SimpleQueue()

    def __call__(self, report: Copied | Exception) -> None:
        self._queue.put(report)

    def next(self) -> Copied | Exception:
        return self._queue.get(timeout=5)


def copy(ticket: int, direction: Any, pages: tuple[int, ...], slots: tuple[int, ...]) -> HostCopy:
    return HostCopy(TicketId(ticket), direction, tuple(map(PageId, pages)), tuple(map(SlotId, slots)))


def test_rows_come_back_from_the_host_as_they_were() -> None:
    model, reports = RememberingModel(pages=8, page_tokens=4, vocab_size=9), Reports()
    model.reserve_host(4)
    model.pool[:] = np.arange(64).reshape(32, 2)
    copier = Copier(model, reports)
    copier.start(copy(1, "save", (5, 2), (3, 0)))
    assert reports.next() == Copied(TicketId(1), True)
    expected = model.pool.reshape(8, 4, 2)[[5, 2]].copy()
    model.pool[:] = -1
    copier.start(copy(2, "load", (1, 6), (3, 0)))
    assert reports.next() == Copied(TicketId(2), True)
    assert (model.pool.reshape(8, 4, 2)[[1, 6]] == expected).all()
    copier.close(5)


def test_a_failed_copy_is_reported_and_the_next_is_carried_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, reports = RememberingModel(pages=8, page_tokens=4, vocab_size=9), Reports()
    model.reserve_host(4)
    copier = Copier(model, reports)
    with monkeypatch.context() as patched:
        patched.setattr(model, "save", _fails)
        copier.start(copy(1, "save", (1,), (1,)))
        assert reports.next() == Copied(TicketId(1), False)
    assert "planted" in capfd.readouterr().err
    copier.start(copy(2, "save", (1,), (1,)))
    assert reports.next() == Copied(TicketId(2), True)
    copier.close(5)


class Gate:
    """An executor whose first copy waits until the others were ordered; it notes what was copied together."""

    def __init__(self, bad: int = -1) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.calls, self._bad = list[tuple[str, list[int]]](), bad

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._copy("save", pages)

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._copy("load", pages)

    def _copy(self, direction: str, pages: Sequence[int]) -> None:
        self.calls.append((direction, list(pages)))
        self.begun.set()
        assert self.open.wait(30)
        if self._bad in pages:
            raise CopyFailed("planted")


def carried_out(gate: Gate, orders: Sequence[HostCopy]) -> list[object]:
    """Reports of all, in their order; all but the first were ordered while that ran."""
    reports = Reports()
    copier = Copier(gate, reports)
    copier.start(orders[0])
    assert gate.begun.wait(30)
    for order in orders[1:]:
        copier.start(order)
    gate.open.set()
    found = [reports.next() for _ in orders]
    copier.close(5)
    return found


def test_copies_that_wait_behind_another_and_go_the_same_way_are_made_together() -> None:
    gate = Gate()
    ways = ["save"] * 3 + ["load"] * 2 + ["save"]
    orders = [copy(number, way, (number,), (number,)) for number, way in enumerate(ways)]
    assert carried_out(gate, orders) == [Copied(TicketId(number), True) for number in range(6)]
    assert gate.calls == [("save", [0]), ("save", [1, 2]), ("load", [3, 4]), ("save", [5])]


def test_so_many_pages_are_copied_together_and_no_more() -> None:
    gate, page = Gate(), itertools.count()
    orders = [copy(number, "load", tuple(next(page) for _ in range(30)), tuple(range(30))) for number in range(5)]
    assert carried_out(gate, orders) == [Copied(TicketId(number), True) for number in range(5)]
    assert [len(pages) for _, pages in gate.calls] == [30, 60, 60]


def test_of_copies_that_fail_together_those_that_can_be_made_are(capfd: pytest.CaptureFixture[str]) -> None:
    gate = Gate(bad=2)
    orders = [copy(number, "save", (number,), (number,)) for number in range(4)]
    assert carried_out(gate, orders) == [Copied(TicketId(number), number != 2) for number in range(4)]
    assert gate.calls == [("save", [0]), ("save", [1, 2, 3]), ("save", [1]), ("save", [2]), ("save", [3])]
    assert capfd.readouterr().err.count("planted") == 1


def test_a_copy_that_comes_too_late_is_not_begun(capfd: pytest.CaptureFixture[str]) -> None:
    model, reports = RememberingModel(pages=8, page_tokens=4, vocab_size=9), Reports()
    model.reserve_host(4)
    model.pool[:] = 3
    clock = VirtualClock(10.0)
    copier = Copier(model, reports, clock)
    late, timely = copy(1, "save", (1,), (1,)), copy(2, "save", (1,), (2,))
    copier.start(replace(late, begin_by=9.0))
    copier.start(replace(timely, begin_by=10.0))
    assert [reports.next(), reports.next()] == [Copied(TicketId(1), False), Copied(TicketId(2), True)]
    assert (model.host[1] == 0).all(), "its slot may have another owner"
    assert (model.host[2] == 3).all()
    assert "too late" in capfd.readouterr().err
    copier.close(5)


def test_a_copy_says_that_it_begins_before_it_looks_at_the_clock() -> None:
    model, reports = RememberingModel(pages=8, page_tokens=4, vocab_size=9), Reports()
    model.reserve_host(4)
    heard: list[list[TicketId]] = []

    class Watched:
        def now(self) -> float:
            heard.append(copier.begun())
            return 10.0

    copier = Copier(model, reports, Watched())
    copier.start(replace(copy(1, "save", (1,), (1,)), begin_by=11.0))
    assert reports.next() == Copied(TicketId(1), True)
    assert heard[0] == [TicketId(1)]
    assert copier.begun() == []
    copier.close(5)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("seconds", "begins"), [(0.9, True), (3600.0, False)])
def test_a_copy_that_queued_behind_another_is_begun_whether_that_failed_or_not_unless_it_took_too_long(
    fails: bool, seconds: float, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reports, clock = RememberingModel(pages=8, page_tokens=4, vocab_size=9), Reports(), VirtualClock(10.0)
    model.reserve_host(4)

    def takes_long(*_: object) -> None:
        clock.advance(seconds)
        if fails:
            raise CopyFailed("planted")

    monkeypatch.setattr(model, "load", takes_long)
    copier = Copier(model, reports, clock)
    copier.start(replace(copy(1, "load", (1,), (1,)), begin_by=11.0, patience=1.0))
    copier.start(replace(copy(2, "save", (1,), (1,)), begin_by=10.5, patience=1.0))
    assert [reports.next(), reports.next()] == [Copied(TicketId(1), not fails), Copied(TicketId(2), begins)]
    copier.close(5)


def test_a_plan_is_never_told_an_older_time_than_the_end_of_a_copy_that_the_core_has_heard_of() -> None:
    class Hastens:
        """An hour goes by between two looks at it."""

        def __init__(self) -> None:
            self._hours = itertools.count()

        def now(self) -> float:
            return 3600.0 * next(self._hours)

    loop = EngineLoop(build(NOOP), clock=Hastens())
    told: list[tuple[str, float]] = []
    core: Any = loop._cores.cores[0]
    plan, copied = core.plan, core.copied

    def planned(now: float) -> StepPlan | None:
        told.append(("plan", now))
        loop.stop()
        return plan(now)

    def ended(ticket: TicketId, ok: bool, now: float) -> Out:
        told.append(("copied", now))
        return copied(ticket, ok, now)

    core.plan, core.copied = planned, ended
    loop._report(Heard(0, Copied(TicketId(1), True)))
    loop.run()
    assert [name for name, _ in told] == ["copied", "plan"]
    assert told[0][1] < told[1][1]


def test_a_bug_in_a_copy_is_handed_to_the_loop() -> None:
    model, reports = RememberingModel(pages=8, page_tokens=4, vocab_size=9), Reports()
    copier = Copier(model, reports)
    copier.start(copy(1, "save", (100,), (0,)))
    assert isinstance(reports.next(), IndexError)
    copier.close(5)


def _fails(*_: object) -> None:
    raise CopyFailed("planted")


def test_a_real_models_pages_survive_the_host(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parents[4] / "bench/models/tiny.json").read_text())
    loaded = load(make_checkpoint(config, tmp_path), pages=6, page_tokens=4)
    model = TorchModel(loaded)
    with pytest.raises(CopyFailed, match="no host slots"):
        model.save([1], [0])
    model.reserve_host(3)
    (pool,) = loaded.pools.tensors
    pool[:, [1, 2]] = 0.5
    pool[:, 2, 0] = 0.25
    model.save([2, 1], [0, 2])
    model.load([2, 0], [4, 5])
    assert (pool[:, [4, 5]] == pool[:, [1, 2]]).all()
    assert (pool[:, 3] == 0).all(), "nobody asked for it"


def test_costs_are_measured_where_there_are_host_slots(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parents[4] / "bench/models/tiny.json").read_text())
    folder = str(make_checkpoint(config, tmp_path))
    plain = build(EngineOptions(model=folder, pages=8, page_tokens=16)).core
    assert plain.copy_seconds_per_token == plain.recompute_seconds_per_token == 0
    measured = build(EngineOptions(model=folder, pages=8, page_tokens=16, host_slots=3)).core
    assert 0 < measured.copy_seconds_per_token < 0.01
    assert 0 < measured.recompute_seconds_per_token < 0.1
