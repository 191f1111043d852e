"""The same agent under trio: nothing in it knows which event loop runs it.

Run: `python examples/agents/under_trio.py [MODEL FOLDER]`
"""

from __future__ import annotations

import sys
import textwrap

import anyio
import sniffio

from agentspeed import Engine, Session, tool


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def main(model: str | Engine | None = None) -> str:
    """Returns the final answer."""
    print(f"running on {sniffio.current_async_library()}")
    async with Session(model, tools=[add]) as s:
        result = await s.run("What is 17 plus 25?", max_tokens=128)
        print(f"> What is 17 plus 25?\n< {textwrap.shorten(result.text, 90)}")
        return result.text


if __name__ == "__main__":
    _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None, backend="trio")
