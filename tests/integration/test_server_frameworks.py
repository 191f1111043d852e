"""Agent frameworks that know a server by its address alone: a tool task each, on the shipped model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest

_ = pytest.importorskip("agents", reason="install the group conformance-openai-agents")
_ = pytest.importorskip("pydantic_ai", reason="install agentspeed[pydantic-ai]")

from agents import (  # noqa: E402
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from pydantic_ai import Agent as PydanticAgent  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel  # noqa: E402
from pydantic_ai.models.openai import OpenAIResponsesModel as PydanticResponsesModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402

from agentspeed.server.options import ServerOptions  # noqa: E402
from tests.support.server_run import server  # noqa: E402

pytestmark = pytest.mark.asyncio
_BRIEF, _ASKED = "You are brief.", "What is 17 plus 25?"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server(options=ServerOptions(port=0, max_tokens=256, drain_seconds=5.0), pages=512) as found:
        yield f"{found}/v1"


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_an_agent_of_openais_sdk_does_a_tool_task(url: str, api: str) -> None:
    added: list[tuple[int, int]] = []

    @function_tool
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        added.append((a, b))
        return a + b

    async with _client(url) as client:
        kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel
        agent = Agent(
            "brief",
            instructions=_BRIEF,
            tools=[add],
            model=kind("nano", client),
            model_settings=ModelSettings(temperature=0),
        )
        result = await Runner.run(agent, _ASKED, run_config=RunConfig(tracing_disabled=True))
    assert added == [(17, 25)]
    assert "42" in result.final_output


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_an_agent_of_pydantic_ai_does_a_tool_task(url: str, api: str) -> None:
    added: list[tuple[int, int]] = []

    async with _client(url) as client:
        kind = OpenAIChatModel if api == "chat" else PydanticResponsesModel
        agent = PydanticAgent(
            kind("nano", provider=OpenAIProvider(openai_client=client)),
            system_prompt=_BRIEF,
            model_settings={"temperature": 0},
        )

        @agent.tool_plain
        def add(a: int, b: int) -> int:
            """Adds two numbers."""
            added.append((a, b))
            return a + b

        result = await agent.run(_ASKED)
    assert added == [(17, 25)]
    assert "42" in result.output


async def test_a_client_that_keeps_conversations_on_the_server_does_a_tool_task(url: str) -> None:
    """As Llama Stack's agents do: a conversation, responses in it, and the results of calls as items."""
    tool = {
        "type": "function",
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
    async with httpx.AsyncClient(base_url=url) as client:
        conversation = (await client.post("/conversations", json={})).json()["id"]
        given = {
            "model": "nano",
            "instructions": _BRIEF,
            "conversation": conversation,
            "tools": [tool],
            "temperature": 0,
        }
        first = (await client.post("/responses", json=given | {"input": _ASKED})).json()
        (call,) = [item for item in first["output"] if item["type"] == "function_call"]
        answered = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
        second = (await client.post("/responses", json=given | {"input": [answered]})).json()
    assert call["name"] == "add"
    assert "42" in second["output"][-1]["content"][0]["text"]
