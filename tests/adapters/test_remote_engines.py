"""Adapters on a server's engine: an address where an engine is asked for, with the key of the environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

_ = pytest.importorskip("langchain_core", reason="install agentspeed[langchain]")

from langchain_core.load import dumpd  # noqa: E402
from langchain_core.messages import HumanMessage  # noqa: E402

from agentspeed.adapters.langchain import ChatAgentSpeed  # noqa: E402
from agentspeed.errors import ConnectFailed  # noqa: E402
from agentspeed.server.options import ApiKey, ServerOptions  # noqa: E402
from tests.support.server_run import server  # noqa: E402


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server(options=ServerOptions(port=0, keys=(ApiKey("one", "a"),), drain_seconds=5.0), pages=256) as found:
        yield found


def test_a_chat_model_runs_on_a_servers_engine_and_finds_its_session_there(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTSPEED_API_KEY", "one")
    model = ChatAgentSpeed(engine=url, max_tokens=8)
    said = [HumanMessage("Say hi.")]
    first = model.invoke(said)
    second = model.invoke([*said, first, HumanMessage("Again.")])
    assert first.usage_metadata is not None and second.usage_metadata is not None
    assert second.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["total_tokens"] - 1
    stored = dumpd(model)["kwargs"]
    assert stored["base_url"] == url and "engine" not in stored and stored["api_key"]["type"] == "secret"
    model.close()


def test_a_wrong_key_is_an_error_of_both(url: str) -> None:
    model = ChatAgentSpeed(engine=url, api_key="two", max_retries=0)  # type: ignore[arg-type]
    with pytest.raises(ConnectFailed, match="api_key"):
        _ = model.invoke("Say hi.")
    model.close()
