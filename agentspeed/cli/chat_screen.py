"""What `agentspeed chat` prints: answers as they come, tools and their results in short, and what a turn cost."""

from __future__ import annotations

from typing import Final, final

from rich.console import Console

from agentspeed import Usage, events
from agentspeed._base.wording import counted
from agentspeed.cli.terminal_text import printable
from agentspeed.messages import ToolCall
from agentspeed.tools import Tool

MOST_LINES: Final = 5
MOST_CHARACTERS: Final = 400
"""Of a tool's arguments or result: what a person needs to see that it went well."""
_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""They would move the cursor or change the terminal, and a model or a web page may have written them."""


@final
class Screen:
    """The terminal of one chat. Text is never wrapped here: what is copied from it has no line ends of ours."""

    def __init__(self) -> None:
        self._console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._within_line = False
        self.failed = False
        """Whether an error was shown."""

    def event(self, event: events.AnyEvent) -> None:
        """What a person wants to see of it."""
        match event:
            case events.TextDelta(text=text):
                self._console.print(text.translate(_CONTROLS), end="")
                self._within_line = not text.endswith("\n")
            case events.ToolStarted(call=call):
                self.line(f"[{shortened(f'{call.name} {call.arguments}')}]", "cyan")
            case events.ToolProgress(call=call, done=done, total=total, message=message):
                far = f"{done:g}" if total is None else f"{done:g} of {total:g}"
                self.line(f"[{shortened(f'{call.name}: {message} {far}')}]", "cyan")
            case events.ToolFinished(content=content):
                self.line(f"[= {shortened(content)}]", "cyan")
            case _:
                pass

    def line(self, text: str, style: str = "dim") -> None:
        """On a line of its own."""
        self.end_line()
        self._console.print(text.translate(_CONTROLS), style=style)

    def error(self, error: Exception | str) -> None:
        """Of a line that was not answered, or a command that was not carried out."""
        self.failed = True
        self.line(str(error), "red")

    def end_line(self) -> None:
        """Whatever comes next begins a line."""
        if self._within_line:
            self._console.print()
            self._within_line = False


def shortened(text: str) -> str:
    """Its beginning, and how much more there is."""
    start = "\n".join(text.splitlines()[:MOST_LINES])[:MOST_CHARACTERS]
    more = len(text.rstrip("\n")) - len(start)
    return f"{start}\n... {counted(more, 'character')} more, which only the model reads" if more > 0 else start


def whole(call: ToolCall) -> str:
    """A call to be approved: all of it."""
    return printable(f"{call.name} {call.arguments}")


def cost(usage: Usage) -> str:
    """The numbers of `Usage`, by their names there."""
    shared = f" ({usage.shared} shared)" if usage.shared else ""
    why = f" ({usage.why})" if usage.why else ""
    again = f", {usage.recomputed} recomputed{why}" if usage.recomputed else ""
    return (
        f"{counted(usage.resumed, 'token')} resumed, {usage.new} new{shared}{again}, {usage.drawn} drawn: "
        f"{usage.computed} computed"
    )


def described(tool: Tool) -> str:
    """One line of what a model is told of a tool, and whether it asks."""
    parameters = tool.schema.get("properties")
    names = ", ".join(parameters) if isinstance(parameters, dict) else ""
    asks = {True: "  (asks you first)", False: ""}.get(tool.needs_approval is not False, "")
    return f"{tool.name}({names})  {tool.description}{asks}".rstrip()
