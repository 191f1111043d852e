"""An agent with the tools of an MCP server, which is a process of its own: schemas, progress, and errors come from it.

Run: `python examples/agents/mcp_client.py [MODEL FOLDER]` (it starts itself with `--server` for the other side)
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import anyio
from mcp import Client, StdioServerParameters
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from agentspeed import Engine, Session
from agentspeed.adapters.mcp import Progress, tools_from_mcp

HERE = Path(__file__).resolve()


def serve() -> None:
    """What any MCP server does; it knows nothing of agentspeed."""
    server = MCPServer("sums", log_level="WARNING")

    @server.tool()
    async def add(a: int, b: int, context: Context) -> int:
        """Add two numbers."""
        await context.report_progress(1, 2, "adding")
        return a + b

    @server.tool()
    def get_weather(city: str) -> str:
        """Get the weather for a city."""
        raise ToolError(f"no station in {city}")

    server.run()


def told(progress: Progress) -> None:
    print(f"    {progress.tool}: {progress.message}, {progress.done:g} of {progress.total:g}")


async def main(model: str | Engine | None = None) -> list[str]:
    """Returns the answers."""
    server = StdioServerParameters(command=sys.executable, args=[str(HERE), "--server"])
    answers = []
    async with Client(server) as client:
        tools = await tools_from_mcp(client, timeout=30, on_progress=told)
        print("the server has: " + ", ".join(f"{one.name} ({one.description})" for one in tools))
        async with Session(model, tools=tools) as s:
            for ask in ("What is 17 plus 25?", "What is the weather in Oslo?"):
                print(f"> {ask}")
                result = await s.run(ask, max_tokens=96, max_turns=3)
                for one in result.tools:
                    print(f"    {one.name} gave: {textwrap.shorten(one.text, 70)}")
                usage = result.usage
                print(f"< {textwrap.shorten(result.text, 80)}")
                print(f"    {usage.resumed} tokens resumed, {usage.computed} computed")
                answers.append(result.text)
    return answers


if __name__ == "__main__":
    if sys.argv[1:] == ["--server"]:
        serve()
    else:
        _ = anyio.run(main, sys.argv[1] if sys.argv[1:] else None)
