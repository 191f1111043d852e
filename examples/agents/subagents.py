"""Sixteen agents at once, each with a tool that is an agent itself, on one engine: all end, and nothing leaks.

While its tool runs an outer session holds no room that an inner one could need, so they cannot starve each other.

Run: `python examples/agents/subagents.py [MODEL FOLDER]`
"""

from __future__ import annotations

import sys
import textwrap
import time

import anyio

from agentspeed import Engine, Session, ToolContext, tool

CITIES = (
    "Oslo",
    "Lima",
    "Rome",
    "Cairo",
    "Paris",
    "Delhi",
    "Quito",
    "Seoul",
    "Tokyo",
    "Accra",
    "Dakar",
    "Sofia",
    "Riga",
    "Perth",
    "Osaka",
    "Turin",
)


@tool
async def get_weather(city: str) -> str:
    """Get the weather for a city."""
    await anyio.sleep(0.05)
    return f"{len(city) + 10} degrees"


@tool(timeout=60)
async def search(query: str, context: ToolContext[None]) -> str:
    """Search the web."""
    outer = context.session
    assert isinstance(outer, Session)
    async with outer.engine.session(tools=[get_weather]) as inner:
        result = await inner.run(f"What is the weather in {query}?", max_tokens=128, max_turns=4)
        return result.text


async def main(model: str | Engine | None = None) -> list[str]:
    """Returns the answers in order."""
    answers = [""] * len(CITIES)
    started = time.perf_counter()
    async with model if isinstance(model, Engine) else Engine(model) as engine:

        async def ask(index: int) -> None:
            async with engine.session(tools=[search]) as s:
                result = await s.run(f"Search the web for {CITIES[index]}.", max_tokens=128, max_turns=4)
                answers[index] = result.text

        async with anyio.create_task_group() as group:
            for index in range(len(CITIES)):
                _ = group.start_soon(ask, index)
        for city, answer in zip(CITIES, answers, strict=True):
            print(f"{city:6} {textwrap.shorten(answer, 80)}")
        print(f"{len(CITIES)} agents with an agent inside each, {time.perf_counter() - started:.1f} s")
    return answers


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
