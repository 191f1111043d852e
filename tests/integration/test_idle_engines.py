"""Engines nobody uses end by themselves, and are there again when somebody does."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agentspeed import Engine, Session
from agentspeed.transport import engine_process
from tests.support.engine_client import alive, until
from tests.support.loops import on_asyncio as on_asyncio

pytestmark = pytest.mark.anyio


async def ended(pid: int) -> float:
    """Waits for a process to end; how long that took."""
    begun = time.monotonic()
    await anyio.to_thread.run_sync(until, "the engine ended", lambda: not alive(pid), 20.0)
    return time.monotonic() - begun


async def test_the_process_wide_engine_ends_after_its_idle_time_and_starts_again_when_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "_IDLE_SECONDS", 1.5)
    async with Session(checkpoint, pages=61) as s:
        first = s.engine.pid
    assert first is not None
    await anyio.sleep(0.3)
    async with Session(checkpoint, pages=61) as s:
        assert s.engine.pid == first  # used again before its time was over
        await anyio.sleep(1.8)
        assert alive(first)  # a session at rest is use
    assert await ended(first) > 0.5
    async with Session(checkpoint, pages=61) as s:
        assert (await s.generate("One.", max_tokens=2)).usage.drawn == 2
        assert s.engine.pid != first


async def test_an_engine_with_idle_seconds_ends_by_itself_and_is_started_again_for_the_next_session(
    checkpoint: Path,
) -> None:
    async with Engine(checkpoint, pages=64, idle_seconds=0.8) as engine:
        async with engine.session() as s:
            assert (await s.generate("One.", max_tokens=2)).usage.drawn == 2
            first = engine.pid
            assert first is not None
            await anyio.sleep(1.2)
            assert alive(first)
        _ = await ended(first)
        async with engine.session() as s:
            assert (await s.generate("Two.", max_tokens=2)).usage.drawn == 2
            assert engine.pid != first
