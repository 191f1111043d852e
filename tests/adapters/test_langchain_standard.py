"""LangChain's own standard tests, none of them overridden, on a scripted engine beneath the real grammar and parser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

langchain_tests = pytest.importorskip("langchain_tests", reason="install the group conformance-langchain")

import anyio  # noqa: E402
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage  # noqa: E402
from langchain_tests.integration_tests import ChatModelIntegrationTests  # noqa: E402
from langchain_tests.unit_tests import ChatModelUnitTests  # noqa: E402

from agentspeed.adapters.langchain import ChatAgentSpeed  # noqa: E402
from agentspeed.testing import ScriptedEngine  # noqa: E402
from tests.adapters.langchain_script import answer  # noqa: E402

pytestmark = pytest.mark.asyncio


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatAgentSpeed]:
        return ChatAgentSpeed

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "nano"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"AGENTSPEED_API_KEY": "key"}, {"model": "nano"}, {"api_key": "key"}


class TestIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _engine(self) -> Iterator[None]:
        scripted = ScriptedEngine(answer)
        with anyio.from_thread.start_blocking_portal() as portal, portal.wrap_async_context_manager(scripted):
            type(self).scripted = scripted
            yield

    @property
    def chat_model_class(self) -> type[ChatAgentSpeed]:
        return ChatAgentSpeed

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "nano", "engine": type(self).scripted.engine}

    @property
    def enable_vcr_tests(self) -> bool:
        return True  # nothing goes over a network, so there is nothing to record

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "other"

    @property
    def supported_usage_metadata_details(self) -> dict[str, Any]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The second call has the first one's prompt and reply in its own."""
        model = self.chat_model_class(**self.chat_model_params)
        first = model.invoke("A question with some words in it.")
        history = [HumanMessage("A question with some words in it."), first, HumanMessage("Another.")]
        if not stream:
            return model.invoke(history)
        whole: AIMessageChunk | None = None
        for chunk in model.stream(history):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        return whole
