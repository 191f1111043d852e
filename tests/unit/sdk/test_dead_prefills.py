"""A prefill whose engine goes meanwhile has computed nothing that is still there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from agentspeed._core.branch import Branch
from agentspeed.testing import ScriptedEngine
from agentspeed.transport.base import Sink, wire
from tests.support.loops import without_uvloop as without_uvloop

pytestmark = pytest.mark.anyio


async def test_rows_of_an_engine_that_is_gone_are_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Branch.begin

    async def begun_and_gone(
        self: Branch, plan: Callable[[], Awaitable[wire.Generate]], sink: Sink, timeout: float | None = None
    ) -> None:
        await begin(self, plan, lambda event: sink(event) if event is None else None, timeout)
        (await self.attach()).close()

    async with ScriptedEngine([]) as engine, engine.session() as s:
        monkeypatch.setattr(Branch, "begin", begun_and_gone)
        _ = await s.add("A long text.", prefill=True)
        assert (s.residence.device, s.residence.lost) == (0, s.tokens)
