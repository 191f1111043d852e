"""Why ranks were lost: the first cause is named, whatever the others say because of it."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.exec.cpu import Computed, CpuExecutor
from agentspeed_engine.exec.ranks import group
from agentspeed_engine.exec.ranks.group import GroupBroken
from agentspeed_engine.exec.step_input import StepInput
from agentspeed_engine.ids import StepSeq
from agentspeed_engine.sched.plan import StepPlan
from agentspeed_engine.serve import __main__ as engine_process
from agentspeed_engine.serve import rank_processes
from agentspeed_engine.serve.loop import EngineLoop
from agentspeed_engine.serve.options import build, options_from
from agentspeed_engine.serve.rank_options import RankOptions
from agentspeed_engine.serve.rank_process import RankStart, visible_gpus
from agentspeed_engine.serve.rank_processes import RankProcesses
from tests.support.engine_client import until

OPTIONS = RankOptions(model="noop:64:0", dtype="float32", device="cpu", pages=1, page_tokens=4, threads=1,
                      host_slots=0, tp=4, ep=None, rank=0, seconds=2.0)  # fmt: skip
BUG = EngineFault("internal", "Rank 1: RuntimeError: connection closed", "This is a bug of the engine.")
MEMORY = EngineFault("out_of_memory", "Rank 1: no room", "Use fewer pages.")


class FakeProcess:
    """`RankProcess` that runs until a test says otherwise."""

    def __init__(self, options: RankOptions, memory: object, heard: Any) -> None:
        self.rank, self.heard = options.rank, heard
        self.pid = 1000 + options.rank
        self.fault: EngineFault | None = None
        self.left, self.ended = "", ""
        self.late: int | None = None
        self.start = RankStart()
        self.steps: Any = None
        self.copies: Any = None

    def tell_end(self) -> None:
        self.ended = self.ended or "ended"

    def end(self, until: float) -> None:
        pass


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankProcesses]:
    monkeypatch.setattr(rank_processes, "RankProcess", FakeProcess)
    monkeypatch.setattr(rank_processes, "_NEWS_SECONDS", 0.0)
    made = RankProcesses(OPTIONS, lambda text: None)
    monkeypatch.setattr(made, "_starting", False)
    yield made
    made.close()


def named(ranks: RankProcesses, late: int | None = None) -> str:
    fault = ranks.fault(GroupBroken("they did not come", late))
    assert fault is not None
    return fault.message


def ends(ranks: RankProcesses, rank: int, how: str, **said: Any) -> None:
    process: Any = ranks.all[rank - 1]
    process.ended = how
    for name, value in said.items():
        setattr(process, name, value)


def test_a_killed_rank_is_the_reason_and_not_the_bug_that_another_saw_because_of_it(ranks: RankProcesses) -> None:
    ends(ranks, 1, "ended with status 70", fault=BUG)
    assert named(ranks) == BUG.message
    ends(ranks, 2, "was killed by signal 9")
    assert named(ranks) == "Rank 2 (process 1002) was killed by signal 9."


@pytest.mark.parametrize("heard_by_rank_0", [True, False])
def test_a_rank_that_hangs_is_the_reason_and_not_those_that_waited_for_it(
    ranks: RankProcesses, heard_by_rank_0: bool
) -> None:
    ends(ranks, 1, "ended with status 70", fault=BUG)
    ends(ranks, 2, "ended with status 3", left="rank 3 did not come in time", late=None if heard_by_rank_0 else 3)
    assert named(ranks, 3 if heard_by_rank_0 else None) == (
        "Rank 3 (process 1003) did not answer for 2 s (rank_seconds)."
    )


def test_rank_0_is_named_where_the_others_waited_for_it(ranks: RankProcesses) -> None:
    ends(ranks, 1, "ended with status 3", left="rank 0 did not come in time", late=0)
    assert named(ranks).startswith(f"Rank 0 (process {os.getpid()}) did not answer")


@pytest.mark.parametrize("rank_0", [1, 2], ids=["waits along tp", "waits along dp"])
def test_of_ranks_that_wait_for_each_other_in_a_row_the_last_is_named(
    monkeypatch: pytest.MonkeyPatch, rank_0: int
) -> None:
    """Of four ranks in lock-step rank 3 hangs, for which 1 and 2 wait, and 0 for one of them."""
    monkeypatch.setattr(rank_processes, "RankProcess", FakeProcess)
    monkeypatch.setattr(rank_processes, "_NEWS_SECONDS", 0.0)
    with closing(RankProcesses(replace(OPTIONS, dp=2, tp=2, lock_step=True), lambda text: None)) as four:
        ends(four, 1, "ended with status 3", left="rank 3 did not come in time", late=3)
        ends(four, 2, "ended with status 3", left="rank 0 did not come in time", late=0)
        assert named(four, rank_0) == "Rank 3 (process 1003) did not answer for 2 s (rank_seconds)."


def test_what_a_rank_could_not_do_is_the_reason_before_all_else(ranks: RankProcesses) -> None:
    ends(ranks, 1, "ended with status 2", fault=MEMORY)
    ends(ranks, 2, "was killed by signal 6")
    ends(ranks, 3, "ended with status 3", left="a rank gave up")
    assert named(ranks) == MEMORY.message


def test_a_rank_that_ended_by_itself_is_named_before_those_that_gave_up(ranks: RankProcesses) -> None:
    ends(ranks, 1, "ended with status 3", left="a rank gave up")
    assert named(ranks) == "Rank 1 (process 1001) gave up: a rank gave up."
    ends(ranks, 2, "ended with status 1")
    assert named(ranks) == "Rank 2 (process 1002) ended with status 1."


def test_a_rank_that_ends_before_it_has_met_the_others_is_noticed_by_its_end(
    ranks: RankProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over torch.distributed, whose own limit is two minutes. Rank 0 does not begin to meet them."""

    class Meets:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("rank 0 would wait for a rank that is dead")

    monkeypatch.setattr(group, "TorchGroup", Meets)
    monkeypatch.setattr(ranks, "_memory", None)
    for one in ranks.all:
        process: Any = one
        if one.rank == 2:
            ends(ranks, 2, "was killed by signal 9")
            process.heard(one, None)
        else:
            process.heard(one, {"arrived": True})
    with pytest.raises(EngineFault, match=r"Rank 2 \(process 1002\) was killed by signal 9"):
        _ = ranks.group()


# ---- the start ----------------------------------------------------------------------------------------------------
@pytest.fixture
def impatient(ranks: RankProcesses, monkeypatch: pytest.MonkeyPatch) -> RankProcesses:
    """Of them rank 2 says nothing any more; the others just did."""
    monkeypatch.setattr(rank_processes, "_START_SECONDS", 0.2)
    monkeypatch.setattr(rank_processes, "_LOOKS", 0.01)
    monkeypatch.setattr(rank_processes, "_ENDING", 0.2)
    monkeypatch.setattr(ranks, "_options", replace(OPTIONS, seconds=0.1))
    monkeypatch.setattr(ranks, "_starting", True)
    for one in ranks.all:
        one.start.hear({"doing": "reading its weights: 40 %"})
        if one.rank != 2:
            one.start.heard = math.inf
    return ranks


SILENT = r"Rank 2 \(process 1002\) said nothing for 0.2 s while it started; the last that it said of its start: "


@pytest.mark.parametrize("awaited", [RankProcesses.await_loaded, RankProcesses.await_readiness])
def test_a_rank_that_hangs_while_it_loads_is_named_with_what_it_did(impatient: RankProcesses, awaited: Any) -> None:
    began = time.monotonic()
    with pytest.raises(EngineFault, match=SILENT + "reading its weights: 40 %") as lost:
        awaited(impatient)
    assert lost.value.code == "rank_lost" and time.monotonic() - began < 5


def test_a_rank_that_says_how_far_it_is_may_take_as_long_as_it_takes(impatient: RankProcesses) -> None:
    def reads() -> None:
        for part in range(10):
            time.sleep(0.05)
            impatient.all[1].start.hear({"doing": f"reading its weights: {50 + part} %"})
        for one in impatient.all:
            fake: Any = one
            fake.heard(one, {"ready": True})

    thread = threading.Thread(target=reads)
    thread.start()
    impatient.await_readiness()
    thread.join()


def test_what_takes_rank_0_long_may_take_the_others_as_long(impatient: RankProcesses) -> None:
    """Rank 0 reads its own piece before it waits for theirs."""
    impatient.all[1].start.heard = -math.inf

    def ready() -> None:
        for one in impatient.all:
            fake: Any = one
            fake.heard(one, {"ready": True})

    soon = threading.Timer(0.05, ready)
    soon.start()
    impatient.await_readiness()
    soon.join()


class Given:
    """A group whose kernels end when it is given up."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def abandon(self) -> None:
        self.over.set()

    def close(self) -> None:
        assert self.over.is_set()


def test_whoever_captures_beside_a_rank_that_hangs_waits_for_it_no_longer(
    impatient: RankProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = Given()
    monkeypatch.setattr(impatient, "_group", group)
    with pytest.raises(EngineFault, match=SILENT):
        impatient.together(lambda: [group.over.wait(60)])
    impatient.close()


def test_not_even_where_nothing_ends_what_it_does(impatient: RankProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    group: Any = Given()
    monkeypatch.setattr(group, "close", never.wait)
    monkeypatch.setattr(impatient, "_group", group)
    with pytest.raises(EngineFault, match=SILENT):
        impatient.together(lambda: [never.wait(60)])
    impatient.close()
    never.set()


def test_what_goes_wrong_in_a_capture_is_told_as_it_is(impatient: RankProcesses) -> None:
    def fails() -> None:
        raise GroupBroken("they did not come", 1)

    with pytest.raises(GroupBroken, match="they did not come"):
        impatient.together(fails)


def test_a_rank_that_is_ready_may_be_silent_while_rank_0_captures(impatient: RankProcesses) -> None:
    impatient.all[1].start.hear({"ready": True})
    impatient.all[1].start.heard = -math.inf
    impatient.together(lambda: time.sleep(0.1))


def test_of_ranks_that_waited_in_vain_at_the_start_the_one_that_is_at_it_still_is_named(
    impatient: RankProcesses,
) -> None:
    """Over sockets nobody knows who did not come."""
    for rank in (1, 3):
        ends(impatient, rank, "ended with status 3", left="a connection timed out")
    impatient.all[1].start.hear({"doing": "capturing steps: 3 graphs"})
    wanted = "Rank 2 (process 1002) did not come to the others within 0.1 s (rank_seconds); the last that it said of "
    assert named(impatient) == wanted + "its start: capturing steps: 3 graphs."


@pytest.mark.skipif(sys.platform != "linux", reason="a process is stopped by a signal")
def test_a_process_that_hangs_at_its_start_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_processes, "_START_SECONDS", 0.5)
    made = RankProcesses(replace(OPTIONS, tp=2, seconds=0.1), lambda text: None)
    try:
        other = made.all[0].pid
        os.kill(other, signal.SIGSTOP)
        with pytest.raises(EngineFault, match=rf"Rank 1 \(process {other}\) said nothing for 0.5 s"):
            made.await_readiness()
    finally:
        made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_whoever_waits_for_a_rank_waits_no_more_when_the_engine_ends(
    ranks: RankProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, launch = threading.Event(), CpuExecutor.launch

    def hangs(executor: CpuExecutor, step: StepInput) -> Computed:
        waits.set()
        until("the ranks are told to end", lambda: all(one.ended for one in ranks.all))
        return launch(executor, step)

    monkeypatch.setattr(CpuExecutor, "launch", hangs)
    loop = EngineLoop(dataclasses.replace(build(options_from({"model": "noop:64:0"})), ranks=ranks))
    thread = threading.Thread(target=loop.run)
    thread.start()
    loop._schedulers._plans[0].put(StepPlan(StepSeq(1), ()))
    assert waits.wait(5)
    began = time.monotonic()
    loop.stop()
    thread.join(10)
    assert time.monotonic() - began < 2


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
@pytest.mark.parametrize("failing", [0, 1, 2], ids=["the process", "the first thread", "the second thread"])
def test_a_rank_that_cannot_be_started_is_named_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: int
) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def starts(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == failing:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starts)
    monkeypatch.setattr("sys.executable", "/bin/true" if failing else "/no/such/program")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(EngineFault, match="Rank 1 could not be started") as refused:
        _ = RankProcesses(OPTIONS, lambda text: None)
    assert refused.value.code == "out_of_memory"
    assert len(os.listdir("/proc/self/fd")) == len(before) and not list(tmp_path.iterdir())


def test_ranks_end_with_an_engine_that_cannot_begin(
    ranks: RankProcesses, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = options_from({"model": "noop:64:0", "record": str(tmp_path / "file" / "records")})
    (tmp_path / "file").write_text("no folder")
    built = dataclasses.replace(build(options), ranks=ranks)
    monkeypatch.setattr(engine_process, "build", lambda options, say, share: built)
    with pytest.raises(EngineFault):
        _ = engine_process.serve(
            tmp_path / "socket", options, engine_process._Status(None), stay=True, own_folder=False
        )
    assert all(one.ended for one in ranks.all)


@pytest.mark.parametrize(
    ("named", "rank", "seen"),
    [(None, 1, "1,0,2"), (None, 0, "0,1,2"), ("4,6,7", 2, "7,4,6"), ("4", 2, "2,4")],
)
def test_a_rank_sees_its_own_gpu_first_and_those_of_others_behind_it(
    monkeypatch: pytest.MonkeyPatch, named: str | None, rank: int, seen: str
) -> None:
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus(rank, 3) == seen
