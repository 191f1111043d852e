"""What `bench/spmd.py` measures of ranks as processes: what a step costs more, whether tokens are equal, and kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from agentspeed import Engine, Session, errors
from agentspeed._core.engine_options import EngineOptions
from agentspeed_engine.exec.cpu import CpuExecutor
from agentspeed_engine.exec.executor import Executor
from agentspeed_engine.exec.step_input import Sample, StepInput
from agentspeed_engine.kv.views import TurnSpec
from agentspeed_engine.models.inputs import FlatBatch, Run
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.serve.options import build, options_from
from tests.support.engine_client import alive, engine
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.rank_workload import OPTIONS, drawn

GREEDY = wire.Sampling()
HOT = wire.Sampling(temperature=0.8)
_STEPS = 50
"""Of one timing; both sides take turns, so that what else the machine does falls on both."""
_VOCABULARY = 32_000
_HIDDEN = 2048
_PAGES_EACH = 18
"""Of two pools instead of one: room for one of the two or three sessions that each gets."""


# ---- what a step costs more ---------------------------------------------------------------------------------------
def step_overhead_us(rounds: int) -> dict[str, float]:
    """Microseconds that a step of one row takes longer on two ranks than on one, with a model that computes nothing:
    telling it, and drawing together. Medians of rounds."""
    with _executor(1) as alone, _executor(2) as pair:
        found: dict[str, float] = {}
        for name, sampling in (("rank_step_overhead_us", GREEDY), ("rank_step_overhead_sampled_us", HOT)):
            seconds: dict[Executor, list[float]] = {alone: [], pair: []}
            for number in range(rounds):
                for executor in (alone, pair) if number % 2 else (pair, alone):
                    seconds[executor].append(_step_seconds(executor, sampling))
            apart = statistics.median(seconds[pair]) - statistics.median(seconds[alone])
            found[name] = round(apart * 1e6, 1)
    return found


@contextmanager
def _executor(tp: int) -> Iterator[Executor]:
    built = build(options_from({"model": f"noop:{_VOCABULARY}:0", "pages": 64, "tp": tp}))
    try:
        yield built.executors[0] if built.executors else CpuExecutor(built.model, built.vocabulary)
    finally:
        if built.ranks is not None:
            built.ranks.close()


def _step_seconds(executor: Executor, sampling: wire.Sampling) -> float:
    one = np.zeros(1, dtype=np.int64)
    tail = Run(pages=one.astype(np.int32), start=0, tokens=1, queries=one.astype(np.int32), causal=True)
    batch = FlatBatch(ids=one + 5, positions=one, slots=one, runs=(tail,), select=one)
    spec: Any = TurnSpec(
        turn=1, branch=1, sampling=sampling, draw_key=(1, 2, 0), stop_strings=(), grammar=None, consumed_ids=(),
        prompt_tokens=1,
    )  # type: ignore[arg-type]  # fmt: skip
    started = time.perf_counter()
    for step in range(_STEPS):
        _ = executor.collect(executor.launch(StepInput(step=step, batch=batch, samples=(Sample(spec, 1),))))
    return (time.perf_counter() - started) / _STEPS


_SUMS = """
import sys, time, os
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from agentspeed_engine.exec.ranks.group import SharedMemory, TorchGroup
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import Collective
rank, file, folder = Mesh(tp=2).rank(int(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
step = Collective(kind="all_reduce", axis="tp", value="x", dim=0, width={hidden}, between=("a", "b"))
groups = {{"shared": SharedMemory(file, rank, seconds=60)}}
groups["gloo"] = TorchGroup(folder, rank, seconds=60, device=torch.device("cpu"))
best = {{}}
for _ in range(9):
    for name, group in groups.items():
        value = torch.ones(1, {hidden})
        started = time.perf_counter()
        for _ in range(100):
            group.comm.apply(step, value, (1,))
        best.setdefault(name, []).append((time.perf_counter() - started) / 100)
if rank.index == 0:
    print({{name: round(sorted(all)[len(all) // 2] * 1e6, 1) for name, all in best.items()}})
"""


def sum_us(scratch: Path) -> dict[str, float]:
    """Microseconds of a sum over two ranks of one row, through shared memory and through gloo. Medians."""
    from agentspeed_kernels.cpu.group_layout import shared_bytes

    file = os.memfd_create("sums")
    os.truncate(file, shared_bytes(2))
    code = _SUMS.format(paths=[path for path in sys.path if path], hidden=_HIDDEN)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(file), str(scratch)], stdout=subprocess.PIPE, pass_fds=(file,)
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[0].decode() for rank in ranks]
    os.close(file)
    if any(rank.returncode for rank in ranks):
        raise AssertionError("a rank failed")
    spent: dict[str, float] = json.loads(said[0].replace("'", '"'))
    return {f"sum_us_{name}": each for name, each in spent.items()}


# ---- tokens -------------------------------------------------------------------------------------------------------
def tokens_equal(scratch: Path) -> dict[str, int]:
    """1 where every turn of the workload draws on so many ranks what it draws in one process, in float64. Every pool is
    too small for the sessions that it gets: rows are pushed out to the host, and turns preempted."""
    folder = make_checkpoint(CONFIG, scratch / "model", seed=3, dtype="float64")
    turns: dict[str, list[list[int]]] = {}
    for name, ranks, pages in (
        ("one", {}, OPTIONS["pages"]),
        ("tp2", {"tp": 2}, OPTIONS["pages"]),
        ("tp4", {"tp": 4}, OPTIONS["pages"]),
        ("dp2", {"dp": 2}, _PAGES_EACH),
        ("dp2_tp2", {"dp": 2, "tp": 2}, _PAGES_EACH),
    ):
        place = scratch / name
        place.mkdir()
        with engine(place, model=str(folder), **(OPTIONS | {"pages": pages} | ranks)) as process:
            front = process.connect()
            turns[name] = [ids for seed in range(3) for ids, _ in drawn(front, seed=seed)]
            stats = front.ask(wire.GetStats(request=front.number()), wire.Stats)
        counts = stats.counts
        worked = all(counts[what] for what in ("preemptions", "pages_loaded", "pages_copied"))
        if not (worked and all(one["pages_nodes"] for one in stats.dp)):
            raise AssertionError(f"the workload did not do what it is for: {counts}")
    wanted = turns.pop("one")
    return {f"tokens_equal_{name}": int(found == wanted) for name, found in turns.items()}


# ---- kills --------------------------------------------------------------------------------------------------------
def kills(scratch: Path, count: int) -> dict[str, float]:
    """A random one of two ranks is killed while sessions draw, again and again: half of the kills with tp, half with
    dp. A session is lost when its log lost what was committed or its next turn fails; seconds are from the kill until
    every session has drawn again."""
    folder = make_checkpoint(CONFIG, scratch / "killed", seed=4)
    seconds: dict[str, list[float]] = {"tp": [], "dp": []}
    lost = left = 0

    async def run(axis: str, times: int) -> None:
        nonlocal lost, left
        more = await _kills(folder, axis, times, seconds[axis])
        lost, left = lost + more[0], left + more[1]

    for axis, times in (("tp", count - count // 2), ("dp", count // 2)):
        anyio.run(run, axis, times)
    every = sorted(seconds["tp"] + seconds["dp"])
    return {
        "kills": count,
        "kills_dp": len(seconds["dp"]),
        "kill_sessions_lost": lost,
        "kill_processes_left": left,
        "kill_usable_seconds_p50": round(statistics.median(every), 2),
        "kill_usable_seconds_p99": round(every[min(len(every) - 1, int(0.99 * len(every)))], 2),
    }


def killed_on_gpus(folder: Path, ranks: int, device: str, count: int = 1) -> dict[str, float]:
    """As `kills`, with a GPU for each rank; never rank 0, which is the engine's own process."""
    seconds: list[float] = []
    options = EngineOptions(tp=ranks, device=device)  # type: ignore[typeddict-item]
    lost, left = anyio.run(_kills, folder, "tp", count, seconds, options, 1)
    return {
        "kill_sessions_lost": lost,
        "kill_processes_left": left,
        "kill_usable_seconds": round(max(seconds), 1),
    }


async def _kills(
    folder: Path,
    axis: str,
    count: int,
    seconds: list[float],
    options: EngineOptions | None = None,
    first: int = 0,
) -> tuple[int, int]:
    """(Sessions lost, processes left); adds to `seconds`. `first`: of the ranks of which one is killed."""
    noise = random.Random(f"7 {axis}")
    lost = left = 0
    given = options or (EngineOptions(tp=2) if axis == "tp" else EngineOptions(dp=2))
    async with (
        Engine(folder, **(given | EngineOptions(pages=128, context_limit=1024))) as one,
        one.session() as a,
        one.session() as b,
        one.session() as c,
        one.session() as d,
    ):
        sessions = (a, b, c, d)
        for session in sessions:
            _ = await session.generate("Begin.", max_tokens=4)
        marks = [await session.mark() for session in sessions]
        for number in range(count):
            pids = await _pids(one)
            before = [session.ids for session in sessions]
            async with anyio.create_task_group() as tasks:
                for session in sessions:
                    _ = tasks.start_soon(_disturbed, session)
                await anyio.sleep(noise.uniform(0.0, 0.1))
                os.kill(noise.choice(pids[first:]), signal.SIGKILL)
                killed = time.monotonic()
            lost += sum(session.ids[: len(ids)] != ids for session, ids in zip(sessions, before, strict=True))
            for session in sessions:
                try:
                    reply = await session.generate("On.", max_tokens=2)
                    lost += len(reply.ids) < 1
                except errors.AgentspeedError as error:
                    print(f"kill {number}: a session is lost: {error}", file=sys.stderr)
                    lost += 1
            seconds.append(time.monotonic() - killed)
            print(f"{axis} kill {number + 1}: usable again after {seconds[-1]:.1f} s", file=sys.stderr)
            left += sum(map(alive, pids))
            for session, mark in zip(sessions, marks, strict=True):
                await session.rewind(mark)
    return lost, left


async def _pids(one: Engine) -> list[int]:
    picture = await (await one.link()).call(lambda number: wire.Look(request=number, branches=0))
    assert isinstance(picture, wire.Picture)
    return [rank.pid for rank in picture.ranks]


async def _disturbed(session: Session) -> None:
    with contextlib.suppress(errors.EngineDied):  # what is asked for here
        _ = await session.generate("More.", max_tokens=200)
