"""What an agent costs beside its model and its tools: eight agents with slow tools at once on the shipped model.

    python bench/agents.py [--model FOLDER] [--agents 8] [--rounds 4]

Each agent's first turn must call tools, at most two, which sleep for different times; the second reads their results.
A turn's overhead is its time on the clock less what the engine reports for it (queue, prefill, decode) and less the
slowest of its tools: rendering, tokenising, grammars, the link, parsing, checking arguments, the event loop.
`cpu_ms_per_turn` is what this process computed for a turn: the part of the overhead that a busy machine cannot blow up.
`core_wait_ms_per_turn` is what its threads waited for a core, of which the engine's steps have all there are (Linux
alone says it): each agent that had something to do meanwhile waited too. `alone_overhead_ms_per_turn` is that of
one agent by itself, who waits for no other agent's work. `leaks` counts what the engine still owns when every session
is closed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]

import anyio

from agentspeed import Engine, tool

MUST_MS = 5.0
CITIES = ("Oslo", "Lima", "Rome", "Cairo", "Paris", "Delhi", "Quito", "Seoul")
AT_REST = ("branches", "sessions", "pages_tail", "pages_firm", "waiting_turns", "steps_in_flight")
"""Counts of the engine that are 0 when nobody holds anything."""


@tool
async def get_weather(city: str) -> dict[str, int | str]:
    """Get the weather for a city."""
    await anyio.sleep(0.2)
    return {"sky": "clear", "temp": len(city)}


@tool
async def get_time(city: str) -> str:
    """Current time in a city."""
    await anyio.sleep(0.1)
    return f"{len(city)} o'clock"


@dataclass(frozen=True)
class Round:
    """One request of one agent."""

    turns: int
    calls: int
    seconds: float
    model_seconds: float
    tool_seconds: float
    drawn: int

    @property
    def overhead_seconds(self) -> float:
        return self.seconds - self.model_seconds - self.tool_seconds


async def agent(engine: Engine, number: int, rounds: int, done: list[Round]) -> None:
    async with engine.session(tools=[get_weather, get_time]) as s:
        for index in range(rounds):
            city, other = CITIES[(number + index) % 8], CITIES[(number + 3 * index + 1) % 8]
            started = time.perf_counter()
            result = await s.run(
                f"What is the weather in {city} and what time is it in {other}?",
                max_tokens=96,
                max_turns=3,
                tool_choice="required",
                parallel_calls=2,
            )
            seconds = time.perf_counter() - started
            usage = result.usage
            done.append(
                Round(
                    turns=usage.turns,
                    calls=usage.pauses,
                    seconds=seconds,
                    tool_seconds=usage.pause_seconds,
                    drawn=usage.drawn,
                    model_seconds=usage.queue_seconds + usage.prefill_seconds + usage.decode_seconds,
                )
            )


def core_wait_seconds() -> float:
    """Of all threads of this process so far: how long they could have run and had no core. 0 where nobody says it."""
    waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has ended
            waited += int(thread.read_text().split()[1])
    return waited / 1e9


def overhead_ms(done: list[Round]) -> float:
    return round(1000 * sum(one.overhead_seconds for one in done) / sum(one.turns for one in done), 3)


async def measure(model: Path | None, agents: int, rounds: int) -> dict[str, object]:
    done: list[Round] = []
    alone: list[Round] = []
    async with Engine(model) as engine:
        await agent(engine, 0, 1, [])  # the first request of a process pays for imports and the loading of tables
        await agent(engine, 0, rounds, alone)
        started, cpu, waited = time.perf_counter(), time.process_time(), core_wait_seconds()
        async with anyio.create_task_group() as group:
            for number in range(agents):
                _ = group.start_soon(agent, engine, number, rounds, done)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        waited = core_wait_seconds() - waited
        left = (await engine.stats()).counts
        leaks = {name: left[name] for name in AT_REST if left[name]}
        if lost := left["pages_total"] - left["pages_free"] - left["pages_nodes"]:
            leaks["pages"] = lost
    turns = sum(one.turns for one in done)
    return {
        "overhead_ms_per_turn": overhead_ms(done),
        "alone_overhead_ms_per_turn": overhead_ms(alone),
        "cpu_ms_per_turn": round(1000 * cpu / turns, 3),
        "core_wait_ms_per_turn": round(1000 * waited / turns, 3),
        "leaks": sum(leaks.values()),
        "leaked": leaks,
        "agents": agents,
        "turns": turns,
        "drawn_per_turn": round(sum(one.drawn for one in done) / turns, 1),
        "pauses": sum(one.calls for one in done),
        "seconds": round(seconds, 2),
        "tool_seconds": round(sum(one.tool_seconds for one in done), 2),
        "model_seconds": round(sum(one.model_seconds for one in done), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead per turn of agents with slow tools, and what they leak.")
    _ = parser.add_argument("--model", type=Path, default=None, help="a model folder instead of the shipped model")
    _ = parser.add_argument("--agents", type=int, default=8)
    _ = parser.add_argument("--rounds", type=int, default=4, help="requests of each agent")
    options = parser.parse_args()
    figures = anyio.run(measure, options.model, options.agents, options.rounds)
    met = float(str(figures["overhead_ms_per_turn"])) <= MUST_MS and figures["leaks"] == 0
    print(json.dumps({"bench": "agents", **figures, "met": met}))


if __name__ == "__main__":
    main()
