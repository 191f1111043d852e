"""What `agentspeed chat` does: lines in, streamed answers out; a line that is not answered leaves nothing behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeAlias, final

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from agentspeed import Engine, Mark, Session, errors, events
from agentspeed.cli.chat_screen import Screen, cost, described, whole
from agentspeed.cli.line_input import Lines
from agentspeed.cli.tools_file import ToolsFile, tools_of
from agentspeed.messages import ToolCall, User
from agentspeed.replies import Result

_PROMPT: Final = "> "
COMMANDS: Final = {
    "/help": "this list",
    "/tools": "the tools that the model may call",
    "/usage": "what this session has cost, and how full its context is",
    "/undo": "go back to before your last question; again: to before the one before",
    "/retry": "go back to before your last question, and ask it again",
    "/new": "a new session, in which nothing was said",
    "/quit": "end the chat, as Ctrl-D does",
}
_HINT: Final = "A line that begins with / is a command; //text sends /text to the model."


@final
class Chat:
    """One chat in a terminal."""

    def __init__(
        self, model: str | Engine | None, *, tools: Path | None, system: str | None, temperature: float, max_tokens: int
    ) -> None:
        self._model = model
        self._file = tools_of(tools) if tools is not None else ToolsFile()
        self._system = system
        self._temperature = temperature
        self._max_tokens = max_tokens

    def run(self) -> bool:
        """Until `/quit` or end of input, in the main thread; sessions live on an event loop in another one, so that
        lines can be edited and interrupted here. False when a line failed and no terminal is there to see it."""
        screen = Screen()
        screen.line("Starting the engine ...")
        for line in self._file.left_out:
            screen.line(f"left out of the tools: {line}", "yellow")
        with Lines() as lines, start_blocking_portal("asyncio") as portal:
            hello = "Ctrl-C cancels an answer, Ctrl-D ends. /help lists the commands."
            again = True
            while again:
                with portal.wrap_async_context_manager(portal.call(self._session)) as session:
                    screen.line(hello)
                    talk = Talk(
                        portal, session, screen, lines, temperature=self._temperature, max_tokens=self._max_tokens
                    )
                    again = talk.run()
                hello = "A new session."
            return lines.can_ask or not screen.failed

    def _session(self) -> Session:
        return Session(self._model, system=self._system, tools=self._file.tools)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One line and all that came of it."""

    before: Mark
    line: str
    ran: tuple[str, ...]
    """Tools that ran: what they did stays done when the session goes back."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one line: a result, or why there is none; with neither it was cancelled. `undone`: the session is as it was
    before the line. `too_long`: no session has room for it."""

    before: Mark
    result: Result[Any] | None = None
    problems: tuple[errors.AgentspeedError, ...] = ()
    undone: bool = False
    too_long: bool = False


@final
class Question:
    """Whether a call may run: asked on the loop, answered in the main thread."""

    def __init__(self, call: ToolCall) -> None:
        self.call = call
        self.granted = False
        self.answered = anyio.Event()


@final
class Cancel:
    """Cancels an answer on the loop, from any thread and without waiting; also one that has not begun yet."""

    def __init__(self) -> None:
        self.pressed = False
        self._of: tuple[asyncio.AbstractEventLoop, anyio.CancelScope] | None = None

    def __call__(self) -> None:
        self.pressed = True
        if self._of is not None:
            loop, scope = self._of
            _ = loop.call_soon_threadsafe(scope.cancel)

    def scope(self) -> anyio.CancelScope:
        """What is cancelled, on the running loop."""
        scope = anyio.CancelScope()
        self._of = asyncio.get_running_loop(), scope
        if self.pressed:
            scope.cancel()
        return scope


_Told: TypeAlias = "events.AnyEvent | Question | None"
"""What the loop tells the main thread about a line, in order; None: the line is done."""


@final
class Talk:
    """One session of a chat. All printing and reading is in the main thread, so that nothing comes in between."""

    def __init__(
        self,
        portal: BlockingPortal,
        session: Session,
        screen: Screen,
        lines: Lines,
        *,
        temperature: float,
        max_tokens: int,
    ) -> None:
        self._portal = portal
        self._session = session
        self._screen = screen
        self._lines = lines
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._told: SimpleQueue[_Told] = SimpleQueue()
        self._exchanges: list[Exchange] = []
        self._start = session.tokens

    def run(self) -> bool:
        """Whether another session is wanted."""
        with self._lines.during(lambda: None):
            while (line := self._lines.read(_PROMPT)) is not None:
                match line.strip():
                    case "":
                        pass
                    case "/quit":
                        break
                    case "/new":
                        return True
                    case word if word.startswith("/") and not word.startswith("//"):
                        self._command(word)
                    case word:
                        self._ask(word[1:] if word.startswith("//") else line)
        return False

    # ---- commands -------------------------------------------------------------------------------------------------
    def _command(self, word: str) -> None:
        match word:
            case "/help":
                for name, what in COMMANDS.items():
                    self._screen.line(f"{name:8}{what}")
                self._screen.line(_HINT)
            case "/tools":
                for tool in self._session.tools:
                    self._screen.line(described(tool))
                if not self._session.tools:
                    self._screen.line("There are none; start the chat with --tools FILE.")
            case "/usage":
                self._usage()
            case "/undo":
                _ = self._undo()
            case "/retry":
                if (last := self._undo()) is not None:
                    self._ask(last.line)
            case _:
                known = ", ".join(COMMANDS)
                self._screen.error(f"There is no command {word}. The commands are: {known}. {_HINT}")

    def _usage(self) -> None:
        session = self._session
        usage = session.usage
        self._screen.line(f"{session.tokens} of {session.context_limit} tokens of the context are used.")
        self._screen.line(f"{usage.turns} turn{'' if usage.turns == 1 else 's'}: {cost(usage)}")

    def _undo(self) -> Exchange | None:
        """The exchange that was taken back, if there was one."""
        if not self._exchanges:
            self._screen.line("There is nothing to undo.")
            return None
        last = self._exchanges[-1]
        try:
            self._portal.call(self._session.rewind, last.before)
        except errors.AgentspeedError as error:
            self._screen.error(error)
            return None
        _ = self._exchanges.pop()
        self._screen.line(f"(back to before: {last.line}{_still_done(last.ran)})")
        return last

    # ---- one line -------------------------------------------------------------------------------------------------
    def _ask(self, line: str) -> None:
        cancel = Cancel()
        ran: dict[str, str] = {}
        with self._lines.during(cancel):
            answering = self._portal.start_task_soon(self._answer, line, cancel)
            answering.add_done_callback(lambda _: self._told.put(None))
            while (told := self._told.get()) is not None:
                if isinstance(told, Question):
                    self._put(told, cancel)
                    continue
                self._screen.event(told)
                if isinstance(told, events.ToolStarted):
                    ran[told.call.id] = told.call.name
            outcome = answering.result()
        self._report(Exchange(before=outcome.before, line=line, ran=tuple(dict.fromkeys(ran.values()))), outcome)

    async def _answer(self, line: str, cancel: Cancel) -> Outcome:
        """On the loop. A line that is not answered, cancelled or failed, is taken back with its calls and results."""
        before = await self._session.mark()
        problems: list[errors.AgentspeedError] = []
        try:
            with cancel.scope():
                result = await self._session.run(
                    line,
                    temperature=self._temperature,
                    max_tokens=self._max_tokens,
                    approve=self._approve,
                    on_event=self._told.put,
                )
                return Outcome(before=before, result=result)
        except errors.InternalError:
            raise
        except errors.AgentspeedError as error:
            problems.append(error)
        too_long = False
        try:
            if self._session.tokens != before.tokens:
                await self._session.rewind(before)
            if any(isinstance(problem, errors.ContextOverflow) for problem in problems):
                too_long = self._is_too_long(line)
        except errors.InternalError:
            raise
        except errors.AgentspeedError as error:
            problems.append(error)
        return Outcome(
            before=before, problems=tuple(problems), undone=self._session.tokens == before.tokens, too_long=too_long
        )

    def _is_too_long(self, line: str) -> bool:
        """Whether even a new session has no room for the line and one token of an answer."""
        engine = self._session.engine
        asked = engine.count_tokens(User(line)) + len(engine.codec.generation_ids)
        return self._start + asked >= self._session.context_limit

    def _report(self, exchange: Exchange, outcome: Outcome) -> None:
        screen = self._screen
        if (result := outcome.result) is not None:
            self._exchanges.append(exchange)
            screen.end_line()
            if result.reply.finish_reason == "max_tokens":
                within = len(result.reply.ids) < self._max_tokens
                screen.line(f"(cut: {_FULL if within else f'--max-tokens is {self._max_tokens}'})")
            if result.reason == "max_turns":
                screen.line(f"(ended after {result.turns} turns)")
            screen.line(cost(result.usage))
            return
        for problem in outcome.problems:
            screen.error(problem)
            if isinstance(problem, errors.ContextOverflow):
                screen.error(_ALONE if outcome.too_long else _FULL if self._exchanges else _WITH_TOOLS)
        word = "" if outcome.problems else "cancelled; "
        if outcome.undone:
            screen.line(f"({word}the chat goes on as if you had not asked{_still_done(exchange.ran)})")
        else:
            self._exchanges.append(exchange)
            screen.line(f"({word}what was said so far stays in the session; /undo takes it back)")

    # ---- approval -------------------------------------------------------------------------------------------------
    async def _approve(self, call: ToolCall) -> bool:
        """On the loop."""
        question = Question(call)
        self._told.put(question)
        await question.answered.wait()
        return question.granted

    def _put(self, question: Question, cancel: Cancel) -> None:
        """In the main thread: one question at a time, with every argument that the tool will run with."""
        call = question.call
        if not self._lines.can_ask:
            self._screen.line(f"{call.name} needs your approval, and no terminal is there to ask: not approved.", "red")
        elif not cancel.pressed:
            self._screen.line(f"May this run?  {whole(call)}", "yellow")
            try:
                question.granted = self._lines.agreed("[y/N] ")
            except KeyboardInterrupt:
                print()
                cancel()
        self._portal.call(question.answered.set)


_FULL: Final = "the context is full: /undo goes back before your last question, /new begins a new session"
_ALONE: Final = "this line alone does not fit into the context"
_WITH_TOOLS: Final = "this line with what its tools gave does not fit into the context"


def _still_done(ran: tuple[str, ...]) -> str:
    return f", but what {' and '.join(ran)} did is not undone" if ran else ""
