"""The pool of sessions that wait for their conversations, while several calls close and take them at once."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from agentspeed import Session, User
from agentspeed.history import Conversation, History, Limits
from agentspeed.testing import ScriptedEngine
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


def asked(text: str) -> Conversation:
    return Conversation(messages=(User(text),))


async def waits(history: History, text: str) -> Session:
    """A session that has said this and waits in the pool."""
    async with history.take(asked(text)) as taken:
        _ = await taken.session.add(*taken.messages)
    return taken.session


async def test_sweeps_that_begin_together_close_each_session_once() -> None:
    now = 0.0
    async with ScriptedEngine([]) as engine:
        history = History(lambda _: engine.session(), limits=Limits(idle_seconds=10.0), clock=lambda: now)
        for text in ("One.", "Two.", "Three."):
            _ = await waits(history, text)
        now = 20.0
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(history.sweep)
        assert (history.open, engine.live_branches) == (0, 0)


async def test_a_session_that_is_taken_while_a_sweep_closes_another_stays_open() -> None:
    now = 0.0
    async with ScriptedEngine([]) as engine:
        history = History(lambda _: engine.session(), limits=Limits(idle_seconds=10.0), clock=lambda: now)
        first, second = await waits(history, "One."), await waits(history, "Two.")
        now, swept = 20.0, anyio.Event()

        async def sweep() -> None:
            await history.sweep()
            swept.set()

        async with anyio.create_task_group() as group:
            group.start_soon(sweep)
            while first.state == "open":
                await anyio.lowlevel.checkpoint()
            async with history.take(asked("Two.")) as taken:
                assert taken.session is second
                await swept.wait()
                assert second.state == "open"
        await history.close()
