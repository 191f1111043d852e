"""Several schedulers of one engine: they draw what one draws, each session on one of them, and end together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentspeed import Engine, errors
from agentspeed.transport.engine_process import EngineSlot
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.serve.in_thread import EngineThread
from agentspeed_engine.serve.options import options_from
from agentspeed_engine.serve.recording import FLIGHT
from agentspeed_engine.serve.replay import Replay
from agentspeed_kernels.cpu import native
from tests.conformance.family_configs import random_config
from tests.support.engine_client import EngineProcess, Front, LinkClosed, alive, engine
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.rank_workload import OPTIONS, drawn

pytestmark = pytest.mark.anyio
SPARSE = random_config("glm_moe_dsa", 0)
TIGHT = OPTIONS | {"pages": 18}
"""Two or three of the workload's five sessions on each dp rank, and room for one of them."""
NOOP = {"model": "noop:512:1", "dp": 2, "pages": 64, "context_limit": 1024}


@pytest.fixture
def anyio_backend() -> str:
    """One is enough: it is the engine that is tried here."""
    return "asyncio"


def picture_of(front: Front) -> wire.Picture:
    return front.ask(wire.Look(request=front.number(), branches=0), wire.Picture)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[EngineProcess]:
    """Two schedulers without a model."""
    with engine(tmp_path, **NOOP, rank_seconds=1.0) as process:
        yield process


@pytest.mark.parametrize(
    ("config", "tp"),
    [(CONFIG | {"first_k_dense_replace": 3}, 1), (CONFIG, 1), (SPARSE, 2)],
    ids=["dense", "mixture", "sparse"],
)
def test_two_schedulers_draw_what_one_draws(tmp_path: Path, config: dict[str, Any], tp: int) -> None:
    """With forks, rewinds, preemptions, a grammar, and sessions that come back from the host. Those of a mixture share
    experts, and so take their steps together; sparse attention chooses on every rank of tp the same rows."""
    checkpoint = make_checkpoint(config, tmp_path / "model", seed=3, dtype="float64")
    thread = EngineThread(options_from({"model": str(checkpoint), **TIGHT}))
    try:
        with closing(Front(thread.connect())) as front:
            wanted = drawn(front)
    finally:
        thread.close()
    with engine(tmp_path, model=str(checkpoint), dp=2, tp=tp, **TIGHT) as process:
        front = process.connect()
        got = drawn(front)
        stats = front.ask(wire.GetStats(request=front.number()), wire.Stats)
        ranks = picture_of(front).ranks
        assert process.close() == 0
    assert [ids for ids, _ in got] == [ids for ids, _ in wanted]
    for (_, logprobs), (_, expected) in zip(got, wanted, strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-12)
    assert [rank.dp for rank in ranks] == [0] * tp + [1] * tp
    assert not any(alive(rank.pid) for rank in ranks)
    for name in ("preemptions", "pages_loaded", "pages_copied"):
        assert stats.counts[name] == sum(one[name] for one in stats.dp) > 0
    assert all(one["pages_nodes"] for one in stats.dp), "both had sessions"


def test_without_shared_memory_dp_ranks_sum_over_gloo_and_each_draws_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    folder = make_checkpoint(CONFIG, tmp_path / "model", seed=3, dtype="float64")
    options = {"model": str(folder), "dtype": "float64", "device": "cpu", "pages": 16, "context_limit": 256}
    hot = wire.Sampling(temperature=1.1, top_p=0.9)
    drawn_by: dict[int, list[list[int]]] = {}
    for dp in (1, 2):
        (tmp_path / str(dp)).mkdir()
        with engine(tmp_path / str(dp), **options, dp=dp, tp=dp) as process:
            front = process.connect()
            branches = [front.open(list(range(40, 50 + 3 * number))) for number in range(3)]
            turns = [
                front.start(one, [7], max_tokens=6, sampling=hot, seed=number) for number, one in enumerate(branches)
            ]
            front.finish(*turns)
            drawn_by[dp] = [turn.ids for turn in turns]
            assert all(rank.waited is None for rank in picture_of(front).ranks)
    assert drawn_by[2] == drawn_by[1]


async def test_a_killed_rank_of_another_scheduler_ends_the_engine_and_every_session_goes_on(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(CONFIG, tmp_path, seed=3)
    async with Engine.over(EngineSlot(dict(NOOP)), folder) as engine, engine.session() as a, engine.session() as b:
        for session in (a, b):
            _ = await session.generate("Hello.", max_tokens=3)
        stats = await engine.stats()
        assert [one["sessions"] for one in stats.dp] == [1, 1] and stats.counts["sessions"] == 2
        picture = await (await engine.link()).call(lambda number: wire.Look(request=number))
        assert isinstance(picture, wire.Picture)
        other = picture.ranks[1].pid
        before = {session: session.ids for session in (a, b)}
        with pytest.raises(errors.EngineDied, match=rf"Rank 1 \(process {other}\) was killed by signal 9"):
            async with a.stream("Count.", max_tokens=900) as turn:
                async for _ in turn:
                    if alive(other):
                        os.kill(other, signal.SIGKILL)
        assert {session: session.ids for session in (a, b)} == before
        for session in (a, b):
            assert len((await session.generate("Again.", max_tokens=4)).ids) == 4
        last = engine.pid
    assert last is not None and not alive(last)


def test_a_scheduler_whose_rank_hangs_ends_the_engine_by_a_deadline(pair: EngineProcess) -> None:
    front = pair.connect()
    other = picture_of(front).ranks[1].pid
    os.kill(other, signal.SIGSTOP)
    for _ in range(2):
        front.start(front.open([1, 2, 3]), max_tokens=5)
    with pytest.raises(LinkClosed) as closed:
        while True:
            front.step()
    last: Any = closed.value.last
    assert last.code == "rank_lost" and f"Rank 1 (process {other}) did not answer for 1 s" in last.message
    _ = pair.wait()
    assert not alive(other)


def test_a_step_may_take_longer_than_a_rank_is_waited_for(tmp_path: Path) -> None:
    """A rank that computes says so meanwhile."""
    with engine(tmp_path, **(NOOP | {"model": "noop:512:600"}), rank_seconds=0.25) as process:
        front = process.connect()
        branches = [front.open([1, 2, 3]) for _ in range(2)]
        assert {branch % 2 for branch in branches} == {0, 1}
        assert [front.generate(branch, [4], max_tokens=1).ids for branch in branches] == [[5], [5]]


def test_each_scheduler_leaves_a_recording_that_is_replayed_by_itself(tmp_path: Path) -> None:
    flights = tmp_path / "flights"
    with engine(tmp_path, **NOOP, record=str(flights)) as process:
        front = process.connect()
        branches = [front.open([1, 2, 3]) for _ in range(4)]
        for branch in branches:
            _ = front.generate(branch, [4], max_tokens=3)
        steps = front.counts()["steps"]
        assert process.close() == 0
    replays = [Replay(path) for path in sorted(flights.glob(f"*{FLIGHT}"))]
    assert sum(len(list(one.steps())) for one in replays) == steps
    assert [(one.notes, one.broke) for one in replays] == [([], "")] * 2
    assert {one.core.config.dp_index for one in replays} == {0, 1}
    sessions = sorted(session for one in replays for session in one.core.world.sessions)
    assert sessions == sorted(branches)
