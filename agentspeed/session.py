"""The session: what an agent opens, goes on with, forks and rewinds. It owns no task and no KV."""

from __future__ import annotations

import dataclasses
import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, final, overload

import anyio
import anyio.to_thread
import msgspec

from agentspeed import errors, events
from agentspeed.asking import Asked, Defaults, Prompt, TurnOptions, ask, check_names, check_session, messages_of
from agentspeed.branch import Branch, Opening
from agentspeed.checking import check_count, check_number, check_text, is_whole, shown
from agentspeed.engine import Engine
from agentspeed.front import transcript
from agentspeed.front.codec import ChatCodec, History
from agentspeed.front.mirror import Checkpoint, Mirror
from agentspeed.marks import Mark
from agentspeed.messages import Assistant, Message, ToolCall, ToolMessage
from agentspeed.pausing import Pausing
from agentspeed.sampling import Sampling
from agentspeed.tools import Approve, OnError, Tool, tools_from
from agentspeed.transport.base import wire
from agentspeed.turn import Reply, Turn, usage_of
from agentspeed.usage import Lease, Residence, Usage
from agentspeed.whole import whole

if TYPE_CHECKING:
    from agentspeed.forks import Forks
    from agentspeed.front.output import Choice, Regex, Schema
    from agentspeed.running import Pending, Result
    from agentspeed.trajectory import Trajectory

T = TypeVar("T")
_TOO_OLD = (-1, -1)
"""Where a child was forked that no trunk can adopt any more."""
_LARGE_CHARS = 8192
"""Longer new messages are tokenised in a worker thread: the event loop never waits for them."""


@final
class Session:
    """`async with Session("model", system="...", tools=[...]) as s: reply = await s.generate("...")`

    `model`: a Hugging Face model folder or repository id, an `Engine`, or None for the model that ships with the
    package. Sessions of one model and the same `engine_options` share one engine process. A session belongs to one
    task at a time; one turn at a time. `private` rows are never shared and are dropped at the end; `tenant` separates
    what may be shared. `record_logprobs` keeps the drawn ids' log-probabilities for `trajectory()`.

    `reasoning`: the model may think before it answers; switched in the template where it has a variable for that.
    `history_reasoning`: "template" leaves out of the log what the model's template leaves out of earlier answers, which
    computes those answers again; "keep" keeps every id. `template_variables` are given to the chat template."""

    def __init__(
        self,
        model: str | os.PathLike[str] | Engine | None = None,
        *,
        system: str | None = None,
        tools: Sequence[Tool | Callable[..., object]] = (),
        sampling: Sampling | None = None,
        private: bool = False,
        tenant: str | None = None,
        seed: int | None = None,
        name: str | None = None,
        timeout: float | None = None,
        record_logprobs: bool = False,
        reasoning: bool = False,
        history_reasoning: History = "template",
        template_variables: Mapping[str, Any] | None = None,
        close_timeout: float = 5.0,
        **engine_options: Any,
    ) -> None:
        check_session(system=system, sampling=sampling, private=private, tenant=tenant, seed=seed, name=name,
                      timeout=timeout, close_timeout=close_timeout, engine_options=engine_options)
        if history_reasoning not in ("template", "keep"):
            raise errors.InvalidRequest(f"history_reasoning is {history_reasoning!r}; it must be 'template' or 'keep'.")
        self.id = name or secrets.token_hex(4)
        self.parent: Session | None = None
        self.system = system
        if isinstance(model, Engine):
            if engine_options:
                raise errors.InvalidRequest(f"Unknown options {', '.join(sorted(engine_options))}.",
                                            remedy="Engine options are given to Engine(...).")
            self.engine, self._owns_engine = model, False
        else:
            self.engine, self._owns_engine = Engine.shared(model, engine_options), True
        self.defaults = Defaults(tools=tools_from(tools), sampling=sampling or Sampling(), timeout=timeout,
                                 record_logprobs=record_logprobs, reasoning=reasoning,
                                 history_reasoning=history_reasoning, template_variables=template_variables or {})
        self.opening = Opening(label=self.id, tenant=tenant or "", private=private, close_timeout=close_timeout,
                               seed=secrets.randbits(62) if seed is None else seed)
        self.usage = Usage()
        self._branch = Branch(self.engine, self.opening, Mirror())
        self._state: Literal["new", "open", "closed"] = "new"
        self._busy: Turn[Any] | str | None = None
        """The running turn, or the verb that is being carried out."""
        self._reply_at = 0
        self._label = "root"
        self._children: list[Session] = []
        """Those that are open."""
        self._births = 0
        self._moves = 0
        """Grows with every verb that changes the log; a child remembers it, and how long the log was, for `adopt`."""
        self._forked_at: tuple[int, int] = (0, 0)
        self._events = itertools.count(1)
        self._rested_at: float | None = None
        self._pausing = Pausing()

    # ---- the block ------------------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise errors.SessionClosed("A session is entered once.", remedy="Make a new one, or restore a snapshot.")
        try:
            if self._owns_engine:
                _ = await self.engine.start()
            self._state = "open"
            if not len(self._mirror):
                definitions = [tool.definition() for tool in self.tools]
                self._mirror.append(self.codec.opening(self.system, definitions))
            _ = await self._branch.attach()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the session before its block does: what only it holds is free at once. Calling it again does nothing.
        A turn that runs in another task raises `SessionClosed` there.

        Bounded, and silent about an engine that is gone: nothing may hide the body's own exception."""
        if self._state == "closed":
            return
        self._state = "closed"
        await whole(self._close)

    async def _close(self) -> None:
        for child in tuple(self._children):
            await child.close()
        await self._branch.close()
        if self._owns_engine:
            await self.engine.close()
        if self.parent is not None and self in self.parent._children:
            self.parent._children.remove(self)

    # ---- turns ----------------------------------------------------------------------------------------------------
    @overload
    def stream(self, prompt: Prompt = None, **options: Unpack[TurnOptions]) -> Turn[str]: ...
    @overload
    def stream(self, prompt: Prompt = None, *, output: type[T] | Schema[T],
               **options: Unpack[TurnOptions]) -> Turn[T]: ...
    @overload
    def stream(self, prompt: Prompt = None, *, output: Regex | Choice, **options: Unpack[TurnOptions]) -> Turn[str]: ...
    @overload
    def stream(self, prompt: Prompt = None, *, output: Any, **options: Unpack[TurnOptions]) -> Turn[Any]: ...
    def stream(self, prompt: Prompt = None, *, output: Any = str, **options: Unpack[TurnOptions]) -> Turn[Any]:
        """A turn to iterate over: `async with s.stream("...") as turn: async for event in turn: ...`

        Without a prompt the model goes on with its open message, or answers the last message. Raises `SessionBusy` when
        a turn runs, and `InvalidRequest`, `SchemaUnsupported` or `ContextOverflow` for what cannot be."""
        self._must_be_open()
        check_names(options)
        codec, given = self.codec, [*self._pausing.due(self._mirror), *messages_of(prompt)]
        tags = codec.tags if self._busy is not None else transcript.tags_for(self._mirror, codec, given)
        return Turn(self, ask(prompt, output, options, self.defaults, codec, tags))

    @overload
    async def generate(self, prompt: Prompt = None, **options: Unpack[TurnOptions]) -> Reply[str]: ...
    @overload
    async def generate(self, prompt: Prompt = None, *, output: type[T] | Schema[T],
                       **options: Unpack[TurnOptions]) -> Reply[T]: ...
    @overload
    async def generate(self, prompt: Prompt = None, *, output: Regex | Choice,
                       **options: Unpack[TurnOptions]) -> Reply[str]: ...
    @overload
    async def generate(self, prompt: Prompt = None, *, output: Any, **options: Unpack[TurnOptions]) -> Reply[Any]: ...
    async def generate(self, prompt: Prompt = None, *, output: Any = str,
                       **options: Unpack[TurnOptions]) -> Reply[Any]:
        """One whole turn; the options are those of `stream`. Raises `OutputError` when the text is not an `output`."""
        async with self.stream(prompt, output=output, **options) as turn:
            return await turn.reply()

    async def run(
        self, prompt: Prompt = None, *, output: Any = str, max_turns: int = 16, output_retries: int = 1,
        approve: Approve | None = None, tool_data: object = None, expect: float | None = None,
        on_event: Callable[[events.AnyEvent], None] | None = None, **options: Unpack[TurnOptions],
    ) -> Result[Any]:
        """Turns and tools until the model answers, at most `max_turns` turns; in the last one it cannot call a tool,
        for nobody would read the result.

        Each turn is atomic; while tools run the branch is held under a lease, and whatever happens to a tool its call
        gets a result, in call order. `approve` is asked about tools that need it; without it they are denied.
        `expect`: seconds the tools will take, if you know better than the engine learns. `tool_data` is what tools find
        in their `ToolContext`; `on_event` is called with every event."""
        from agentspeed.running import Run

        check_names(options)
        driver = Run(self, output=output, approve=approve, tool_data=tool_data, expect=expect, on_event=on_event,
                     options=options)
        return await driver.drive(messages_of(prompt), max_turns, output_retries)

    def tool_call(self, call: ToolCall, *, timeout: float | None = None, expect: float | None = None,
                  on_error: OnError = "return") -> AbstractAsyncContextManager[Pending]:
        """`async with s.tool_call(call) as pending: pending.result = await search(**pending.arguments)`

        At the end of the block the result enters the log, in call order, once every call of the turn has one. A block
        that raises, is cancelled or takes too long leaves a result that says so."""
        from agentspeed.running import tool_call

        self._must_be_open()
        return tool_call(self, call, timeout=timeout, expect=expect, on_error=on_error)

    async def add(self, *messages: str | Message, prefill: bool = False) -> Mark:
        """Messages without a turn; a string is a user's. `prefill` computes their rows now, while nobody waits: when it
        is cancelled the messages stay."""
        given: list[Message] = [*messages_of(messages)]
        with self._doing("add"):
            if any(not isinstance(message, ToolMessage) for message in given):  # whose words close open calls
                by_hand = {message.call_id for message in given if isinstance(message, ToolMessage)}
                given = [*(due for due in self._pausing.due(self._mirror) if due.call_id not in by_hand), *given]
            await self._revise(given)
            await self._branch.append(
                lambda: _beside(given, lambda: transcript.write(self._mirror, self.codec, given)))
            self._moves += 1
            self._pausing.leave(self._mirror)
            if prefill:
                await self._branch.prefill(self._prefilled)
        return Mark(None, self._mirror)

    def _prefilled(self, usage: wire.TurnUsage) -> None:
        self.usage = self.usage + dataclasses.replace(usage_of(usage), turns=0)

    # ---- branches -------------------------------------------------------------------------------------------------
    def fork(self, n: int = 1, *, at: Mark | str | int | None = None) -> Forks:
        """`async with s.fork(4) as branches:` n children with the same context; no prefill, no copy.

        Legal while a turn runs: the children share what is committed so far, and their assistant message is open.
        They are closed at the end of the block, unless adopted."""
        from agentspeed.forks import Forks

        self._must_be_open()
        check_count("n", n)
        return Forks(self, n, None if at is None else self._point(at).tokens)

    async def adopt(self, child: Session) -> None:
        """The child's context becomes this session's; the child is closed.

        Raises `SessionBusy` when either has a turn running, `TrunkMoved` when this session went on since the fork,
        `ChildUnrelated` for anything but a child of this session."""
        if not isinstance(child, Session) or child.parent is not self:
            other = child.id if isinstance(child, Session) else repr(child)
            raise errors.ChildUnrelated(f"{other} is not a child of {self.id}.",
                                        remedy="Adopt a child of this very session.")
        with self._doing("adopt"), child._doing("adopt"):
            if child._forked_at != (self._moves, self.tokens):
                raise errors.TrunkMoved(f"Session {self.id} went on after {child.id} was forked.",
                                        remedy="Adopt before it goes on, or go on with the child instead.")
            for branch in (self._branch, child._branch):
                _ = await branch.attach()  # an engine that has to be started first is no part of the step
            await whole(lambda: self._adopt(child))

    async def _adopt(self, child: Session) -> None:
        marks, told = self._mirror.marks, (child._moves, child.tokens)
        await self._branch.adopt(child._branch)
        self._mirror.marks = marks | self._mirror.marks
        child._state = "closed"
        self._children.remove(child)
        self.usage = self.usage + child.usage
        self._pausing.adopt(child._pausing)
        self._moves += 1
        for grandchild in child._children:  # they hang below what is the trunk's now, and know how old they are
            grandchild.parent = self
            grandchild._forked_at = (self._moves, self.tokens) if grandchild._forked_at == told else _TOO_OLD
        self._children += child._children
        child._children = []
        self._pausing.leave(self._mirror)

    async def mark(self, name: str | None = None) -> Mark:
        """Here, to come back to with `rewind`; a name is remembered, travels to forks and snapshots, and stands for the
        latest mark that was given it."""
        self._must_be_idle()
        if name is not None and not (isinstance(name, str) and name):
            raise errors.InvalidRequest(f"name is {name!r}; it must be a text that is not empty, or None.")
        check_text("name", name or "")
        mark = Mark(name, self._mirror)
        if name is not None:
            self._mirror.marks[name] = mark.point
        return mark

    async def rewind(self, to: Mark | str | int) -> None:
        """Exactly back to a mark, or to any token position. Rows after it stay cached. Raises `MarkNotFound`.

        Position 0 is before the system text and the tools too: to keep them, go back to a mark of the beginning. In
        the middle of the model's message, `generate()` goes on with it."""
        with self._doing("rewind"):
            point = self._point(to)
            _ = await self._branch.attach()
            await whole(lambda: self._rewind(point))

    async def _rewind(self, point: Checkpoint) -> None:
        await self._branch.rewind(point)
        self._moves += 1
        self._pausing.leave(self._mirror)

    def _point(self, to: Mark | str | int) -> Checkpoint:
        if isinstance(to, str):
            if to not in self._mirror.marks:
                known = ", ".join(self._mirror.marks) or "none"
                raise errors.MarkNotFound(f"There is no mark {to!r}; the marks are: {known}.")
            return self._mirror.marks[to]
        if isinstance(to, Mark):
            if not to.fits(self._mirror):
                raise errors.MarkNotFound(f"{to!r} is not in this session any more.",
                                          remedy="It was rewound to before the mark; make a new one.")
            return to.point
        if not is_whole(to):
            raise errors.MarkNotFound(f"{to!r} is no mark, name or position.",
                                      remedy="Give what mark() gave, a mark's name, or a number of tokens.")
        if not 0 <= to <= len(self._mirror):
            raise errors.MarkNotFound(f"Position {shown(to)} is not in a session of {len(self._mirror)} tokens.")
        return self._mirror.at(to)

    # ---- pauses ---------------------------------------------------------------------------------------------------
    async def expect(self, seconds: float | None, *, keep: Literal["soft", "firm"] = "soft", tool: str = "") -> Lease:
        """Says when this session will be used again; the answer says what was granted, until when, and why. `seconds`
        None: nobody knows, and the engine goes by the pauses it has seen (of `tool`); a firm lease needs an end."""
        if seconds is not None:
            check_number("seconds", seconds)
        if keep not in ("soft", "firm"):
            raise errors.InvalidRequest(f"keep is {keep!r}; it must be 'soft' or 'firm'.")
        check_text("tool", tool)
        with self._doing("expect"):
            return await self._branch.expect(seconds, keep, tool)

    async def inspect(self) -> wire.Inspected:
        """What the engine says of this branch now; `residence` and `repr` show it afterwards."""
        self._must_be_open()
        return await self._branch.inspect()

    # ---- durable values -------------------------------------------------------------------------------------------
    async def snapshot(self) -> bytes:
        """Ids, messages, marks and options: everything but KV. `Session.restore` opens it again, anywhere."""
        from agentspeed.snapshots import dump

        self._must_be_idle()
        return dump(self)

    @classmethod
    def restore(cls, data: bytes, model: str | os.PathLike[str] | Engine | None = None, **options: Any) -> Session:
        """A session as it was at `snapshot`; enter it like any other. Tools are functions: give them again.

        Raises `InvalidRequest` for what is no snapshot, or one of another version or tokenizer."""
        from agentspeed.snapshots import load

        return load(data, model, options)

    def trajectory(self) -> Trajectory:
        """Ids, log-probabilities and the mask of model-made ids, exactly as the engine computed on them."""
        from agentspeed.trajectory import Trajectory

        return Trajectory.of(self._mirror)

    @property
    def codec(self) -> ChatCodec:
        """Messages to ids as this session's model, system text, tools and reasoning have it."""
        defaults = self.defaults
        return self.engine.codec.view(
            reasoning=defaults.reasoning, history=defaults.history_reasoning, variables=defaults.template_variables,
            system=self.system is not None, tools=bool(defaults.tools))

    # ---- what it is -----------------------------------------------------------------------------------------------
    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the model was told about in the session's first message."""
        return self.defaults.tools

    @property
    def messages(self) -> tuple[Message, ...]:
        """Whole messages, in order, without the system text (that is `system`). One that `max_tokens` or `stop` ended
        is whole but open: `generate()` goes on with it. What a running turn has said so far is not among them."""
        return self._mirror.messages

    @property
    def tokens(self) -> int:
        """Known tokens."""
        return len(self._mirror)

    @property
    def ids(self) -> tuple[int, ...]:
        """Every id of the log."""
        return tuple(self._mirror.ids)

    @property
    def residence(self) -> Residence:
        """Where the rows were when the engine last said so (turns, `expect`, `inspect`), of the tokens known now."""
        return self._branch.residence.within(self.tokens)

    @property
    def lease(self) -> Lease | None:
        """The engine's last answer to `expect`; None once a turn has begun."""
        return self._branch.lease

    def tree(self) -> str:
        """This session and its children that are open, a line each."""
        lines = [repr(self)]
        for child in self._children:
            if child._state == "open":
                lines += [f"  {line}" for line in child.tree().splitlines()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        turns = f"{self.usage.turns} turn{'' if self.usage.turns == 1 else 's'}"
        rows = self.residence
        where = f"{self.tokens} tok ({rows.device + rows.host} cached)"
        return f"<Session {self.id} {self._label} · {turns} · {where} · {self._state_text()}>"

    def _state_text(self) -> str:
        if self._state != "open":
            return self._state
        if self._busy is not None and not self._pausing.on:
            return "running"
        kept = f", {self.lease.keep} lease" if self.lease is not None else ""
        if self.lease is not None and self.lease.seconds:
            kept += f" {self.lease.seconds:g}s"
        if self.residence.host:
            kept += f", {self.residence.host} tok on host"
        since = "" if self._rested_at is None else f" {time.monotonic() - self._rested_at:.1f}s"
        return f"held{since}{kept}"

    # ---- for Turn, Forks and the agent loop -----------------------------------------------------------------------
    @property
    def _mirror(self) -> Mirror:
        return self._branch.mirror

    def _must_be_open(self) -> None:
        if self._state != "open":
            raise errors.SessionClosed(
                "The session is closed." if self._state == "closed" else "The session was not entered.",
                remedy="Use it inside `async with`.")

    def _must_be_idle(self) -> None:
        self._must_be_open()
        if self._busy is not None:
            what = self._busy if isinstance(self._busy, str) else "a turn"
            raise errors.SessionBusy(f"Session {self.id} is busy: {what} has not ended.",
                                     remedy="Wait for it, leave its block, or fork to go two ways at once.")

    @contextmanager
    def _doing(self, verb: str) -> Iterator[None]:
        """One thing at a time: whatever else is asked meanwhile is `SessionBusy`, never interleaved."""
        self._must_be_idle()
        self._busy = verb
        try:
            yield
        finally:
            self._busy = None

    async def _begin(self, turn: Turn[Any], asked: Asked) -> list[int]:
        """Queues the turn; gives the ids of the open message that it goes on with."""
        self._must_be_idle()
        self._busy = turn
        codec = self.codec
        continued: list[int] = []

        def write() -> list[int]:
            return transcript.open_reply(self._mirror, codec, [*self._pausing.due(self._mirror), *asked.messages])

        async def plan() -> wire.Generate:
            nonlocal continued
            continued = await _beside(asked.messages, write)
            self._reply_at = self._mirror.open_at or 0
            return asked.command(codec.stop_ids, len(continued))

        def heard(event: wire.Event | None) -> None:
            if isinstance(event, wire.TurnEnded):
                transcript.settle(self._mirror, codec, event.reason)
            turn.sink(event)

        try:
            await self._revise([*self._pausing.due(self._mirror), *asked.messages], complete=True)
            await self._branch.begin(plan, heard, asked.timeout)
        except BaseException:
            self._busy = None
            raise
        self._moves += 1
        self._pausing.overtaken()
        return continued

    async def _revise(self, messages: Sequence[Message], *, complete: bool = False) -> None:
        """Before messages are appended: what the template leaves out of earlier answers now is left out of the log."""
        codec = self.codec
        found = await _beside(messages, lambda: transcript.revision(self._mirror, codec, messages, complete=complete))
        if found is not None:
            await self._branch.revise(found.point, lambda: transcript.revise(self._mirror, found))

    def _turn_ended(self, turn: Turn[Any], message: Assistant) -> None:
        transcript.record(self._mirror, message, self._reply_at)
        self._branch.ended()
        self._rest(turn)

    def _rest(self, turn: Turn[Any]) -> None:
        self.usage = self.usage + turn.usage
        self._busy = None
        self._pausing.leave(self._mirror)
        self._rested_at = time.monotonic()

    async def _abort(self, turn: Turn[Any], *, keep: bool) -> None:
        """Stops a turn that was left early; the log goes back to before its messages, or keeps its partial text."""
        await whole(lambda: self._stopped(turn, keep))

    async def _stopped(self, turn: Turn[Any], keep: bool) -> None:
        try:
            kept = await self._branch.stop(keep=keep)
            turn.left()
            if kept:
                turn.drain()
                if self._mirror.open_at is not None:
                    transcript.settle(self._mirror, self.codec, "grammar_end")
                transcript.record(self._mirror, turn.message, self._reply_at)
        finally:
            self._rest(turn)

    def _died(self, turn: Turn[Any]) -> errors.AgentspeedError:
        """The engine or the session went during a turn; the mirror is as it was before it."""
        self._rest(turn)
        if self._state == "closed":
            return errors.SessionClosed("The session was closed while a turn of it ran.",
                                        remedy="Let its turns end before its block does.")
        return self._branch.death or errors.EngineDied(
            "The engine ended during the turn; the session is as it was before it.",
            remedy="Ask again: the engine is started anew and opens the session's ids.")

    def _resumed(self, usage: Usage) -> events.Resumed | None:
        """What the first turn after a pause found."""
        if not self._pausing.resumed():
            return None
        return events.Resumed(device=usage.resumed_device, host=usage.resumed_host, recomputed=usage.recomputed,
                              why=usage.why)

    def _stamped(self, event: events.AnyEvent) -> events.AnyEvent:
        return msgspec.structs.replace(event, seq=next(self._events), session_id=self.id)

    def _next_call_id(self) -> str:
        return f"call_{secrets.token_hex(4)}"


async def _beside(messages: Sequence[Message], write: Callable[[], T]) -> T:
    large = sum(len(message.text) for message in messages) > _LARGE_CHARS
    return await anyio.to_thread.run_sync(write) if large else write()


__all__ = ["Mark", "Session"]
