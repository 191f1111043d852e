"""One model over two processes: it draws what one process draws, and ends by a name when a rank does."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentspeed import Engine, errors
from agentspeed.transport.engine_process import EngineSlot
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.serve.in_thread import EngineThread
from agentspeed_engine.serve.options import options_from
from tests.support.engine_client import EngineProcess, Front, LinkClosed, alive, engine, until
from tests.support.paged import CONFIG
from tests.support.random_checkpoint import make_checkpoint
from tests.support.rank_workload import OPTIONS, drawn

pytestmark = pytest.mark.anyio
NOOP = {"model": "noop:4096:1", "tp": 2, "pages": 64, "context_limit": 1024}


def ranks_of(front: Front) -> tuple[wire.RankView, ...]:
    return front.ask(wire.Look(request=front.number(), branches=0), wire.Picture).ranks


def last_words(front: Front) -> wire.Failed:
    with pytest.raises(LinkClosed) as closed:
        while True:
            front.step()
    assert isinstance(closed.value.last, wire.Failed)
    return closed.value.last


@pytest.fixture
def anyio_backend() -> str:
    """One is enough: it is the engine that is tried here."""
    return "asyncio"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CONFIG, tmp_path_factory.mktemp("tiny"), seed=3, dtype="float64")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[EngineProcess]:
    """Two ranks without a model."""
    with engine(tmp_path, **NOOP, rank_seconds=1.0) as process:
        yield process


@pytest.mark.parametrize("cache", ["dtype", "fp8"])
def test_two_ranks_draw_what_one_process_draws(checkpoint: Path, cache: str, tmp_path: Path) -> None:
    """With forks, rewinds, preemptions, a grammar, and sessions that come back from the host."""
    options = {"model": str(checkpoint), "kv_cache_dtype": cache, **OPTIONS}
    thread = EngineThread(options_from(options))
    try:
        with closing(Front(thread.connect())) as front:
            wanted = drawn(front)
    finally:
        thread.close()
    with engine(tmp_path, tp=2, **options) as process:
        assert any(line.startswith("rank 1: ") for line in process.progress)
        front = process.connect()
        got = drawn(front)
        counts = front.counts()
        other = ranks_of(front)[1].pid
        assert process.close() == 0
    assert [ids for ids, _ in got] == [ids for ids, _ in wanted]
    for (_, logprobs), (_, expected) in zip(got, wanted, strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-12)
    assert counts["preemptions"] and counts["pages_loaded"] and counts["pages_copied"]
    assert not alive(other)


async def test_a_killed_rank_ends_a_turn_by_its_name_and_the_session_goes_on(checkpoint: Path) -> None:
    slot = EngineSlot({**NOOP, "model": "noop:512:1"})
    async with Engine.over(slot, checkpoint) as engine, engine.session() as s:
        picture = await (await engine.link()).call(lambda number: wire.Look(request=number))
        assert isinstance(picture, wire.Picture)
        first, second = picture.ranks
        assert (first.rank, first.pid, second.rank) == (0, engine.pid, 1) and alive(second.pid)
        assert second.memory > 10_000_000 and second.waited is not None
        assert (await engine.stats()).counts["ranks"] == 2
        _ = await s.generate("Hello.", max_tokens=3)
        before = s.ids
        with pytest.raises(errors.EngineDied, match=rf"Rank 1 \(process {second.pid}\) was killed by signal 9"):
            async with s.stream("Count.", max_tokens=900) as turn:
                async for _ in turn:
                    if alive(second.pid):
                        os.kill(second.pid, signal.SIGKILL)
        assert s.ids == before
        assert len((await s.generate("Again.", max_tokens=4)).ids) == 4
        last = engine.pid
        assert last != first.pid and not alive(first.pid)
    assert last is not None and not alive(last)


def test_a_rank_that_hangs_ends_the_engine_by_a_deadline_and_is_ended_too(pair: EngineProcess) -> None:
    front = pair.connect()
    other = ranks_of(front)[1].pid
    os.kill(other, signal.SIGSTOP)
    front.start(front.open([1, 2, 3]), max_tokens=5)
    last = last_words(front)
    assert last.code == "rank_lost" and f"Rank 1 (process {other}) did not answer for 1 s" in last.message
    _ = pair.wait()
    assert not alive(other)


def test_ranks_end_with_rank_0_however_it_ends(pair: EngineProcess) -> None:
    """On Linux also one that is stopped."""
    other = ranks_of(pair.connect())[1].pid
    if sys.platform == "linux":
        os.kill(other, signal.SIGSTOP)
    _ = pair.kill()
    until("the other rank has ended", lambda: not alive(other))
