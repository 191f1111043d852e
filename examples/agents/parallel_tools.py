"""Two tools at once, one slow and one failing: results come in call order, and the context is held meanwhile.

Run: `python examples/agents/parallel_tools.py [MODEL FOLDER]`
"""

from __future__ import annotations

import sys
import textwrap

import anyio

from agentspeed import Engine, Session, events, tool

ASK = "What is the weather in Oslo and what time is it in Lima?"


@tool(timeout=5)
async def get_weather(city: str) -> dict[str, str | int]:
    """Get the weather for a city."""
    await anyio.sleep(0.5)
    return {"sky": "clear", "temp": 21}


@tool
def get_time(city: str) -> str:
    """Current time in a city."""
    raise LookupError(f"no clock in {city}")


async def main(model: str | Engine | None = None) -> str:
    """Returns the final answer."""
    async with Session(model, tools=[get_weather, get_time]) as s:
        print(f"> {ASK}")
        result = await s.run(ASK, max_tokens=256, on_event=show)
        print(f"< {textwrap.shorten(result.text, 90)}")
        print(
            f"{result.usage.turns} turns, {result.usage.drawn} tokens drawn, {result.usage.resumed} resumed after "
            f"the pause, {result.usage.recomputed} recomputed"
        )
        return result.text


def show(event: events.AnyEvent) -> None:
    """One line per event that says what the agent does."""
    match event:
        case events.ToolCallReady(call=call):
            print(f"  calls {call.name}({textwrap.shorten(call.arguments, 80)})")
        case events.Paused(lease=lease):
            print(f"  paused: {lease.residence.device} tokens held under a {lease.keep} lease")
        case events.ToolFinished(call=call, content=content, seconds=seconds):
            print(f"  {call.name} after {seconds:.2f} s: {textwrap.shorten(content, 80)}")
        case events.Resumed(device=device, recomputed=recomputed):
            print(f"  resumed: {device} tokens still there, {recomputed} recomputed")
        case _:
            return


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
