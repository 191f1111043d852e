"""What a LangChain chat model is told of sampling reaches the turn as it was said."""

from __future__ import annotations

import pytest

_ = pytest.importorskip("langchain_core", reason="install agentspeed[langchain]")

from agentspeed.adapters.langchain import ChatAgentSpeed  # noqa: E402
from agentspeed.errors import InvalidSampling  # noqa: E402
from agentspeed.testing import ScriptedEngine  # noqa: E402

pytestmark = pytest.mark.asyncio


async def test_a_top_p_of_0_is_refused_and_not_taken_for_none() -> None:
    async with ScriptedEngine(["Hi."]) as scripted:
        model = ChatAgentSpeed(engine=scripted.engine, top_p=0.0)
        with pytest.raises(InvalidSampling, match="top_p"):
            _ = await model.ainvoke("Say hi.")
        await model.aclose()
