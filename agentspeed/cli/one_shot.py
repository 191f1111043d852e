"""What `agentspeed chat --prompt` does: one run, whose answer alone is printed; the user is asked nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from agentspeed import Engine, Session
from agentspeed._base.wording import counted
from agentspeed._core.engine_options import EngineOptions
from agentspeed.cli.loading import loading
from agentspeed.cli.terminal_text import printable
from agentspeed.cli.tools_file import ToolsFile, tools_of


async def one_shot(
    model: str | Path | Engine | None,
    prompt: str,
    *,
    tools: Path | None,
    system: str | None,
    temperature: float,
    max_tokens: int,
    options: EngineOptions,
) -> None:
    """The answer goes to standard output, whatever else there is to say to standard error. `options`: of the engine.
    Raises what a run raises."""
    file = tools_of(tools) if tools is not None else ToolsFile()
    for line in file.left_out:
        print(f"left out of the tools: {line}", file=sys.stderr)
    with loading(quiet=True) as shown:
        on_start = None if isinstance(model, Engine) else shown
        session = await Session(model, system=system, tools=file.tools, on_start=on_start, **options).open()
    try:
        result = await session.run(prompt, temperature=temperature, max_tokens=max_tokens)
    finally:
        await session.close()
    lines = result.text.split("\n")
    print("\n".join(map(printable, lines) if sys.stdout.isatty() else lines), flush=True)
    if result.reason != "answered":
        bound = result.reply.bound or ("--max-tokens" if result.reason == "cut" else counted(result.turns, "turn"))
        print(f"({result.reason}: {bound})", file=sys.stderr)
