"""What the adapters cost beside sessions: tokens computed by a graph, time a model call, and runs that readers leave.

    python bench/adapters.py [--steps 20] [--siblings 8] [--calls 200] [--readers 200]

- `graph_tokens_ratio`: tokens that the shipped model computes for a LangGraph loop of `--steps` tool calls and a `Send`
  of `--siblings`, divided by those of the same conversation on a session and its forks. As the engine reports them.
- `overhead_ms`: a call of `ChatAgentSpeed` less a turn of a session with the same messages, on a model that does
  nothing; the two take turns, so that both meet the same machine. Medians; `overhead_cpu_ms`: this process's CPU time.
- `cancelled_work`, `leaks`: `--readers` clients of a streamed run (server-sent events over a socket) go away in the
  midst of it while other work goes on in the same loop: what of it was cancelled, what is held when all have left.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import operator
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import httpx
import msgspec
import uvicorn
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from typing_extensions import TypedDict

from agentspeed import Engine, User, tool
from agentspeed.adapters.langchain import ChatAgentSpeed
from agentspeed.messages import ToolMessage as Result
from agentspeed.transport.engine_process import EngineSlot
from tests.support.random_checkpoint import make_checkpoint

MUST = {"graph_tokens_ratio": 1.05, "overhead_ms": 3.0, "cancelled_work": 0, "leaks": 0}
ASK = "What is 17 plus 25? Add one number after the other, and go on as long as there is something to add."
AT_REST = ("branches", "sessions", "pages_tail", "pages_firm", "waiting_turns", "steps_in_flight")
"""Counts of the engine that are 0 when nobody holds anything."""


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


OPENAI = {"type": "function", "function": add.definition()}


# ---- a graph and the same on a session ------------------------------------------------------------------------------
class State(TypedDict, total=False):
    messages: Annotated[list[Any], operator.add]
    answers: Annotated[list[Any], operator.add]


def asked(number: int) -> str:
    return f"Question {number}: what is {number} plus {number}?"


async def on_a_graph(engine: Engine, steps: int, siblings: int) -> tuple[int, list[str]]:
    """Tokens computed, and what the siblings answered."""
    model = ChatAgentSpeed(engine=engine, max_tokens=24)
    caller = model.bind_tools([OPENAI], tool_choice="add")
    plain = model.bind_tools([OPENAI], tool_choice="none")
    spent = 0

    def computed(answer: AIMessage) -> AIMessage:
        nonlocal spent
        usage: Any = answer.usage_metadata
        spent += usage["total_tokens"] - usage["input_token_details"]["cache_read"]
        return answer

    async def think(state: State) -> State:
        return {"messages": [computed(await caller.ainvoke(state["messages"], parallel_tool_calls=False))]}

    def act(state: State) -> State:
        (call,) = state["messages"][-1].tool_calls
        return {"messages": [ToolMessage(str(add(**call["args"])), tool_call_id=call["id"])]}

    async def one(given: dict[str, Any]) -> State:
        said = [*given["messages"], HumanMessage(asked(given["number"]))]
        return {"answers": [computed(await plain.ainvoke(said))]}

    def further(state: State) -> list[Send] | str:
        made = sum(isinstance(message, ToolMessage) for message in state["messages"])
        if made < steps:
            return "think"
        return [Send("one", {"messages": state["messages"], "number": number}) for number in range(siblings)]

    builder: Any = StateGraph(State)
    for name, node in (("think", think), ("act", act), ("one", one)):
        builder.add_node(name, node)
    builder.add_edge(START, "think")
    builder.add_edge("think", "act")
    builder.add_conditional_edges("act", further, ["think", "one"])
    builder.add_edge("one", END)
    found = await builder.compile().ainvoke({"messages": [HumanMessage(ASK)]}, {"recursion_limit": 3 * steps + 9})
    await model.aclose()
    return spent, [message.text for message in found["answers"]]


async def on_a_session(engine: Engine, steps: int, siblings: int) -> tuple[int, list[str]]:
    async with engine.session(tools=[add]) as s:
        prompt: Any = User(ASK)
        for _ in range(steps):
            reply = await s.generate(prompt, tool_choice="add", parallel_calls=1, max_tokens=24, temperature=0.0)
            (call,) = reply.tool_calls
            given = json.loads(call.arguments)
            prompt = Result(call_id=call.id, name=call.name, text=str(add(**given)))
        await s.add(prompt)
        async with s.fork(siblings) as children:
            replies = await asyncio.gather(
                *(
                    child.generate(asked(number), tool_choice="none", max_tokens=24, temperature=0.0)
                    for number, child in enumerate(children)
                )
            )
            spent = s.usage.computed + sum(child.usage.computed for child in children)
        return spent, [reply.text for reply in replies]


async def measure_graph(steps: int, siblings: int) -> dict[str, Any]:
    found: dict[str, tuple[int, list[str]]] = {}
    for name, run in (("graph", on_a_graph), ("session", on_a_session)):
        async with Engine(pages=512) as engine:  # a new one each: neither finds rows of the other
            found[name] = await run(engine, steps, siblings)
    return {
        "graph_tokens_ratio": round(found["graph"][0] / found["session"][0], 4),
        "graph_tokens": found["graph"][0],
        "session_tokens": found["session"][0],
        "same_answers": found["graph"][1] == found["session"][1],
    }


# ---- one model call -------------------------------------------------------------------------------------------------
async def measure_calls(calls: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_checkpoint(json.loads((ROOT / "bench/models/tiny.json").read_text()), Path(scratch) / "tiny")
        options = {"model": "noop:512:0", "pages": 2048, "context_limit": 4096}
        async with Engine.over(EngineSlot(options), folder) as engine:
            model = ChatAgentSpeed(engine=engine, max_tokens=8)
            ours: list[tuple[float, float]] = []
            theirs: list[tuple[float, float]] = []
            for _ in range(max(1, calls // 10)):
                messages: list[Any] = []
                async with engine.session() as s:
                    for turn in range(10):
                        text = f"Turn {turn} of a talk."
                        began, cpu = time.perf_counter(), time.process_time()
                        _ = await s.generate(text, max_tokens=8)
                        ours.append((time.perf_counter() - began, time.process_time() - cpu))
                        messages.append(HumanMessage(text))
                        began, cpu = time.perf_counter(), time.process_time()
                        answer = await model.ainvoke(messages)
                        theirs.append((time.perf_counter() - began, time.process_time() - cpu))
                        messages.append(answer)
            await model.aclose()
    warm = len(ours) // 10  # the first calls pay for imports

    def median(found: list[tuple[float, float]], part: int) -> float:
        return 1000 * statistics.median(one[part] for one in found[warm:])

    return {
        "overhead_ms": round(median(theirs, 0) - median(ours, 0), 3),
        "overhead_cpu_ms": round(median(theirs, 1) - median(ours, 1), 3),
        "session_ms": round(median(ours, 0), 3),
        "langchain_ms": round(median(theirs, 0), 3),
        "calls": len(ours) - warm,
    }


# ---- readers that leave ---------------------------------------------------------------------------------------------
@tool
async def slow_add(a: int, b: int) -> int:
    """Add two numbers."""
    await asyncio.sleep(0.02)
    return a + b


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[str]:
    """An application of six lines, on a socket of this machine."""

    async def chat(request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            say = request.query_params["say"]
            async with engine.session(tools=[slow_add]) as s, s.stream_run(say, max_tokens=96, max_turns=3) as run:
                async for event in run:
                    yield b"data: " + msgspec.json.encode(event) + b"\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/chat", chat)]), log_level="error"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    await serving


async def reader(client: httpx.AsyncClient, draw: random.Random) -> int:
    """How many events it has read before it left."""
    most, read = draw.randint(1, 12), 0
    async with client.stream("GET", "/chat", params={"say": "What is 17 plus 25?"}) as response:
        async for line in response.aiter_lines():
            read += line.startswith("data: ")
            if read == most:
                break
    return read


async def measure_readers(readers: int) -> dict[str, Any]:
    async with Engine(pages=1024) as engine:
        done, cancelled, over = 0, 0, asyncio.Event()

        async def other() -> None:
            nonlocal done, cancelled
            try:
                async with engine.session() as s:
                    begin = await s.mark()
                    while not over.is_set():
                        _ = await s.generate("Say hi.", max_tokens=4)
                        await s.rewind(begin)
                        done += 1
            except BaseException:
                cancelled += 1
                raise

        async with served(engine) as url:
            async with httpx.AsyncClient(base_url=url) as client:
                _ = await reader(client, random.Random(0))  # imports, the first session
                tasks, threads = len(asyncio.all_tasks()), threading.active_count()
                working = [asyncio.create_task(other()) for _ in range(2)]
                draw, read = random.Random(7), 0
                for _ in range(readers):
                    read += await reader(client, draw)
                over.set()
                _ = await asyncio.gather(*working, return_exceptions=True)
            for _ in range(500):
                if not (left := await held(engine)):
                    break
                await asyncio.sleep(0.02)
            left |= {"tasks": n} if (n := len(asyncio.all_tasks()) - tasks) > 0 else {}
            left |= {"threads": n} if (n := threading.active_count() - threads) > 0 else {}
        return {
            "cancelled_work": cancelled,
            "leaks": sum(left.values()),
            "leaked": left,
            "readers": readers,
            "events_read": read,
            "other_turns": done,
        }


async def held(engine: Engine) -> dict[str, int]:
    counts = (await engine.stats()).counts
    found = {name: counts[name] for name in AT_REST if counts[name]}
    if lost := counts["pages_total"] - counts["pages_free"] - counts["pages_nodes"]:
        found["pages"] = lost
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--siblings", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--readers", type=int, default=200)
    given = parser.parse_args()
    figures = asyncio.run(measure_graph(given.steps, given.siblings))
    figures |= asyncio.run(measure_calls(given.calls))
    figures |= asyncio.run(measure_readers(given.readers))
    for name, most in MUST.items():
        print(f"{name:20} {figures[name]:>8}   target <= {most}   {'met' if figures[name] <= most else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
