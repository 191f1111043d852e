"""Who watches hears of every end, also of a turn whose block is left while the task is cancelled."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import errors, tool
from agentspeed._core.session_core import SessionCore
from agentspeed.observing import Began, Ending
from agentspeed.testing import ScriptedEngine, say, tool_call

pytestmark = pytest.mark.anyio


class Ends:
    """An observer that keeps how things ended."""

    def __init__(self) -> None:
        self.told: list[Ending] = []

    def began(self, what: Began) -> Ends:
        return self

    def ended(self, how: Ending) -> None:
        self.told.append(how)


async def test_a_turn_that_is_left_while_its_task_is_cancelled_ends_for_who_watches() -> None:
    seen = Ends()
    async with ScriptedEngine([say("A long answer.", seconds=0.02)]) as engine, engine.session(observer=seen) as s:
        with anyio.CancelScope() as scope:
            async with s.stream("Go.") as turn:
                _ = await anext(turn)
                scope.cancel()
        assert [how.reason for how in seen.told] == ["cancelled"] and s.messages == ()


async def test_a_turn_that_cannot_be_stopped_ends_for_who_watches_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(self: SessionCore, turn: object) -> None:
        raise errors.InternalError("The engine answered nonsense.")

    seen = Ends()
    async with ScriptedEngine([say("A long answer.", seconds=0.02)]) as engine, engine.session(observer=seen) as s:
        with monkeypatch.context() as patched:
            patched.setattr(SessionCore, "abort_turn", broken)
            with pytest.raises(errors.InternalError, match="nonsense"):
                async with s.stream("Go.") as turn:
                    _ = await anext(turn)
        (how,) = seen.told
        assert isinstance(how.error, errors.InternalError)


async def test_a_call_that_is_served_by_hand_and_fails_says_by_what() -> None:
    @tool
    def look() -> str:
        """Look."""
        return "seen"

    seen = Ends()
    async with ScriptedEngine([tool_call("look")]) as engine, engine.session(tools=[look], observer=seen) as s:
        (call,) = (await s.generate("Go.")).tool_calls
        async with s.tool_call(call):
            raise ValueError("dark")
        assert s.messages[-1].text == "error: look: ValueError: dark"
    assert isinstance(seen.told[-1].error, errors.ToolFailed) and "dark" in str(seen.told[-1].error)
