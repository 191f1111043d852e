"""Sessions without `async`, for notebooks and scripts: the same verbs, carried out on an event loop in a thread.

The loop is started with the first session that is opened, shared by all, and ended with the last that is closed. Each
session belongs to one thread at a time, as an async one belongs to one task. Ctrl-C cancels what runs, as cancelling
does there: a turn leaves no trace.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from types import TracebackType
from typing import Any, Final, Generic, Literal, Protocol, Self, TypeVar, Unpack, final

import anyio.to_thread
from anyio.from_thread import BlockingPortal, BlockingPortalProvider

import agentspeed.session as asynchronous
from agentspeed import errors, events
from agentspeed._base.validate import shown
from agentspeed._core.engine_handle import EngineHandle
from agentspeed._core.options import Defaults, Prompt, RestoreOptions, RunOptions, TurnOptions
from agentspeed._core.session_core import State
from agentspeed.compaction import Compaction
from agentspeed.marks import Mark
from agentspeed.message_formats import lists
from agentspeed.messages import Message, ToolCall
from agentspeed.replies import Reply, Result
from agentspeed.run_stream import RunStream
from agentspeed.score import Score
from agentspeed.tool_call import Pending
from agentspeed.tools import OnError, Tool
from agentspeed.trajectory import Trajectory
from agentspeed.turn import Turn
from agentspeed.usage import Inspection, Lease, Residence, Usage

T = TypeVar("T")
__all__ = ["Session", "Stream", "entered"]
_LOOPS: Final = BlockingPortalProvider("asyncio")
_PATIENCE: Final = 10.0
"""Seconds that a call which was interrupted is waited for."""


class _Streamed(Protocol):
    """What a turn and a run have in common."""

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def __anext__(self) -> events.AnyEvent: ...

    def result(self) -> Any: ...


S = TypeVar("S", bound=_Streamed)


def _carry_out(portal: BlockingPortal, work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives. An exception that comes from elsewhere meanwhile (Ctrl-C) cancels it, and goes on once it has
    ended."""
    ended = threading.Event()

    async def carried() -> T:
        try:
            return await work()
        finally:
            ended.set()

    future = portal.start_task_soon(carried)
    try:
        return future.result()
    except BaseException:
        if not future.done():
            _ = future.cancel()
            _ = ended.wait(_PATIENCE)
        raise


@contextmanager
def entered(block: AbstractAsyncContextManager[T]) -> Generator[T, None, None]:
    """`with entered(Engine(pages=4096)) as engine, Session(engine) as s: ...`: an async block of agentspeed's as a
    plain one."""
    with _LOOPS as portal, portal.wrap_async_context_manager(block) as given:
        yield given


@final
class Stream(Generic[S]):
    """A turn or a run to iterate over, in a block of its own. Leaving it early cancels what runs."""

    def __init__(self, portal: BlockingPortal, stream: S) -> None:
        self._portal = portal
        self.stream = stream
        """The async one, whose values may be read: `result()`, and of a turn `text` and `usage`."""

    def __enter__(self) -> Self:
        _ = _carry_out(self._portal, self.stream.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _carry_out(self._portal, lambda: self.stream.__aexit__(kind, error, trace))

    def __iter__(self) -> Iterator[events.AnyEvent]:
        return self

    def __next__(self) -> events.AnyEvent:
        event = _carry_out(self._portal, self._next)
        if event is None:
            raise StopIteration
        return event

    async def _next(self) -> events.AnyEvent | None:
        try:
            return await self.stream.__anext__()
        except StopAsyncIteration:
            return None

    def result(self) -> Any:
        """The `Reply` of a turn, the `Result` of a run, that was read to its end. Raises `SessionError` before."""
        return self.stream.result()


@final
class Session:
    """`with Session(system="Be brief.") as s: print(s.generate("Hello!").text)`

    It has every verb and every value of `agentspeed.Session`, which says what they mean, with the same arguments. A
    model that is an `Engine` has been started (`entered`). In a
    notebook, where a block cannot go over several cells: `s = Session().open()`, and `s.close()` at the end."""

    def __init__(
        self, model: str | os.PathLike[str] | EngineHandle | None = None, **options: Unpack[RestoreOptions]
    ) -> None:
        self._over(asynchronous.Session(model, **options))

    def _over(self, session: asynchronous.Session) -> None:
        self.session = session
        """The async session, whose values may be read; its coroutines belong to the loop in the thread."""
        self._portal: BlockingPortal | None = None
        self._holds_loop = False
        """A child runs on its parent's."""
        self.parent: Session | None = None
        """The session that this one was forked from."""

    @classmethod
    def _of(cls, session: asynchronous.Session) -> Session:
        made = cls.__new__(cls)
        made._over(session)
        return made

    def _child(self, session: asynchronous.Session, portal: BlockingPortal) -> Session:
        made = self._of(session)
        made._portal, made.parent = portal, self
        return made

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        model: str | os.PathLike[str] | EngineHandle | None = None,
        *,
        format: lists.Format = "openai",
        **options: Unpack[RestoreOptions],
    ) -> Session:
        """A session that begins with a list of messages as another SDK writes them."""
        return cls._of(asynchronous.Session.from_messages(messages, model, format=format, **options))

    @classmethod
    def over_text(
        cls,
        text: str | Sequence[int],
        model: str | os.PathLike[str] | EngineHandle | None = None,
        **options: Unpack[RestoreOptions],
    ) -> Session:
        """A session over a plain text instead of a conversation: `generate()` goes on with it as it stands."""
        return cls._of(asynchronous.Session.over_text(text, model, **options))

    @classmethod
    def restore(
        cls,
        data: bytes,
        model: str | os.PathLike[str] | EngineHandle | None = None,
        **options: Unpack[RestoreOptions],
    ) -> Session:
        """A session as it was at `snapshot`; enter it like any other."""
        return cls._of(asynchronous.Session.restore(data, model, **options))

    # ---- the block ------------------------------------------------------------------------------------------------
    def open(self) -> Self:
        """Enters it without a block; `close` ends it."""
        portal = _LOOPS.__enter__()
        try:
            _ = _carry_out(portal, self.session.__aenter__)
        except BaseException as error:
            _LOOPS.__exit__(type(error), error, error.__traceback__)
            raise
        self._portal, self._holds_loop = portal, True
        return self

    def close(self) -> None:
        """Calling it again does nothing."""
        portal, self._portal = self._portal, None
        if portal is not None and (self._holds_loop or self.session.state != "closed"):
            try:
                _carry_out(portal, self.session.close)
            finally:
                if self._holds_loop:
                    _LOOPS.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        return _carry_out(self._running(), work)

    def _running(self) -> BlockingPortal:
        if self._portal is None or (self.session.state == "closed" and not self._holds_loop):
            raise errors.SessionClosed(
                "The session is not open.", remedy="Use it in `with Session(...) as s:`, or call open() first."
            )
        return self._portal

    # ---- turns ----------------------------------------------------------------------------------------------------
    def generate(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[TurnOptions]) -> Reply[Any]:
        """One whole turn."""
        return self._call(lambda: self.session.generate(prompt, output=output, **options))

    def stream(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[TurnOptions]) -> Stream[Turn[Any]]:
        """`with s.stream("...") as turn: for event in turn: ...`"""
        return Stream(self._running(), self.session.stream(prompt, output=output, **options))

    def check(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[TurnOptions]) -> None:
        """Raises what `stream` would raise for these arguments, and begins nothing."""
        self.session.check(prompt, output=output, **options)

    def run(
        self,
        prompt: Prompt = None,
        *,
        output: Any = str,
        on_event: Callable[[events.AnyEvent], None] | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[Any]:
        """Turns and tools until the model answers. Async tools, `approve` and `on_event` run on the loop's
        thread, each call of a plain tool in one of its own."""
        return self._call(lambda: self.session.run(prompt, output=output, on_event=on_event, **options))

    def stream_run(
        self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[RunOptions]
    ) -> Stream[RunStream[Any]]:
        """`with s.stream_run("...") as run: for event in run: ...`"""
        return Stream(self._running(), self.session.stream_run(prompt, output=output, **options))

    @contextmanager
    def tool_call(
        self, call: ToolCall, *, expect: float | None = None, on_error: OnError = "return"
    ) -> Generator[Pending, None, None]:
        """`with s.tool_call(call) as pending: pending.result = search(**pending.arguments)`

        No timeout: nothing can stop a plain block from outside."""
        block = self.session.tool_call(call, expect=expect, on_error=on_error)
        with self._running().wrap_async_context_manager(block) as pending:
            yield pending

    def add(self, *messages: str | Message, prefill: bool = False) -> Mark:
        """Messages without a turn."""
        return self._call(lambda: self.session.add(*messages, prefill=prefill))

    # ---- branches -------------------------------------------------------------------------------------------------
    @contextmanager
    def fork(self, n: int = 1, *, at: Mark | str | int | None = None) -> Generator[tuple[Session, ...], None, None]:
        """`with s.fork(4) as branches: ...`; they are closed at the end of the block, unless adopted."""
        portal = self._running()
        forks = self.session.fork(n, at=at)
        children = _carry_out(portal, forks.__aenter__)
        try:
            yield tuple(self._child(child, portal) for child in children)
        finally:
            _carry_out(portal, lambda: forks.__aexit__(None, None, None))

    def copy(self, *, at: Mark | str | int | None = None) -> Session:
        """A session of its own over this one's log, or its beginning; enter it like any other."""
        return self._of(self.session.copy(at=at))

    def adopt(self, child: Session) -> None:
        """The child's context becomes this session's; the child is closed."""
        if not isinstance(child, Session):
            raise errors.ChildUnrelated(f"{shown(child)} is no session.", remedy="Adopt a child of this very session.")
        self._call(lambda: self.session.adopt(child.session))

    def mark(self, name: str | None = None) -> Mark:
        """Here, to come back to with `rewind`."""
        return self._call(lambda: self.session.mark(name))

    def rewind(self, to: Mark | str | int) -> None:
        """Exactly back to a mark, or to any token position."""
        self._call(lambda: self.session.rewind(to))

    def compact(self, *, keep: int = 0, summary: str | Callable[[Session], str] | None = None) -> Compaction:
        """Goes on over a shorter log. A function that writes the summary is given a fork, and runs in a thread."""
        portal = self._running()
        told = (lambda fork: _written(summary, self._child(fork, portal))) if callable(summary) else summary
        return self._call(lambda: self.session.compact(keep=keep, summary=told))

    # ---- pauses ---------------------------------------------------------------------------------------------------
    def expect(self, seconds: float | None, *, keep: Literal["soft", "firm"] = "soft", tool: str = "") -> Lease:
        """Says when this session will be used again; the answer says what was granted."""
        return self._call(lambda: self.session.expect(seconds, keep=keep, tool=tool))

    def inspect(self) -> Inspection:
        """What the engine says of this branch now."""
        return self._call(self.session.inspect)

    # ---- values ---------------------------------------------------------------------------------------------------
    def snapshot(self) -> bytes:
        """Everything but KV; `Session.restore` opens it again."""
        return self._call(self.session.snapshot)

    def score(self, text: str | Sequence[int], *, after: Prompt = None, top: int = 0) -> Score:
        """How likely the model would write `text` next. The session stays as it is."""
        return self._call(lambda: self.session.score(text, after=after, top=top))

    def position(self, messages: int) -> int:
        """How many tokens the first `messages` messages are, with what closes them."""
        return self.session.position(messages)

    def to_messages(self, format: lists.Format = "openai") -> list[dict[str, Any]]:
        """The messages as another SDK writes them."""
        return self.session.to_messages(format)

    def trajectory(self) -> Trajectory:
        """Ids, log-probabilities and the mask of model-made ids."""
        return self.session.trajectory()

    @property
    def id(self) -> str:
        """The name it was given, or a random one."""
        return self.session.id

    @property
    def state(self) -> State:
        """ "new" before its block, "open" in it, "closed" after it."""
        return self.session.state

    @property
    def engine(self) -> EngineHandle:
        """What it runs on."""
        return self.session.engine

    @property
    def tenant(self) -> str | None:
        """The name under which it shares rows."""
        return self.session.tenant

    @property
    def private(self) -> bool:
        """Whether its rows are shared with its own forks alone."""
        return self.session.private

    @property
    def system(self) -> str | None:
        """The system text."""
        return self.session.system

    @property
    def defaults(self) -> Defaults:
        """What holds for turns that say nothing else."""
        return self.session.defaults

    @property
    def usage(self) -> Usage:
        """What all its turns have cost."""
        return self.session.usage

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the model was told about in the session's first message."""
        return self.session.tools

    @property
    def messages(self) -> tuple[Message, ...]:
        """Whole messages, in order, without the system text."""
        return self.session.messages

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last message that have no result in the log yet."""
        return self.session.open_calls

    @property
    def starts(self) -> tuple[int, ...]:
        """At which token each of `messages` begins."""
        return self.session.starts

    @property
    def context_limit(self) -> int:
        """The most tokens that the log may have."""
        return self.session.context_limit

    @property
    def room(self) -> int:
        """Tokens that are left of the context."""
        return self.session.room

    @property
    def tokens(self) -> int:
        """Known tokens."""
        return self.session.tokens

    @property
    def ids(self) -> tuple[int, ...]:
        """Every id of the log."""
        return self.session.ids

    @property
    def residence(self) -> Residence:
        """Where the rows were when the engine last said so."""
        return self.session.residence

    @property
    def lease(self) -> Lease | None:
        """The engine's last answer to `expect`."""
        return self.session.lease

    def tree(self) -> str:
        """This session and its children that are open, a line each."""
        return self.session.tree()

    def __repr__(self) -> str:
        return repr(self.session)


async def _written(summary: Callable[[Session], str], fork: Session) -> str:
    """In a thread: what it asks of the fork is carried out on the loop."""
    return await anyio.to_thread.run_sync(summary, fork)
