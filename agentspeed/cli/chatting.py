"""What `agentspeed chat` does: lines in, streamed answers out, Ctrl-C cancels an answer and keeps the chat."""

from __future__ import annotations

import importlib.util
import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard, final

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus
from rich.console import Console

from agentspeed import Engine, Session, Usage, errors, events
from agentspeed.tools import Tool, tools_from

_PROMPT = "> "


def tools_of(path: Path) -> tuple[Tool, ...]:
    """The typed public functions a Python file defines itself, and what it made with `@tool`, in their order.

    Raises `InvalidRequest` when the file cannot be loaded, has none, or one of them cannot be a tool."""
    if not path.is_file():
        raise errors.InvalidRequest(f"{path} is not a file.", remedy="Give a Python file with typed functions.")
    spec = importlib.util.spec_from_file_location("agentspeed_chat_tools", path)
    if spec is None or spec.loader is None:
        raise errors.InvalidRequest(f"{path} is not a Python file.", remedy="Give one whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: whatever it raises belongs into the sentence
        raise errors.InvalidRequest(f"{path} cannot be loaded: {type(error).__name__}: {error}",
                                    remedy="See that `python` can import it.") from error
    found = [item for name, item in vars(module).items() if not name.startswith("_") and _is_tool(item, spec.name)]
    if not found:
        raise errors.InvalidRequest(f"{path} defines no public functions.", remedy="Write some with type hints.")
    try:
        return tools_from(found)
    except TypeError as error:
        raise errors.InvalidRequest(f"{path}: {error}") from error


def _is_tool(item: object, module: str) -> TypeGuard[Tool | Callable[..., object]]:
    fn = item.fn if isinstance(item, Tool) else item
    return inspect.isfunction(fn) and fn.__module__ == module


@final
class Chat:
    """One chat in a terminal."""

    def __init__(self, model: str | Engine | None, *, tools: Path | None, system: str | None, temperature: float,
                 max_tokens: int) -> None:
        self._model = model
        self._tools = tools_of(tools) if tools is not None else ()
        self._system = system
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._console = Console()
        self._answering: anyio.CancelScope | None = None
        """What a Ctrl-C cancels."""

    async def run(self) -> None:
        """Until end of input."""
        self._console.print("Starting the engine ...", style="dim", highlight=False)
        async with Session(self._model, system=self._system, tools=self._tools) as session:
            self._console.print("Ctrl-C cancels an answer, Ctrl-D ends.", style="dim")
            try:
                async with anyio.create_task_group() as group:
                    await group.start(self._mind_interrupts)
                    await self._talk(session)
                    group.cancel_scope.cancel()
            except BaseExceptionGroup as raised:  # of one: the other task only waits for signals
                raise raised.exceptions[0] from raised

    async def _talk(self, session: Session) -> None:
        while (line := await anyio.to_thread.run_sync(_line, abandon_on_cancel=True)) is not None:
            if line.strip():
                await self._answer(session, line)

    async def _answer(self, session: Session, line: str) -> None:
        with anyio.CancelScope() as self._answering:
            try:
                result = await session.run(line, temperature=self._temperature, max_tokens=self._max_tokens,
                                           on_event=self._show)
                self._console.print()
                self._report(result.usage)
            except errors.InternalError:
                raise
            except errors.AgentspeedError as error:  # the session is as it was before the line: ask again, or else
                self._console.print(f"\n{error}", style="red", markup=False, highlight=False)
        cancelled, self._answering = self._answering.cancelled_caught, None
        if cancelled:
            self._console.print("\n(cancelled; the chat goes on as if you had not asked)", style="dim",
                                highlight=False)

    async def _mind_interrupts(self, *, task_status: TaskStatus[None]) -> None:
        """Ctrl-C is for the answer that runs. At the prompt the terminal has dropped the line: it is asked for anew."""
        with anyio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                if self._answering is not None:
                    self._answering.cancel()
                else:
                    print(f"\n{_PROMPT}", end="", flush=True)

    def _show(self, event: events.AnyEvent) -> None:
        match event:
            case events.TextDelta(text=text):
                self._console.print(text, end="", markup=False, highlight=False)
            case events.ToolStarted(call=call):
                self._console.print(f"[{call.name} {call.arguments}]", style="cyan", markup=False, highlight=False)
            case events.ToolFinished(content=content):
                self._console.print(f"[= {content}]", style="cyan", markup=False, highlight=False)
            case _:
                pass

    def _report(self, usage: Usage) -> None:
        again = f", {usage.recomputed} again ({usage.why})" if usage.recomputed > 1 else ""
        self._console.print(f"{usage.resumed} tokens resumed, {usage.new - usage.shared} computed{again}, "
                            f"{usage.drawn} drawn", style="dim", highlight=False)


def _line() -> str | None:
    try:
        return input(_PROMPT)
    except EOFError:
        return None
