"""Agents of the OpenAI Agents SDK on sessions: tools, hand-offs, output types, streams, histories, what is refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

_ = pytest.importorskip("agents", reason="install the group conformance-openai-agents")

from agents import Agent, ModelSettings, RunConfig, Runner, SQLiteSession, function_tool  # noqa: E402
from agents.exceptions import UserError  # noqa: E402
from agents.memory import Session, SessionSettings  # noqa: E402
from agents.tracing import GenerationSpanData, Span, Trace, TracingProcessor, set_trace_processors  # noqa: E402  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from agentspeed import Engine  # noqa: E402
from agentspeed.adapters.openai_agents import AgentSpeedModel, AgentSpeedProvider, AgentSpeedSession  # noqa: E402
from agentspeed.errors import InvalidRequest  # noqa: E402
from agentspeed.testing import ScriptedEngine, say, tool_call  # noqa: E402
from agentspeed.testing import Turn as Asked  # noqa: E402

pytestmark = pytest.mark.asyncio
_QUIET = RunConfig(tracing_disabled=True)
_PLACE = {"city": "Oslo", "degrees": 7}


class Place(BaseModel):
    city: str
    degrees: int


class Spans(TracingProcessor):
    """What generation spans say that their calls used."""

    def __init__(self) -> None:
        self.usage: list[Any] = []

    def on_span_end(self, span: Span[Any]) -> None:
        if isinstance(span.span_data, GenerationSpanData):
            self.usage.append(span.span_data.usage)

    def on_trace_start(self, trace: Trace) -> None: ...
    def on_trace_end(self, trace: Trace) -> None: ...
    def on_span_start(self, span: Span[Any]) -> None: ...
    def shutdown(self) -> None: ...
    def force_flush(self) -> None: ...


@function_tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def _script(asked: Asked) -> str:
    _, _, last = asked.log.rpartition("<|user|>")
    if "transfer_to_writer" in asked.log and "<|tool|>" not in last:
        return tool_call("transfer_to_writer")
    if "<|tool|>" in last:
        return "It is 42." if "plus" in last else "I am the writer."
    if "plus" in last:
        return tool_call("add", a=17, b=25)
    return json.dumps(_PLACE, separators=(",", ":")) if "place" in last else "Hello there."


@asynccontextmanager
async def _model(script: object = _script) -> AsyncIterator[tuple[ScriptedEngine, AgentSpeedModel]]:
    async with ScriptedEngine(script) as scripted:  # type: ignore[arg-type]
        model = AgentSpeedModel(engine=scripted.engine)
        yield scripted, model
        await model.close()
        assert scripted.live_branches == 0


async def test_an_agent_calls_its_tools_in_one_session() -> None:
    async with _model() as (scripted, model):
        agent = Agent(name="sums", instructions="Be brief.", model=model, tools=[add])
        result = await Runner.run(agent, "What is 17 plus 25?", run_config=_QUIET)
        assert result.final_output == "It is 42."
        assert scripted.live_branches == 1
        again = await Runner.run(
            agent, [*result.to_input_list(), {"role": "user", "content": "Hi."}], run_config=_QUIET
        )
        assert again.final_output == "Hello there."
        assert scripted.live_branches == 1


async def test_ids_of_calls_are_never_used_twice() -> None:
    async with _model() as (_, model):
        agent = Agent(name="sums", model=model, tools=[add])
        results = [await Runner.run(agent, "What is 17 plus 25?", run_config=_QUIET) for _ in range(3)]
        ids = [
            item["call_id"] for one in results for item in one.to_input_list() if item.get("type") == "function_call"
        ]
        assert len(set(ids)) == 3


async def test_an_output_type_is_kept_to_its_schema() -> None:
    async with _model() as (scripted, model):
        agent = Agent(name="places", model=model, output_type=Place)
        assert (await Runner.run(agent, "Name a place.", run_config=_QUIET)).final_output == Place(**_PLACE)
        assert all(turn.grammar for turn in scripted.turns)


async def test_a_hand_off_is_a_call_and_the_other_agent_answers() -> None:
    async with _model() as (_, model):
        writer = Agent(name="writer", model=model)
        first = Agent(name="first", model=model, handoffs=[writer])
        result = await Runner.run(first, "Write something.", run_config=_QUIET)
        assert result.last_agent is writer
        assert result.final_output == "I am the writer."


async def test_a_stream_has_pieces_calls_and_usage() -> None:
    async with _model() as (_, model):
        result = Runner.run_streamed(
            Agent(name="sums", model=model, tools=[add]), "What is 17 plus 25?", run_config=_QUIET
        )
        kinds = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
        assert "response.function_call_arguments.delta" in kinds
        assert "response.output_text.delta" in kinds
        assert kinds.count("response.completed") == 2
        assert result.final_output == "It is 42."
        assert result.context_wrapper.usage.requests == 2
        assert result.context_wrapper.usage.output_tokens > 0


async def test_a_stream_that_is_cancelled_ends_its_turn_soon() -> None:
    began = time.monotonic()
    async with _model(lambda _: say("word " * 200, seconds=0.1)) as (_, model):
        result = Runner.run_streamed(Agent(name="talk", model=model), "Hi.", run_config=_QUIET)
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                result.cancel()
    assert time.monotonic() - began < 10  # of some 20 seconds that the whole text takes


async def test_cancelling_a_run_cancels_its_turn() -> None:
    began = time.monotonic()
    async with _model(lambda _: say("word " * 200, seconds=0.1)) as (_, model):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await Runner.run(Agent(name="talk", model=model), "Hi.", run_config=_QUIET)
    assert time.monotonic() - began < 10


async def test_a_conversation_kept_by_the_sdk_computes_only_what_is_new() -> None:
    async with Engine.shared(None, {"pages": 256}) as engine:
        provider = AgentSpeedProvider(engine=engine)
        config = RunConfig(tracing_disabled=True, model_provider=provider)
        agent = Agent(name="talk", instructions="You are brief.", model_settings=ModelSettings(max_tokens=16))
        session = SQLiteSession("mine")
        first = (await Runner.run(agent, "Say hi.", session=session, run_config=config)).context_wrapper.usage
        second = (await Runner.run(agent, "Again.", session=session, run_config=config)).context_wrapper.usage
        assert second.input_tokens_details.cached_tokens >= first.total_tokens - 1
        await provider.aclose()
        session.close()


async def test_state_under_ids_is_refused() -> None:
    async with _model() as (_, model):
        agent = Agent(name="talk", model=model)
        with pytest.raises(UserError, match="previous_response_id"):
            await Runner.run(agent, "Hi.", previous_response_id="resp_1", run_config=_QUIET)


async def test_settings_reach_the_turn() -> None:
    async with _model() as (scripted, model):
        settings = ModelSettings(
            temperature=0.5, top_p=0.9, max_tokens=3, frequency_penalty=0.25, presence_penalty=-0.5
        )
        await Runner.run(Agent(name="talk", model=model, model_settings=settings), "Hi.", run_config=_QUIET)
        (turn,) = scripted.turns
        assert (turn.sampling.temperature, turn.sampling.top_p, turn.max_tokens) == (0.5, 0.9, 3)
        assert (turn.sampling.frequency_penalty, turn.sampling.presence_penalty) == (0.25, -0.5)


async def test_a_streamed_call_is_traced_with_what_it_used() -> None:
    seen = Spans()
    set_trace_processors([seen])
    try:
        async with _model() as (_, model):
            agent = Agent(name="talk", model=model)
            whole = await Runner.run(agent, "Hi.")
            streamed = Runner.run_streamed(agent, "Hi.")
            async for _ in streamed.stream_events():
                pass
    finally:
        set_trace_processors([])
    spent = [run.context_wrapper.usage for run in (whole, streamed)]
    assert seen.usage == [{"input_tokens": one.input_tokens, "output_tokens": one.output_tokens} for one in spent]


async def test_forks_of_a_conversation_go_on_apart_and_compute_what_they_share_once() -> None:
    async with Engine.shared(None, {"pages": 256}) as engine:
        model = AgentSpeedModel(engine=engine)
        agent = Agent(
            name="talk", instructions="You are brief.", model=model, model_settings=ModelSettings(max_tokens=16)
        )
        session: Session = AgentSpeedSession("mine")
        assert isinstance(session, AgentSpeedSession)
        first = (await Runner.run(agent, "Say hi. " * 12, session=session, run_config=_QUIET)).context_wrapper.usage
        forks = [session, session.fork(), session.fork("third")]
        for number, fork in enumerate(forks):
            result = await Runner.run(agent, f"Number {number}?", session=fork, run_config=_QUIET)
            kept = result.context_wrapper.usage.input_tokens_details.cached_tokens
            assert kept >= (first.total_tokens - 1 if number == 0 else first.total_tokens // 64 * 64)
        said = [[item.get("content") for item in await fork.get_items()] for fork in forks]
        assert [len(one) for one in said] == [4, 4, 4]
        assert [one[2] for one in said] == ["Number 0?", "Number 1?", "Number 2?"]
        await model.close()


async def test_a_forking_session_keeps_the_contract_of_the_sdk() -> None:
    session = AgentSpeedSession(items=[{"role": "user", "content": str(number)} for number in range(4)])
    assert isinstance(session, Session)

    async def said(one: AgentSpeedSession, limit: int | None = None) -> list[object]:
        return [item.get("content") for item in await one.get_items(limit)]

    assert await said(session, 2) == ["2", "3"]
    assert await said(session, 0) == []
    early = session.fork(at=1)
    popped = await session.pop_item()
    assert popped is not None and popped.get("content") == "3"
    (await session.get_items())[0]["content"] = "changed"  # type: ignore[typeddict-unknown-key,index]
    assert (await said(session), await said(early)) == (["0", "1", "2"], ["0"])
    assert await said(
        AgentSpeedSession(items=await session.get_items(), session_settings=SessionSettings(limit=1))
    ) == ["2"]
    await session.clear_session()
    assert await session.pop_item() is None
    with pytest.raises(InvalidRequest, match="has 0 items"):
        _ = session.fork(at=1)


async def test_a_session_in_a_file_goes_on_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "conversations.db"
    async with _model() as (_, model):
        agent = Agent(name="talk", model=model)
        session = AgentSpeedSession("mine", path)
        _ = await Runner.run(agent, "Hi.", session=session, run_config=_QUIET)
        items = await session.get_items()
        assert [item.get("role") for item in items] == ["user", "assistant"]
        script = "import asyncio, json, sys; from agentspeed.adapters.openai_agents import AgentSpeedSession as S\n"
        script += "print(json.dumps(asyncio.run(S('mine', sys.argv[1]).get_items())))"
        said = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-c", script, str(path)])
        assert json.loads(said) == items
        again = AgentSpeedSession("mine", path)
        _ = await Runner.run(agent, "And now?", session=again, run_config=_QUIET)
        assert len(await session.get_items()) == 4
        assert await AgentSpeedSession("another", path).get_items() == []


async def test_a_session_in_a_file_keeps_the_contract_of_the_sdk(tmp_path: Path) -> None:
    path = tmp_path / "conversations.db"
    session = AgentSpeedSession("one", path, items=[{"role": "user", "content": str(number)} for number in range(4)])
    assert isinstance(session, Session)
    assert [item.get("content") for item in await session.get_items(2)] == ["2", "3"]
    assert await session.get_items(0) == []
    early = session.fork("two", at=1)
    popped = await session.pop_item()
    assert popped is not None and popped.get("content") == "3"
    await early.add_items([{"role": "user", "content": "é 😀"}])
    assert [item.get("content") for item in await AgentSpeedSession("two", path).get_items()] == ["0", "é 😀"]
    with pytest.raises(InvalidRequest, match="has items of the session 'two' already"):
        _ = session.fork("two")
    await session.clear_session()
    assert await session.pop_item() is None and len(await early.get_items()) == 2


async def test_a_file_that_cannot_hold_items_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    _ = path.write_text("no database" * 200)
    for broken in (path, tmp_path / "missing" / "conversations.db"):
        with pytest.raises(InvalidRequest, match="cannot hold the items"):
            await AgentSpeedSession("mine", broken).add_items([{"role": "user", "content": "Hi."}])
    with pytest.raises(InvalidRequest, match="which is no file"):
        _ = AgentSpeedSession("mine", ":memory:")
