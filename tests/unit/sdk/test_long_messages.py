"""Long messages, wherever they come from, are tokenised beside the event loop and never on it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import anyio
import pytest

from agentspeed.chat.codec import ChatCodec
from agentspeed.messages import Message
from agentspeed.testing import ScriptedEngine, tool_call

pytestmark = pytest.mark.anyio
LONG = "word " * 5_000


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The thread that tokenised each message, by the first letters of its text."""
    seen: dict[str, int] = {}
    append = ChatCodec.append

    def noted(
        codec: ChatCodec, history: Sequence[Message], new: Sequence[Message], *, generate: bool = False
    ) -> list[list[int]]:
        for message in new:
            seen[message.text[:4]] = threading.get_ident()
        return append(codec, history, new, generate=generate)

    monkeypatch.setattr(ChatCodec, "append", noted)
    return seen


def read_all() -> str:
    """Read a long file."""
    return LONG


async def test_a_long_message_is_tokenised_in_a_worker_thread(threads: dict[str, int]) -> None:
    async with ScriptedEngine(["Fine."], context_limit=1 << 20) as engine, engine.session() as s:
        _ = await s.add(LONG, "Short.")
        assert threads["word"] != threading.get_ident()
        _ = await s.add("Brief.")
        assert threads["Brie"] == threading.get_ident()
        assert [m.text for m in s.messages] == [LONG, "Short.", "Brief."]


async def test_a_long_result_of_a_tool_is_tokenised_in_a_worker_thread(threads: dict[str, int]) -> None:
    script = [tool_call("read_all"), "Done."]
    async with ScriptedEngine(script, context_limit=1 << 20) as engine, engine.session(tools=[read_all]) as s:
        assert (await s.run("Go.")).text == "Done."
    assert threads["word"] != threading.get_ident()


async def test_a_cancelled_addition_of_a_long_message_leaves_the_log_as_it_was() -> None:
    async with ScriptedEngine(["Fine."], context_limit=1 << 20) as engine, engine.session() as s:
        known = s.tokens
        with anyio.CancelScope() as scope:
            scope.cancel()
            _ = await s.add(LONG)
        assert (s.tokens, s.messages) == (known, ())
        assert (await s.generate("Hi")).text == "Fine."
