"""Calls of a model that numbers them itself, and begins again in a later turn: to a framework each is another call."""

from __future__ import annotations

from pathlib import Path

import pytest

_ = pytest.importorskip("pydantic_ai", reason="install agentspeed[pydantic-ai]")
_ = pytest.importorskip("langchain_core", reason="install agentspeed[langchain]")

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage  # noqa: E402
from pydantic_ai import Agent  # noqa: E402
from pydantic_ai.messages import ModelResponse, ToolCallPart  # noqa: E402

from agentspeed.adapters.langchain import ChatAgentSpeed  # noqa: E402
from agentspeed.adapters.pydantic_ai import AgentSpeedModel  # noqa: E402
from agentspeed.testing import ScriptedEngine  # noqa: E402
from tests.support.chat_templates import FAMILIES  # noqa: E402
from tests.support.conversations import folder_of  # noqa: E402

pytestmark = pytest.mark.asyncio
KIMI = FAMILIES["kimi k2"]
CALL = '<|tool_call_begin|>functions.echo:0<|tool_call_argument_begin|>{"word": "%s"}<|tool_call_end|>'
SCRIPT = [f"<|tool_calls_section_begin|>{CALL % word}<|tool_calls_section_end|>" for word in "ab"] + ["Done."]


def echo(word: str) -> str:
    """Say it again."""
    return f"{word}!"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "m", KIMI.template, KIMI.controls)


async def test_pydantic_ai_has_an_id_for_each(folder: Path) -> None:
    async with ScriptedEngine(SCRIPT, model=folder) as scripted:
        model = AgentSpeedModel(engine=scripted.engine)
        result = await Agent(model, tools=[echo]).run("Go.")
        said = [message for message in result.all_messages() if isinstance(message, ModelResponse)]
        ids = [part.tool_call_id for message in said for part in message.parts if isinstance(part, ToolCallPart)]
        assert (result.output, len(ids), len(set(ids))) == ("Done.", 2, 2)
        assert scripted.live_branches == 1
        await model.aclose()


async def test_langchain_has_an_id_for_each(folder: Path) -> None:
    async with ScriptedEngine(SCRIPT, model=folder) as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        bound, said = model.bind_tools([echo]), list[BaseMessage]([HumanMessage("Go.")])
        ids: list[str | None] = []
        for _ in range(2):
            answer = await bound.ainvoke(said)
            assert isinstance(answer, AIMessage)
            ids += [call["id"] for call in answer.tool_calls]
            said += [
                answer,
                *(ToolMessage(echo(**call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls),
            ]
        assert (len(ids), len(set(ids)), (await bound.ainvoke(said)).text) == (2, 2, "Done.")
        assert scripted.live_branches == 1
        await model.aclose()
