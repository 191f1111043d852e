"""The session: what an agent opens, goes on with, forks and rewinds. It owns no task and no KV."""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, cast, final, overload

from agentspeed import errors, events, snapshot
from agentspeed._base.validate import check_count
from agentspeed._core.engine_handle import EngineHandle
from agentspeed._core.engine_options import EngineOptions
from agentspeed._core.opening import Opening
from agentspeed._core.options import (
    Defaults,
    Prompt,
    RestoreOptions,
    RunOptions,
    SessionOptions,
    TurnOptions,
    TurnRequest,
    build_request,
    check_option_names,
    check_session,
    messages_of,
    plain_text,
    turn_options,
)
from agentspeed._core.session_core import SessionCore
from agentspeed.chat.codec import History
from agentspeed.compaction import Compaction, compact
from agentspeed.fork import Forks, adopt, copy
from agentspeed.marks import Mark
from agentspeed.message_formats import lists
from agentspeed.messages import Message, ToolCall
from agentspeed.observing import Observer
from agentspeed.replies import Reply, Result
from agentspeed.run import Run
from agentspeed.run_stream import RunStream
from agentspeed.sampling import Sampling
from agentspeed.score import Score, score
from agentspeed.session_values import SessionValues
from agentspeed.tool_call import Pending, tool_call
from agentspeed.tools import OnError, Tool, tools_from
from agentspeed.turn import Turn
from agentspeed.usage import Inspection, Lease, Starting

if TYPE_CHECKING:
    from agentspeed.chat.output import Choice, Regex, Schema

T = TypeVar("T")
__all__ = ["Prompt", "RestoreOptions", "RunOptions", "Session", "SessionOptions", "TurnOptions"]


@final
class Session(SessionValues):
    """`async with Session("model", system="...", tools=[...]) as s: reply = await s.generate("...")`

    `model`: a Hugging Face model folder or repository id, an `Engine`, or None for the model that ships with the
    package. Sessions of one model and the same `engine_options` share one engine process. A session belongs to one
    task at a time; one turn at a time. `private` rows are never shared and are dropped at the end; `tenant` separates
    what may be shared. `max_tokens` bounds each turn that is given no other; without it a turn may fill all the room
    that is left. `record_logprobs` keeps the drawn ids' log-probabilities for `trajectory()`. `idle_timeout`:
    after so many seconds in which nobody used it or a child of it, it closes itself; so do its copies, and what is
    restored of it. `observer` is told of every run, turn and tool of this session and its forks. `on_start` is told how
    far an engine is that starts for it, in the thread that waits for that."""

    def __init__(
        self,
        model: str | os.PathLike[str] | EngineHandle | None = None,
        *,
        system: str | None = None,
        tools: Sequence[Tool | Callable[..., object]] = (),
        sampling: Sampling | None = None,
        private: bool = False,
        tenant: str | None = None,
        seed: int | None = None,
        name: str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        record_logprobs: bool = False,
        reasoning: bool = False,
        history_reasoning: History = "template",
        template_variables: Mapping[str, Any] | None = None,
        close_timeout: float = 5.0,
        idle_timeout: float | None = None,
        observer: Observer | None = None,
        on_start: Callable[[Starting], object] | None = None,
        **engine_options: Unpack[EngineOptions],
    ) -> None:
        check_session(
            system=system,
            sampling=sampling,
            private=private,
            tenant=tenant,
            seed=seed,
            name=name,
            max_tokens=max_tokens,
            timeout=timeout,
            close_timeout=close_timeout,
            history_reasoning=history_reasoning,
            on_engine=isinstance(model, EngineHandle),
            on_start=on_start,
            idle_timeout=idle_timeout,
            engine_options=engine_options,
        )
        self._core = SessionCore(
            engine=model if isinstance(model, EngineHandle) else EngineHandle.shared(model, engine_options, on_start),
            owns_engine=not isinstance(model, EngineHandle),
            system=system,
            defaults=Defaults(
                tools=tools_from(tools),
                sampling=sampling or Sampling(),
                max_tokens=max_tokens,
                timeout=timeout,
                record_logprobs=record_logprobs,
                reasoning=reasoning,
                history_reasoning=history_reasoning,
                template_variables=template_variables or {},
                observer=observer,
            ),
            opening=Opening(
                label=name or secrets.token_hex(4),
                tenant=tenant or "",
                private=private,
                close_timeout=close_timeout,
                seed=secrets.randbits(62) if seed is None else seed,
            ),
        )
        self._core.face, self._core.idle_timeout = self, idle_timeout
        self._opening: tuple[Message, ...] = ()

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        model: str | os.PathLike[str] | EngineHandle | None = None,
        *,
        format: lists.Format = "openai",
        **options: Unpack[RestoreOptions],
    ) -> Session:
        """A session that begins with a list of messages as another SDK writes them; enter it like any other, which is
        when they enter the log. OpenAI's system messages become `system`; Anthropic's is not in its list: give it as
        `system=`. Raises `MessageMisfit` for what this product cannot read, and names the message."""
        system, found = lists.read(messages, format)
        if system is not None and options.setdefault("system", system) != system:
            raise errors.InvalidRequest(
                "The messages have a system text, and system= is another.", remedy="Leave one of them out."
            )
        session = cls(model, **options)
        session._opening = found
        return session

    @classmethod
    def over_text(
        cls,
        text: str | Sequence[int],
        model: str | os.PathLike[str] | EngineHandle | None = None,
        **options: Unpack[RestoreOptions],
    ) -> Session:
        """A session over a plain text instead of a conversation: `generate()` goes on with it as it stands. No template
        writes in it, nothing in it is a tool call or reasoning, and it has no messages. `text` may be token ids, which
        are taken as they are; to a string the tokenizer adds what its texts begin with. Fork, rewind, score and
        snapshot work as always."""
        given = plain_text(text, options)
        session = cls(model, **options)
        session._core.begin_with(given)
        return session

    @classmethod
    def _of(cls, core: SessionCore) -> Session:
        """The face of a core that was made of another session's."""
        session = cls.__new__(cls)
        session._core = core
        session._opening = ()
        core.face = session
        return session

    # ---- the block ------------------------------------------------------------------------------------------------
    async def open(self) -> Self:
        """Enters it without a block, for who opens it in one function and closes it in another: a web application, a
        cell of a notebook. `close` ends it."""
        await self._core.open()
        opening, self._opening = self._opening, ()
        if opening:
            try:
                _ = await self.add(*opening)
            except BaseException:
                await self._core.close()
                raise
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._core.close()

    async def close(self) -> None:
        """Ends the session before its block does: what only it holds is free at once. Calling it again does nothing.
        A turn that runs in another task raises `SessionClosed` there.

        Bounded, and silent about an engine that is gone: nothing may hide the body's own exception."""
        await self._core.close()

    # ---- turns ----------------------------------------------------------------------------------------------------
    @overload
    def stream(self, prompt: Prompt = None, **options: Unpack[TurnOptions]) -> Turn[str]: ...
    @overload
    def stream(
        self, prompt: Prompt = None, *, output: type[T] | Schema[T], **options: Unpack[TurnOptions]
    ) -> Turn[T]: ...
    @overload
    def stream(self, prompt: Prompt = None, *, output: Regex | Choice, **options: Unpack[TurnOptions]) -> Turn[str]: ...
    @overload
    def stream(self, prompt: Prompt = None, *, output: Any, **options: Unpack[TurnOptions]) -> Turn[Any]: ...
    def stream(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[TurnOptions]) -> Turn[Any]:
        """A turn to iterate over: `async with s.stream("...") as turn: async for event in turn: ...`

        Without a prompt the model goes on with its open message, or answers the last message. Raises `SessionBusy` when
        a turn runs, and `InvalidRequest`, `SchemaUnsupported` or `ContextOverflow` for what cannot be."""
        self._core.must_be_open()
        check_option_names(options)
        return Turn(self._core, self._request(prompt, output, options))

    def _request(self, prompt: Prompt, output: Any, options: TurnOptions) -> TurnRequest:
        core = self._core
        return build_request(prompt, output, options, core.defaults, core.tags_for(messages_of(prompt)))

    def check(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[TurnOptions]) -> None:
        """Raises what `stream` would raise for these arguments, and begins nothing."""
        self._core.must_be_open()
        check_option_names(options)
        _ = self._request(prompt, output, options)

    @overload
    async def generate(self, prompt: Prompt = None, **options: Unpack[TurnOptions]) -> Reply[str]: ...
    @overload
    async def generate(
        self, prompt: Prompt = None, *, output: type[T] | Schema[T], **options: Unpack[TurnOptions]
    ) -> Reply[T]: ...
    @overload
    async def generate(
        self, prompt: Prompt = None, *, output: Regex | Choice, **options: Unpack[TurnOptions]
    ) -> Reply[str]: ...
    @overload
    async def generate(self, prompt: Prompt = None, *, output: Any, **options: Unpack[TurnOptions]) -> Reply[Any]: ...
    async def generate(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[TurnOptions]) -> Reply[Any]:
        """One whole turn; the options are those of `stream`. Raises `OutputError` when the text is not an `output`."""
        async with self.stream(prompt, output=output, **options) as turn:
            return await turn.reply()

    async def run(
        self,
        prompt: Prompt = None,
        *,
        output: Any = str,
        on_event: Callable[[events.AnyEvent], None] | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[Any]:
        """Turns and tools until the model answers, at most `max_turns` turns. The options are those of `stream` and of
        `RunOptions`; `on_event` is called with every event.

        Each turn is atomic; while tools run the branch is held under a lease, and whatever happens to a tool its call
        gets a result, in call order. Raises what `stream` raises, and `OutputError` for an answer that is still not an
        `output` after the retries."""
        check_option_names(options, RunOptions)
        return await Run(self._core, output=output, options=options, on_event=on_event).drive(messages_of(prompt))

    def stream_run(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[RunOptions]) -> RunStream[Any]:
        """A run to iterate over: `async with s.stream_run("...") as run: async for event in run: ...`

        The arguments are those of `run`, and `run.result()` is what it gives. Raises what `stream` raises, and
        `SessionBusy` on entering; what the run raises comes where its events end."""
        check_option_names(options, RunOptions)
        self.check(prompt, output=output, **turn_options(options))
        core = self._core
        return RunStream(
            lambda heard, caught_up: Run(core, output=output, options=options, on_event=heard, caught_up=caught_up),
            messages_of(prompt),
            core.must_be_idle,
        )

    def tool_call(
        self, call: ToolCall, *, timeout: float | None = None, expect: float | None = None, on_error: OnError = "return"
    ) -> AbstractAsyncContextManager[Pending]:
        """`async with s.tool_call(call) as pending: pending.result = await search(**pending.arguments)`

        At the end of the block the result enters the log, in call order, once every call of the turn has one. A block
        that raises, is cancelled or takes too long leaves a result that says so."""
        self._core.must_be_open()
        return tool_call(self._core, call, timeout=timeout, expect=expect, on_error=on_error)

    async def add(self, *messages: str | Message, prefill: bool = False) -> Mark:
        """Messages without a turn; a string is a user's. `prefill` computes their rows now, while nobody waits: when it
        is cancelled the messages stay."""
        await self._core.add(messages_of(messages), prefill=prefill)
        return Mark(None, self._core.log)

    # ---- branches -------------------------------------------------------------------------------------------------
    def fork(self, n: int = 1, *, at: Mark | str | int | None = None) -> Forks[Session]:
        """`async with s.fork(4) as branches:` n children with the same context; nothing of it is computed again.

        Legal while a turn runs: the children share what is committed so far, and their assistant message is open.
        They are closed at the end of the block, unless adopted."""
        self._core.must_be_open()
        check_count("n", n)
        return Forks(self._core, n, None if at is None else self._core.point(at), Session._of)

    def copy(self, *, at: Mark | str | int | None = None) -> Session:
        """A session of its own over this one's log (or its beginning, up to `at`) and with its options; enter it like
        any other. Unlike a fork it is no child: it may outlive this session, if that was given an `Engine`. Rows that
        the engine still has are shared, unless the session is `private`. While a turn runs, `at` must be a place before
        it. Raises `SessionBusy` and `MarkNotFound`."""
        if at is None:
            self._core.must_be_idle()
        else:
            self._core.must_be_open()
        return Session._of(copy(self._core, self._core.log.checkpoint() if at is None else self._core.point(at)))

    async def adopt(self, child: Session) -> None:
        """The child's context becomes this session's; the child is closed.

        Raises `SessionBusy` when either has a turn running, `TrunkMoved` when this session went on since the fork,
        `ChildUnrelated` for anything but a child of this session."""
        await adopt(self._core, child._core if isinstance(child, Session) else child)

    async def mark(self, name: str | None = None) -> Mark:
        """Here, to come back to with `rewind`; a name is remembered, travels to forks and snapshots, and stands for the
        latest mark that was given it."""
        return self._core.mark(name)

    async def rewind(self, to: Mark | str | int) -> None:
        """Exactly back to a mark, or to any token position. Rows after it stay cached. Raises `MarkNotFound`.

        Position 0 is before the system text and the tools too: to keep them, go back to a mark of the beginning. In
        the middle of the model's message, `generate()` goes on with it."""
        await self._core.rewind(to)

    async def compact(
        self, *, keep: int = 0, summary: str | Callable[[Session], Awaitable[str]] | None = None
    ) -> Compaction:
        """This session goes on over a shorter log: what stands above the conversation (system text, tools), the summary
        as a user's message, and the last `keep` messages. Results stay with their calls, so it may keep more.

        `summary`: a text; or an async function, which is given a fork that ends where the kept messages begin, so that
        their room is free there; or None, for none. Named marks in what is kept move with it, those in what is dropped
        are gone; the answer says which. Usage and name stay. The rows of what stands above the conversation are shared;
        those of the kept messages are computed again, for they stand in another place.

        Raises `ContextOverflow` when that is still too long, `InvalidRequest` when the model's template does not have
        such a conversation, `SessionBusy`, and what `summary` raises; nothing has changed then."""
        return await compact(self._core, keep, summary, Session._of)

    # ---- pauses ---------------------------------------------------------------------------------------------------
    async def expect(self, seconds: float | None, *, keep: Literal["soft", "firm"] = "soft", tool: str = "") -> Lease:
        """Says when this session will be used again; the answer says what was granted, until when, and why. `seconds`
        None: nobody knows, and the engine goes by the pauses it has seen (of `tool`); a firm lease needs an end."""
        return await self._core.expect(seconds, keep, tool)

    async def inspect(self) -> Inspection:
        """What the engine says of this branch now; `residence` and `repr` show it afterwards."""
        self._core.must_be_open()
        return await self._core.branch.inspect()

    # ---- durable values -------------------------------------------------------------------------------------------
    async def snapshot(self) -> bytes:
        """Ids, messages, marks, results that wait for others, and options: everything but KV and what was spent.
        `Session.restore` opens it again, anywhere."""
        self._core.must_be_idle()
        tokenizer = await self._core.fingerprint()
        self._core.must_be_idle()
        return snapshot.dump(self._core, tokenizer)

    @classmethod
    def restore(
        cls,
        data: bytes,
        model: str | os.PathLike[str] | EngineHandle | None = None,
        **options: Unpack[RestoreOptions],
    ) -> Session:
        """A session as it was at `snapshot`; enter it like any other. Tools are functions: give them again, with the
        names and parameters that they had (other words in their descriptions do no harm). Without them it can be read,
        also before it is entered, and takes no turns. Options that are given replace those it had.

        Raises `InvalidRequest` for what is no snapshot, is one of another version, or has other tools; entering raises
        it for a model with another tokenizer."""
        found = snapshot.load(data)
        session = cls(model, **snapshot.options_of(found, options))
        snapshot.fill(session._core, found)
        return session

    async def score(self, text: str | Sequence[int], *, after: Prompt = None, top: int = 0) -> Score:
        """How likely the model would write `text` next: the natural logarithms of its own distribution, before
        temperature, the other sampling values and any grammar. `after`: messages that stand before its answer; without
        them the text goes on with the open message, or answers the last one. `text` may be token ids. `top`: the most
        likely ids at each place too, so many.

        The session stays as it is: a fork is scored, one engine step for each token. Raises `ContextOverflow` for a
        text that does not fit, `SessionBusy`, and `InvalidRequest`."""
        return await score(self._core, text, messages_of(after), top)

    @property
    def parent(self) -> Session | None:
        """The session that this one was forked from."""
        return None if self._core.parent is None else cast("Session", self._core.parent.face)
