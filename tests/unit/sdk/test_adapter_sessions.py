"""Adapters that are given a session: every conversation of it goes on from a copy, also those that begin at once."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import Session
from agentspeed.adapters.runtime import Runtime
from agentspeed.errors import EngineOverloaded
from agentspeed.history import Conversation, History
from agentspeed.messages import Assistant, User
from agentspeed.testing import ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def more(s: Session, text: str) -> Conversation:
    return Conversation(messages=(*s.messages, User(text)))


def slow(monkeypatch: pytest.MonkeyPatch, *failures: Exception) -> None:
    """An engine that takes its time to open a copy, and fails so often first."""
    left, put = list(failures), History.put

    async def late(self: History, session: Session, conversation: Conversation) -> None:
        await anyio.sleep(0.02)
        if left:
            raise left.pop()
        await put(self, session, conversation)

    monkeypatch.setattr(History, "put", late)


async def test_calls_that_begin_together_all_go_on_from_what_the_session_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    async with ScriptedEngine(["Hello."]) as engine, engine.session() as s:
        assert (await s.generate("Hi")).text == "Hello."
        assert isinstance(s.messages[-1], Assistant)
        runtime = Runtime(engine=s)
        shared: list[int] = []

        async def call(text: str) -> None:
            async with runtime.take(more(s, text)) as taken:
                shared.append(taken.shared)
                await anyio.sleep(0.02)

        async with anyio.create_task_group() as group:
            for text in ("One.", "Two.", "Three."):
                group.start_soon(call, text)
        assert shared == [2, 2, 2]
        await runtime.aclose()


async def test_a_copy_that_could_not_be_opened_is_made_again_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, EngineOverloaded("Full.", remedy="Wait."))
    async with ScriptedEngine(["Hello."]) as engine, engine.session() as s:
        _ = await s.generate("Hi")
        runtime = Runtime(engine=s)
        with pytest.raises(EngineOverloaded):
            async with runtime.take(more(s, "One.")):
                pass
        async with runtime.take(more(s, "One.")) as taken:
            assert taken.shared == 2
        await runtime.aclose()


async def test_a_copy_that_closed_itself_is_not_gone_on_with() -> None:
    async with ScriptedEngine(["Hello."]) as engine, engine.session(idle_timeout=0.5) as s:
        _ = await s.generate("Hi")
        runtime = Runtime(engine=s)
        async with runtime.take(more(s, "One.")) as taken:
            copy = taken.session
        for _ in range(500):
            await anyio.sleep(0.01 if "open" in (copy.state, s.state) else 0)
        async with runtime.take(more(s, "Two.")) as taken:
            assert (taken.session.state, taken.verb) == ("open", "new")
        await runtime.aclose()
