"""What `agentspeed chat` does: lines in, streamed answers out; a line that is not answered leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Literal, TypeAlias, final

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from agentspeed import Engine, Mark, Session, errors, events, snapshot
from agentspeed._base.wording import counted
from agentspeed._core.engine_options import EngineOptions
from agentspeed.cli.chat_screen import Screen, cost, described, shortened, whole
from agentspeed.cli.line_input import Lines
from agentspeed.cli.loading import LoadingLine, loading
from agentspeed.cli.tools_file import ToolsFile, tools_of
from agentspeed.messages import ToolCall, ToolMessage, User, role_of
from agentspeed.replies import Result

_PROMPT: Final = "> "
COMMANDS: Final = {
    "/help": "this list",
    "/tools": "the tools that the model may call",
    "/usage": "what this session has cost, and how full its context is",
    "/undo": "go back to before your last question; again: to before the one before",
    "/retry": "go back to before your last question, and ask it again",
    "/fork": "go on in a copy of this session; /back returns to this one as it is now",
    "/back": "leave a fork: the session goes on from where /fork was said",
    "/save": "/save FILE: this session in a file, which /load reads",
    "/load": "/load FILE: go on with a session that was saved, here or elsewhere",
    "/new": "a new session, in which nothing was said",
    "/quit": "end the chat, as Ctrl-D does",
}
_HINT: Final = "A line that begins with / is a command; //text sends /text to the model."


@final
class Chat:
    """One chat in a terminal."""

    def __init__(
        self,
        model: str | Path | Engine | None,
        *,
        tools: Path | None,
        system: str | None,
        temperature: float,
        max_tokens: int,
        options: EngineOptions | None = None,
    ) -> None:
        """`options`: of the engine."""
        self._model = model
        self._file = tools_of(tools) if tools is not None else ToolsFile()
        self._system = system
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._options = EngineOptions() if options is None else options

    def run(self) -> bool:
        """Until `/quit` or end of input, in the main thread; sessions live on an event loop in another one, so that
        lines can be edited and interrupted here. False when a line failed and no terminal is there to see it."""
        screen = Screen()
        screen.line("Starting the engine ...")
        for line in self._file.left_out:
            screen.line(f"left out of the tools: {line}", "yellow")
        with Lines() as lines, start_blocking_portal("asyncio") as portal:
            table = Table(portal=portal, screen=screen, lines=lines, new=self._new, saved=self._saved)
            with loading(quiet=True) as shown:
                session: Session | None = portal.call(self._new, None if isinstance(self._model, Engine) else shown)
            screen.line("Ctrl-C cancels an answer, Ctrl-D ends. /help lists the commands.")
            while session is not None:
                with portal.wrap_async_context_manager(closing(session)):
                    left = Talk(table, session, temperature=self._temperature, max_tokens=self._max_tokens).run()
                session = None if isinstance(left, str) else left
            return lines.can_ask or not screen.failed

    async def _new(self, on_start: LoadingLine | None = None) -> Session:
        return await Session(
            self._model, system=self._system, tools=self._file.tools, on_start=on_start, **self._options
        ).open()

    async def _saved(self, data: bytes) -> Session:
        return await Session.restore(data, self._model, tools=self._file.tools, **self._options).open()


@asynccontextmanager
async def closing(session: Session) -> AsyncIterator[None]:
    """Closes a session that is open."""
    try:
        yield
    finally:
        await session.close()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What every session of a chat is talked to with."""

    portal: BlockingPortal
    screen: Screen
    lines: Lines
    new: Callable[[], Awaitable[Session]]
    """Opens one in which nothing was said; on the loop, as `saved`, which opens one from its bytes."""
    saved: Callable[[bytes], Awaitable[Session]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One line and all that came of it."""

    before: Mark | int
    """Where the session goes back to."""
    line: str
    ran: tuple[str, ...]
    """Tools that ran: what they did stays done when the session goes back."""


def exchanges_of(session: Session) -> list[Exchange]:
    """Those of a session that was talked to elsewhere."""
    found: list[Exchange] = []
    for message, start in zip(session.messages, session.starts, strict=True):
        if isinstance(message, User):
            found.append(Exchange(before=start, line=message.text, ran=()))
        elif isinstance(message, ToolMessage) and found:
            ran = dict.fromkeys((*found[-1].ran, message.name))
            found[-1] = replace(found[-1], ran=tuple(ran))
    return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LineOutcome:
    """Of one line: a result, or why there is none; with neither it was cancelled. `undone`: the session is as it was
    before the line. `too_long`: no session has room for it."""

    before: Mark
    result: Result[Any] | None = None
    problems: tuple[errors.AgentspeedError, ...] = ()
    undone: bool = False
    too_long: bool = False


@final
class CallQuestion:
    """Whether a call may run: asked on the loop, answered in the main thread."""

    def __init__(self, call: ToolCall) -> None:
        self.call = call
        self.granted = False
        self.answered = anyio.Event()


@final
class CancelSwitch:
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


Left: TypeAlias = 'Session | Literal["end", "back"]'
"""How a talk was left: for another session, which is open; for none; for the one that it is a fork of."""
_Told: TypeAlias = "events.AnyEvent | CallQuestion | None"
"""What the loop tells the main thread about a line, in order; None: the line is done."""


@final
class Talk:
    """One session of a chat. All printing and reading is in the main thread, so that nothing comes in between."""

    def __init__(
        self, table: Table, session: Session, *, temperature: float, max_tokens: int, forked: bool = False
    ) -> None:
        self._table = table
        self._portal = table.portal
        self._session = session
        self._screen = table.screen
        self._lines = table.lines
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._forked = forked
        self._told: SimpleQueue[_Told] = SimpleQueue()
        self._exchanges = exchanges_of(session)
        self._start = session.starts[0] if session.starts else session.tokens

    def run(self) -> Left:
        """Until the person wants another session, or none."""
        with self._lines.during(lambda: None):
            while (line := self._lines.read(_PROMPT)) is not None:
                match line.strip():
                    case "":
                        pass
                    case "/quit":
                        break
                    case word if word.startswith("/") and not word.startswith("//"):
                        if (left := self._command(word)) is not None:
                            return left
                    case word:
                        self._ask(word[1:] if word.startswith("//") else line)
        return "end"

    # ---- commands -------------------------------------------------------------------------------------------------
    def _command(self, word: str) -> Left | None:
        """Where the chat goes on; None: here."""
        name, _, rest = word.partition(" ")
        match word if name not in ("/save", "/load") else name:
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
            case "/fork":
                return self._fork()
            case "/back":
                if self._forked:
                    return "back"
                self._screen.line("This is no fork: there is nothing to go back to.")
            case "/save":
                self._save(rest.strip())
            case "/load":
                return self._load(rest.strip())
            case "/new":
                return self._opened(self._table.new, "A new session.")
            case _:
                known = ", ".join(COMMANDS)
                self._screen.error(f"There is no command {word}. The commands are: {known}. {_HINT}")
        return None

    def _opened(self, make: Callable[[], Awaitable[Session]], hello: str) -> Session | None:
        """None when it could not be opened: this one goes on."""
        try:
            session = self._portal.call(make)
        except errors.InternalError:
            raise
        except errors.AgentspeedError as error:
            self._screen.error(error)
            return None
        self._screen.line(hello)
        return session

    def _fork(self) -> Left | None:
        child = self._opened(self._copied, "In a fork of this session; /back returns to it as it is now.")
        if child is None:
            return None
        with self._portal.wrap_async_context_manager(closing(child)):
            talk = Talk(self._table, child, temperature=self._temperature, max_tokens=self._max_tokens, forked=True)
            left = talk.run()
        if left != "back":
            return left
        self._screen.line("Back in the session that was forked.")
        return None

    async def _copied(self) -> Session:
        return await self._session.copy().open()

    def _save(self, name: str) -> None:
        try:
            path = _file(name, "/save FILE")
            if path.exists():
                _ = snapshot.load(path.read_bytes())  # what is no saved session is not written over
            data = self._portal.call(self._session.snapshot)
            _ = path.write_bytes(data)
        except errors.InvalidRequest as error:
            self._screen.error(f"Nothing was saved. {error}")
        except OSError as error:
            self._screen.error(f"Nothing was saved: {error}.")
        else:
            self._screen.line(f"Saved: {counted(len(self._session.messages), 'message')}, {len(data)} bytes in {path}.")

    def _load(self, name: str) -> Session | None:
        try:
            path = _file(name, "/load FILE")
            data = path.read_bytes()
        except (errors.InvalidRequest, OSError) as error:
            self._screen.error(f"Nothing was loaded: {error}")
            return None
        session = self._opened(lambda: self._table.saved(data), f"The session of {path}.")
        if session is not None:
            for message in session.messages[-2:]:
                self._screen.line(shortened(f"{role_of(message)}: {message.text}"))
        return session

    def _usage(self) -> None:
        session = self._session
        usage = session.usage
        self._screen.line(f"{session.tokens} of {session.context_limit} tokens of the context are used.")
        self._screen.line(f"{counted(usage.turns, 'turn')}: {cost(usage)}")

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
        cancel = CancelSwitch()
        ran: dict[str, str] = {}
        with self._lines.during(cancel):
            answering = self._portal.start_task_soon(self._answer, line, cancel)
            answering.add_done_callback(lambda _: self._told.put(None))
            while (told := self._told.get()) is not None:
                if isinstance(told, CallQuestion):
                    self._put(told, cancel)
                    continue
                self._screen.event(told)
                if isinstance(told, events.ToolStarted):
                    ran[told.call.id] = told.call.name
            outcome = answering.result()
        self._report(Exchange(before=outcome.before, line=line, ran=tuple(dict.fromkeys(ran.values()))), outcome)

    async def _answer(self, line: str, cancel: CancelSwitch) -> LineOutcome:
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
                return LineOutcome(before=before, result=result)
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
        return LineOutcome(
            before=before, problems=tuple(problems), undone=self._session.tokens == before.tokens, too_long=too_long
        )

    def _is_too_long(self, line: str) -> bool:
        """Whether even a new session has no room for the line and one token of an answer."""
        engine = self._session.engine
        asked = engine.count_tokens(User(line)) + len(engine.codec.generation_ids)
        return self._start + asked >= self._session.context_limit

    def _report(self, exchange: Exchange, outcome: LineOutcome) -> None:
        screen = self._screen
        if (result := outcome.result) is not None:
            self._exchanges.append(exchange)
            screen.end_line()
            if result.reply.finish_reason == "max_tokens":
                within = len(result.reply.ids) < self._max_tokens
                screen.line(f"(cut: {_FULL if within else f'--max-tokens is {self._max_tokens}'})")
            if result.reason == "max_turns":
                screen.line(f"(ended after {counted(result.turns, 'turn')})")
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
        question = CallQuestion(call)
        self._told.put(question)
        await question.answered.wait()
        return question.granted

    def _put(self, question: CallQuestion, cancel: CancelSwitch) -> None:
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


def _file(name: str, usage: str) -> Path:
    if not name:
        raise errors.InvalidRequest("No file was named.", remedy=usage)
    return Path(name).expanduser()


_FULL: Final = "the context is full: /undo goes back before your last question, /new begins a new session"
_ALONE: Final = "this line alone does not fit into the context"
_WITH_TOOLS: Final = "this line with what its tools gave does not fit into the context"


def _still_done(ran: tuple[str, ...]) -> str:
    return f", but what {' and '.join(ran)} did is not undone" if ran else ""
