"""A LangGraph graph on sessions: it branches with Send, travels back in time, and is started again from disk.

Printed for each call: the tokens of its prompt, and how many of them were not computed again. Siblings share what their
step began with; a thread that goes back shares what came before; after the restart the ids are those on disk.

Run: `python examples/agents/langgraph_agent.py [MODEL FOLDER]`
"""

from __future__ import annotations

import operator
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import anyio
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from typing_extensions import TypedDict

from agentspeed import Engine, Session
from agentspeed.adapters.langchain import ChatAgentSpeed
from agentspeed.adapters.langgraph import AgentSpeedSaver

CITIES = ("Oslo", "Lima", "Rome", "Cairo")
THREAD: RunnableConfig = {"configurable": {"thread_id": "trip"}}
OPENING = "We plan a trip, and we want to know about some cities before we go. Be brief in everything you say, please."


class Trip(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], operator.add]
    notes: Annotated[list[str], operator.add]


def told(what: str, answer: Any) -> None:
    usage = answer.usage_metadata
    kept = usage["input_token_details"]["cache_read"]
    print(f"{what:32} prompt {usage['input_tokens']:4}, not computed again {kept:4}")


def graph_of(model: ChatAgentSpeed, saver: AgentSpeedSaver) -> Any:
    async def talk(state: Trip) -> Trip:
        answer = await model.ainvoke(state["messages"])
        told("the thread goes on", answer)
        return {"messages": [answer]}

    async def look(given: dict[str, Any]) -> Trip:
        answer = await model.ainvoke([*given["messages"], HumanMessage(f"Tell me about {given['city']}.")])
        told(f"  sibling: {given['city']}", answer)
        return {"notes": [f"{given['city']}: {answer.text}"]}

    def spread(state: Trip) -> list[Send]:
        return [Send("look", {"messages": state["messages"], "city": city}) for city in CITIES]

    builder: Any = StateGraph(Trip)
    builder.add_node("talk", talk)
    builder.add_node("look", look)
    builder.add_edge(START, "talk")
    builder.add_conditional_edges("talk", spread, ["look"])
    builder.add_edge("look", END)
    return builder.compile(checkpointer=saver)


def said(text: str) -> Trip:
    return {"messages": [HumanMessage(text)]}


async def first_life(engine: Engine, file: Path) -> None:
    model = ChatAgentSpeed(engine=engine, max_tokens=48)
    async with AgentSpeedSaver(file, models=[model]) as saver:
        graph = graph_of(model, saver)
        await graph.ainvoke(said(OPENING), THREAD)
        early = (await graph.aget_state(THREAD)).config
        await graph.ainvoke(said("Say hi."), THREAD)
        print("back to the checkpoint before that, and on another way:")
        await graph.ainvoke(said("Say hello instead."), early)
        await model.aclose()


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


async def second_life(engine: Engine, file: Path) -> int:
    """How many ids from disk the thread went on with."""
    model = ChatAgentSpeed(engine=engine, max_tokens=48)
    async with AgentSpeedSaver(file, models=[model]) as saver:
        before = [Session.restore(data).ids for data in saver.sessions_of("trip")]
        print(f"started again from disk: {len(before)} sessions of {sum(map(len, before))} tokens are there")
        await graph_of(model, saver).ainvoke(said("Where were we?"), THREAD)
        after = [Session.restore(data).ids for data in saver.sessions_of("trip")]
        kept = min(max(common(one, old) for old in before) for one in after if one not in before)
        print(f"every session that went on has its first {kept} ids or more from there")
        await model.aclose()
        return kept


async def main(model: str | None = None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.db"
        async with Engine(model) as engine:
            await first_life(engine, file)
        async with Engine(model) as engine:  # another process, which knows nothing of the first
            return await second_life(engine, file)


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
