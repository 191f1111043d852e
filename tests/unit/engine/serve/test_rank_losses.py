"""Why ranks were lost: the first cause is named, whatever the others say because of it."""

from __future__ import annotations

import dataclasses
import os
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
    assert rank_processes.visible_gpus(rank, 3) == seen
