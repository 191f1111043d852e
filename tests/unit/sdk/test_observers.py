"""Who watches hears of every end, also of a turn whose block is left while the task is cancelled."""

from __future__ import annotations

import anyio
import pytest

from agentspeed import errors
from agentspeed._core.session_core import SessionCore
from agentspeed.observing import Began, Ending
from agentspeed.testing import ScriptedEngine, say

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
