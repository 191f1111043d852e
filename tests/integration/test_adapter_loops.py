"""Adapters that are called from one event loop after the other."""

from __future__ import annotations

import asyncio

from agentspeed import User
from agentspeed.adapters.runtime import Runtime
from agentspeed.history import Conversation
from tests.support.engine_client import until


def test_loops_that_have_ended_leave_no_link_and_no_session_behind() -> None:
    runtime = Runtime(engine_options={"pages": 63, "threads": 1})

    async def ask() -> None:
        async with runtime.take(Conversation(messages=(User("Hi."),))) as taken:
            _ = await taken.session.generate(taken.messages, max_tokens=2)

    async def held() -> tuple[int, int]:
        counts = (await (await runtime.engine()).stats()).counts
        return counts["links"], counts["sessions"]

    for _ in range(3):
        asyncio.run(ask())
    until("the engine has closed what was left", lambda: asyncio.run(held()) == (1, 0))

    asyncio.run(closed(runtime))


async def closed(runtime: Runtime) -> None:
    _ = await runtime.engine()
    await runtime.aclose()
