"""A graph's threads and their sessions: one prefill for siblings, travel back, a restart from disk by ids."""

from __future__ import annotations

import json
import operator
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest

_ = pytest.importorskip("langgraph.graph", reason="install the group conformance-langchain")

import anyio  # noqa: E402
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage  # noqa: E402
from langchain_core.runnables import RunnableConfig, RunnableLambda  # noqa: E402
from langgraph.graph import END, START, MessagesState, StateGraph  # noqa: E402
from langgraph.types import Command, Send, interrupt  # noqa: E402
from typing_extensions import TypedDict  # noqa: E402

from agentspeed import Engine, Session  # noqa: E402
from agentspeed.adapters.langchain import ChatAgentSpeed  # noqa: E402
from agentspeed.adapters.langgraph import AgentSpeedSaver  # noqa: E402
from agentspeed.errors import InvalidRequest  # noqa: E402
from agentspeed.testing import ScriptedEngine, tool_call  # noqa: E402
from agentspeed.testing import Turn as Asked  # noqa: E402
from agentspeed.transport.base import unpack_ids, wire  # noqa: E402

_ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def _script(asked: Asked) -> str:
    _, _, last = asked.log.rpartition("<|user|>")
    if "<|tool|>" in last:
        return "It is 42."
    if "plus" in last and '"name":"add"' in asked.log:
        return tool_call("add", a=17, b=25)
    return "Yes."


@contextmanager
def _engine() -> Iterator[ScriptedEngine]:
    scripted = ScriptedEngine(_script)
    with anyio.from_thread.start_blocking_portal() as portal, portal.wrap_async_context_manager(scripted):
        yield scripted


def _graph(model: ChatAgentSpeed, saver: AgentSpeedSaver) -> Any:
    agent = model.bind_tools([_ADD])

    def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [agent.invoke(state["messages"])]}

    async def athink(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await agent.ainvoke(state["messages"])]}

    def act(state: MessagesState) -> dict[str, Any]:
        (call,) = state["messages"][-1].tool_calls  # type: ignore[union-attr]
        return {"messages": [ToolMessage(json.dumps(call["args"]["a"] + call["args"]["b"]), tool_call_id=call["id"])]}

    def whether(state: MessagesState) -> str:
        last = state["messages"][-1]
        return "act" if isinstance(last, AIMessage) and last.tool_calls else END

    builder: Any = StateGraph(MessagesState)
    builder.add_node("think", RunnableLambda(think, afunc=athink))
    builder.add_node("act", act)
    builder.add_edge(START, "think")
    builder.add_conditional_edges("think", whether)
    builder.add_edge("act", "think")
    return builder.compile(checkpointer=saver)


def _config(thread: str = "t") -> RunnableConfig:
    return {"configurable": {"thread_id": thread}}


def _asked(text: str) -> dict[str, Any]:
    return {"messages": [HumanMessage(text)]}


def _ids(saver: AgentSpeedSaver, thread: str = "t") -> list[tuple[int, ...]]:
    return [Session.restore(data).ids for data in saver.sessions_of(thread)]


def test_a_graph_started_again_from_disk_goes_on_with_the_very_ids(tmp_path: Path) -> None:
    with _engine() as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        with AgentSpeedSaver(tmp_path / "graph.db", models=[model]) as saver:
            found = _graph(model, saver).invoke(_asked("What is 17 plus 25?"), _config())
            assert found["messages"][-1].content == "It is 42."
            (before,) = _ids(saver)
            model.close()
    with _engine() as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        with AgentSpeedSaver(tmp_path / "graph.db", models=[model]) as saver:
            found = _graph(model, saver).invoke(_asked("Are you sure?"), _config())
            assert [message.text for message in found["messages"][-2:]] == ["Are you sure?", "Yes."]
            (after,) = _ids(saver)
            assert after[: len(before)] == before
            assert len(after) > len(before)
            model.close()


@pytest.mark.asyncio
async def test_a_graph_that_is_streamed_keeps_its_sessions_as_one_that_is_not() -> None:
    async with ScriptedEngine(_script) as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        async with AgentSpeedSaver(":memory:", models=[model]) as saver:
            graph = _graph(model, saver)
            async for _ in graph.astream(_asked("What is 17 plus 25?"), _config(), stream_mode="messages"):
                pass
            assert len(_ids(saver)) == 1
            await saver.adelete_thread("t")
            assert scripted.live_branches == 0
        await model.aclose()


def test_so_does_one_that_is_streamed_without_an_event_loop() -> None:
    with _engine() as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        with AgentSpeedSaver(":memory:", models=[model]) as saver:
            for _ in _graph(model, saver).stream(_asked("Are you there?"), _config(), stream_mode="messages"):
                pass
            assert len(_ids(saver)) == 1
            saver.delete_thread("t")
            assert scripted.live_branches == 0
        model.close()


@pytest.mark.asyncio
async def test_the_same_holds_for_asynchronous_graphs(tmp_path: Path) -> None:
    async with ScriptedEngine(_script) as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        async with AgentSpeedSaver(tmp_path / "graph.db", models=[model]) as saver:
            _ = await _graph(model, saver).ainvoke(_asked("What is 17 plus 25?"), _config())
            (before,) = _ids(saver)
            await model.aclose()
    async with ScriptedEngine(_script) as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        async with AgentSpeedSaver(tmp_path / "graph.db", models=[model]) as saver:
            _ = await _graph(model, saver).ainvoke(_asked("Are you sure?"), _config())
            (after,) = _ids(saver)
            assert after[: len(before)] == before
            await model.aclose()


def _break_sessions(path: Path) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE sessions SET data = ?", (b"no snapshot",))
    connection.close()


def test_a_stored_session_that_cannot_be_used_costs_a_warning_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with _engine() as scripted:
        with AgentSpeedSaver(tmp_path / "graph.db", models=[model := ChatAgentSpeed(engine=scripted.engine)]) as saver:
            _ = _graph(model, saver).invoke(_asked("Are you there?"), _config())
            model.close()
        model = ChatAgentSpeed(engine=scripted.engine)
        with AgentSpeedSaver(tmp_path / "graph.db", models=[model]) as saver:
            _break_sessions(tmp_path / "graph.db")
            found = _graph(model, saver).invoke(_asked("Are you there?"), _config())
            assert found["messages"][-1].content == "Yes."
            assert "a stored session of thread t is not used" in caplog.text
            model.close()


class _Topics(TypedDict):
    answers: Annotated[list[Any], operator.add]


@pytest.mark.asyncio
async def test_travelling_back_shares_what_came_before_and_both_ways_go_on() -> None:
    async with Engine.shared(None, {"pages": 256}) as engine:
        model = ChatAgentSpeed(engine=engine, max_tokens=16)
        async with AgentSpeedSaver(":memory:", models=[model]) as saver:
            graph = _graph(model, saver)
            first = await graph.ainvoke(_asked("Say hi."), _config())
            later = await graph.ainvoke(_asked("Again."), _config())
            early = next(
                one for one in graph.get_state_history(_config()) if one.values.get("messages") == first["messages"]
            )
            other = await graph.ainvoke(_asked("Something else."), early.config)
            kept = first["messages"][-1].usage_metadata
            for found in (later, other):
                usage = found["messages"][-1].usage_metadata
                assert usage["input_token_details"]["cache_read"] >= kept["total_tokens"] - 1
            await saver.adelete_thread("t")
            assert (await engine.stats()).counts["sessions"] == 0
        await model.aclose()


@pytest.mark.asyncio
async def test_siblings_share_what_their_step_began_with() -> None:
    async with Engine.shared(None, {"pages": 256}) as engine:
        model = ChatAgentSpeed(engine=engine, max_tokens=4)
        opening = HumanMessage("A long opening, " + "word " * 40)

        async def begin(state: _Topics) -> dict[str, Any]:
            return {"answers": [await model.ainvoke([opening])]}

        async def one(given: dict[str, Any]) -> dict[str, Any]:
            asked = [opening, given["said"], HumanMessage(f"Question {given['number']}?")]
            return {"answers": [await model.ainvoke(asked)]}

        def spread(state: _Topics) -> list[Send]:
            return [Send("one", {"number": number, "said": state["answers"][-1]}) for number in range(8)]

        builder: Any = StateGraph(_Topics)
        builder.add_node("begin", begin)
        builder.add_node("one", one)
        builder.add_edge(START, "begin")
        builder.add_conditional_edges("begin", spread, ["one"])
        builder.add_edge("one", END)
        async with AgentSpeedSaver(":memory:", models=[model]) as saver:
            found = await builder.compile(checkpointer=saver).ainvoke({"answers": []}, _config())
            begun, *siblings = [message.usage_metadata for message in found["answers"]]
            assert len(siblings) == 8
            whole_pages = begun["total_tokens"] // 64 * 64
            assert whole_pages > 0
            for usage in siblings:
                assert usage["input_token_details"]["cache_read"] >= whole_pages
        await model.aclose()


class _Talk(TypedDict):
    messages: Annotated[list[Any], operator.add]


def _interrupted(model: ChatAgentSpeed, saver: AgentSpeedSaver) -> Any:
    async def talk(state: _Talk) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def ask(state: _Talk) -> dict[str, Any]:
        return {"messages": [HumanMessage(interrupt("Shall it go on?"))]}

    builder: Any = StateGraph(_Talk)
    for name, node in (("talk", talk), ("ask", ask), ("again", talk)):
        builder.add_node(name, node)
    for one, other in ((START, "talk"), ("talk", "ask"), ("ask", "again"), ("again", END)):
        builder.add_edge(one, other)
    return builder.compile(checkpointer=saver)


def _pauses(scripted: ScriptedEngine) -> list[tuple[str, float | None]]:
    return [(one.tool, one.seconds) for one in scripted._server.commands if isinstance(one, wire.Expect)]


@pytest.mark.asyncio
async def test_an_interrupted_graph_waits_under_a_lease_and_its_session_goes_on() -> None:
    async with ScriptedEngine(_script) as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        async with AgentSpeedSaver(":memory:", models=[model], interrupt_seconds=60.0) as saver:
            graph = _interrupted(model, saver)
            _ = await graph.ainvoke(_asked("Are you there?"), _config())
            assert _pauses(scripted) == [("interrupt", 60.0)]
            found = await graph.ainvoke(Command(resume="Go on."), _config())
            assert [message.text for message in found["messages"]] == ["Are you there?", "Yes.", "Go on.", "Yes."]
            assert scripted.live_branches == 1
        await model.aclose()


def test_a_turn_that_ends_in_calls_waits_for_its_tools_under_a_lease() -> None:
    with _engine() as scripted:
        model = ChatAgentSpeed(engine=scripted.engine)
        with AgentSpeedSaver(":memory:", models=[model]) as saver:
            _ = _graph(model, saver).invoke(_asked("What is 17 plus 25?"), _config())
        assert _pauses(scripted) == [("add", None)]
        model.close()


@pytest.mark.asyncio
async def test_a_chat_model_that_is_given_a_session_goes_on_from_it_and_leaves_it_as_it_is() -> None:
    async with ScriptedEngine(_script) as scripted, scripted.session() as session:
        _ = await session.generate("Are you there?")
        before = session.ids
        model = ChatAgentSpeed(engine=session)
        said = [HumanMessage("Are you there?"), AIMessage("Yes."), HumanMessage("Really?")]
        answer = await model.ainvoke(said)
        assert answer.text == "Yes."
        opened = [unpack_ids(one.ids) for one in scripted._server.commands if isinstance(one, wire.Open)]
        assert [tuple(ids) for ids in opened[1:]] == [before]
        assert session.ids == before
        await model.aclose()


@pytest.mark.parametrize("engine", ["localhost:8000", 7])
def test_what_is_no_engine_is_refused_in_words(engine: Any) -> None:
    with pytest.raises(InvalidRequest, match="it must be an Engine, a Session, or the address of a server"):
        _ = ChatAgentSpeed(engine=engine).invoke("Hi.")
