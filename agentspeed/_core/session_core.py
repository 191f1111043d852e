"""What a session is below its public face: one log on one branch, one thing at a time, begun and ended here.

Everything that changes the log passes through here, so busy and idle, the count of changes that `adopt` goes by, the
pending calls and the costs are kept in one place. `Turn`, `Run`, `ToolCallBlock`, `Forks` and snapshots are written on
this; none of them is known here.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeVar, final

import anyio.to_thread
import msgspec

from agentspeed import errors, events
from agentspeed._base.completion import run_to_completion
from agentspeed._base.validate import check_number, check_text, shown
from agentspeed._core import account
from agentspeed._core.branch import Branch
from agentspeed._core.engine_handle import EngineHandle
from agentspeed._core.idle_watch import IdleWatch
from agentspeed._core.opening import Opening
from agentspeed._core.options import Defaults, no_messages
from agentspeed._core.pending_calls import PendingCalls
from agentspeed._core.turn_record import TurnRecord
from agentspeed._core.wire_values import usage_of
from agentspeed.chat import transcript
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.key_values import ArgumentKinds
from agentspeed.chat.tags import Tags
from agentspeed.chat.token_log import Checkpoint, TokenLog
from agentspeed.marks import Mark, end_of, place_of
from agentspeed.messages import Message, ToolCall, ToolMessage
from agentspeed.observing import Began, Watched
from agentspeed.transport.base import Sink, unpack_ids, wire
from agentspeed.usage import Lease, Usage

T = TypeVar("T")
State = Literal["new", "open", "closed"]
Tell = Callable[[events.AnyEvent], None]
SERVING: Final = "a tool call"
"""What a session is busy with while blocks of `tool_call` are open."""
TOO_OLD: Final = (-1, -1)
"""Where a child was forked that no trunk can adopt any more."""
_LARGE_CHARS: Final = 8192
"""Longer new messages are tokenised in a worker thread: the event loop never waits for them."""


@final
class SessionCore:
    """Belongs to one event loop; one task at a time may use it. Every verb that raises has changed nothing."""

    def __init__(
        self,
        *,
        engine: EngineHandle,
        owns_engine: bool,
        system: str | None,
        defaults: Defaults,
        opening: Opening,
        branch: Branch | None = None,
    ) -> None:
        """`branch`: one that is open already, for a child; None: a new one with an empty log."""
        self.engine = engine
        self.system = system
        self.defaults = defaults
        self.branch = Branch(engine, opening, TokenLog()) if branch is None else branch
        self.usage = Usage()
        self.state: State = "new" if branch is None else "open"
        self.busy: TurnRecord | str | None = None
        """The running turn, or the verb that is being carried out. Written by `doing`, by the verbs of turns, and by
        the blocks of `tool_call`."""
        self.pending = PendingCalls()
        self.described = [tool.definition() for tool in defaults.tools]
        """The tools as the log's first message describes them."""
        self._kinds = ArgumentKinds({tool.name: tool.schema for tool in defaults.tools})
        self.tokenizer: str | None = None
        """The fingerprint of the tokenizer whose ids the log has; None: the engine's."""
        self.text: str | tuple[int, ...] | None = None
        """What the log begins with, of a session over a plain text."""
        self.face: object = None
        """The `Session` that users hold: what tools are given, and what a child calls its parent."""
        self.parent: SessionCore | None = None
        self.children: list[SessionCore] = []
        """Those that are open."""
        self.path = "root"
        self.births = 0
        self.moves = 0
        """Grows with every verb that changes the log."""
        self.compacted: set[str] = set()
        """Names of marks that stood among what a compaction dropped."""
        self.forked_at: tuple[int, int] = (0, 0)
        """The parent's `moves` and its log's length at birth: while both hold, it can adopt."""
        self.rested_at: float | None = None
        self.idle_timeout: float | None = None
        """Seconds without use after which it closes itself; None: never."""
        self._watch: IdleWatch | None = None
        self._used_at = time.monotonic()
        self._why_closed = "The session is closed."
        self._owns_engine = owns_engine
        self._events = itertools.count(1)
        self._reply_at = 0
        """Where the running turn's text begins in the log."""

    @property
    def id(self) -> str:
        return self.branch.opening.label

    @property
    def log(self) -> TokenLog:
        """The ids and messages, as this process knows them."""
        return self.branch.mirror

    @property
    def codec(self) -> ChatCodec:
        """Messages to ids as this session's model, system text, tools and reasoning have it."""
        defaults = self.defaults
        return self.engine.codec.view(
            reasoning=defaults.reasoning,
            history=defaults.history_reasoning,
            variables=defaults.template_variables,
            system=self.system is not None,
            tools=bool(self.described),
        ).with_tools(self._kinds)

    def tags_for(self, messages: Sequence[Message]) -> Tags:
        """The marks of the model's next message, if it answers these."""
        if self.busy is not None or self.defaults.plain:
            return self.codec.tags
        return transcript.tags_for(self.log, self.codec, [*self.pending.due(self.log), *messages])

    @property
    def tokens(self) -> int:
        return len(self.log)

    def watch(self, kind: Literal["run", "turn", "tool"], **facts: Any) -> Watched:
        """Tells the session's observer, or the engine's, that something begins."""
        observer = self.defaults.observer or self.engine.observer
        name = os.path.basename(os.fspath(self.engine.model).rstrip("/"))
        return Watched(observer, lambda: Began(kind=kind, session_id=self.id, model=name, **facts))

    def stamp(self, event: events.AnyEvent) -> events.AnyEvent:
        """The event with the session's id and its next number."""
        return msgspec.structs.replace(event, seq=next(self._events), session_id=self.id)

    # ---- open and close -------------------------------------------------------------------------------------------
    async def open(self) -> None:
        """Raises `SessionClosed` the second time; closed when it raises."""
        if self.state != "new":
            raise errors.SessionClosed("A session is entered once.", remedy="Make a new one, or restore a snapshot.")
        try:
            if self._owns_engine:
                _ = await self.engine.start()
            await self._check_tokenizer()
            self.state = "open" if self.state == "new" else self.state  # closed by another task: said below
            if not self.tokens:
                self.log.append(self._begin())
            _ = await self.branch.attach()
            self.must_be_open()  # another task may have closed it meanwhile, when there was no branch to close
        except BaseException:
            self.state = "closed"
            await run_to_completion(self._close)
            raise
        if self.idle_timeout is not None:
            self._watch = IdleWatch(self.idle_timeout, self._last_used, self._close_idle)

    def _last_used(self) -> float | None:
        """By whoever holds it or a child of it; None while one of them is busy."""
        if self.busy is not None:
            return None
        times = [self._used_at, *(child._last_used() for child in self.children)]
        used = [at for at in times if at is not None]
        return max(used) if len(used) == len(times) else None

    async def _close_idle(self) -> None:
        self._watch = None
        self._why_closed = f"The session was closed, for nobody had used it for {self.idle_timeout} s."
        await self.close()

    def begin_with(self, text: str | tuple[int, ...]) -> None:
        """Before it is opened: its log is this text, and no conversation."""
        self.text, self.log.plain = text, True
        self.defaults = dataclasses.replace(self.defaults, plain=True)

    def _begin(self) -> Sequence[int]:
        """The log's first ids."""
        if not self.defaults.plain:
            return self.codec.opening(self.system, self.described)
        tokenizer, text = self.codec.tokenizer, self.text or ""
        ids = [*tokenizer.start_ids, *tokenizer.content_ids(text)] if isinstance(text, str) else list(text)
        if not ids:
            raise errors.InvalidRequest(
                "The text is empty, and this model's tokenizer has no token that begins one.", remedy="Give a text."
            )
        self.log.open_at = len(ids)
        return ids

    async def _check_tokenizer(self) -> None:
        if self.tokenizer is not None and self.tokenizer != await self.fingerprint():
            raise errors.InvalidRequest(
                f"The snapshot of session {self.id} was made with another tokenizer than this model's: its ids would "
                "stand for other texts here.",
                remedy="Restore it on the model it was made with, or start a new session and add its messages.",
            )

    async def fingerprint(self) -> str:
        """Of the engine's tokenizer. Raises `SessionClosed` before the engine was started."""
        tokenizer = self.engine.codec.tokenizer
        return await anyio.to_thread.run_sync(lambda: tokenizer.fingerprint)

    async def close(self) -> None:
        """With its children. Calling it again does nothing; silent about an engine that is gone."""
        if self.state == "closed":
            return
        self.state = "closed"
        await run_to_completion(self._close)

    async def _close(self) -> None:
        if self._watch is not None:
            await self._watch.end()
        for child in tuple(self.children):
            await child.close()
        await self.branch.close()
        if self._owns_engine:
            await self.engine.close()
        if self.parent is not None and self in self.parent.children:
            self.parent.children.remove(self)

    def must_be_open(self) -> None:
        """Raises `SessionClosed`."""
        if self.state != "open":
            raise errors.SessionClosed(
                self._why_closed if self.state == "closed" else "The session was not entered.",
                remedy="Use it inside `async with`.",
            )
        self._used_at = time.monotonic()

    def must_be_idle(self) -> None:
        """Raises `SessionClosed` or `SessionBusy`."""
        self.must_be_open()
        if self.busy is not None:
            what = self.busy if isinstance(self.busy, str) else "a turn"
            raise errors.SessionBusy(
                f"Session {self.id} is busy: {what} has not ended.",
                remedy="Wait for it, leave its block, or fork to go two ways at once.",
            )

    @contextmanager
    def doing(self, verb: str) -> Iterator[None]:
        """One thing at a time: whatever else is asked meanwhile is `SessionBusy`, never interleaved."""
        self.must_be_idle()
        self.busy = verb
        try:
            yield
        finally:
            self.busy = None
            self._used_at = time.monotonic()

    # ---- turns ----------------------------------------------------------------------------------------------------
    async def begin_turn(self, turn: TurnRecord, sink: Sink) -> None:
        """Queues the turn, whose events go to `sink` from then on. Raises `SessionBusy`, `LimitReached`, and what its
        messages or its request are refused for."""
        self.must_be_idle()
        turn.charge = charge = account.Charge.begun(self.id)
        self.busy = turn
        codec = self.codec
        request = turn.request
        goes_on_with: transcript.OpenMessage | None = None

        def write() -> list[int]:
            return transcript.open_reply(self.log, codec, [*self.pending.due(self.log), *request.messages])

        async def plan() -> wire.Generate:
            nonlocal goes_on_with
            continued = await _beside(request.messages, write)
            self._reply_at = self.log.open_at or 0
            goes_on_with = transcript.open_message(self.log) if continued else None
            command = request.command(codec.stop_ids, goes_on_with)
            return command if charge is None else charge.bounded(command)

        def heard(event: wire.Event | None) -> None:
            if charge is not None and isinstance(event, wire.Tokens):
                charge.drew(len(unpack_ids(event.ids)))
            if isinstance(event, wire.TurnEnded) and not self.defaults.plain:
                transcript.settle(self.log, codec, event.reason)
            sink(event)

        try:
            await self._revise([*self.pending.due(self.log), *request.messages], complete=True)
            await self.branch.begin(plan, heard, request.timeout)
        except BaseException:
            self.busy = None
            raise
        self.moves += 1
        self.pending.overtaken()
        if goes_on_with is not None:
            turn.go_on_from(goes_on_with)

    def finish_turn(self, turn: TurnRecord) -> None:
        """The turn's last event was read: its message is the log's."""
        if not self.defaults.plain:
            transcript.record(self.log, turn.message, self._reply_at)
        if turn.ended is not None and turn.ended.reason == "stop_string":
            self.log.hidden.append((self.tokens, turn.hidden))
        self.branch.ended()
        self._rest(turn)
        if self.pending.served:  # blocks that were opened while it ran
            self.busy = SERVING

    async def abort_turn(self, turn: TurnRecord) -> None:
        """Stops a turn that was left early; the log goes back to before its messages, or keeps its partial text."""
        await run_to_completion(lambda: self._abort(turn))

    async def _abort(self, turn: TurnRecord) -> None:
        try:
            kept = await self.branch.stop(keep=turn.request.keep_on_cancel)
            turn.leave(kept=kept)
            if kept and not self.defaults.plain:
                if self.log.open_at is not None:
                    transcript.settle(self.log, self.codec, "grammar_end")
                transcript.record(self.log, turn.message, self._reply_at)
        finally:
            self._rest(turn)

    def record_unread(self, log: TokenLog) -> None:
        """In a fork's log: the message of a turn of this session that has ended and was not read to its end yet."""
        if not self.defaults.plain:
            transcript.record_unread(log, self.codec, self._reply_at)

    def turn_died(self, turn: TurnRecord) -> errors.AgentspeedError:
        """The engine or the session went during a turn; the log is as it was before it. Gives what to raise."""
        self._rest(turn)
        if self.state == "closed":
            return errors.SessionClosed(
                "The session was closed while a turn of it ran.", remedy="Let its turns end before its block does."
            )
        return self.branch.death or errors.EngineDied(
            "The engine ended during the turn; the session is as it was before it.",
            remedy="Ask again: the engine is started anew and opens the session's ids.",
        )

    def resumed(self, turn: TurnRecord) -> tuple[events.AnyEvent, ...]:
        """What the first turn after a pause found; nothing for the others."""
        if not self.pending.resumed():
            return ()
        found = turn.usage
        device, host = found.resumed_device, found.resumed_host
        return (events.Resumed(device=device, host=host, recomputed=found.recomputed, why=found.why),)

    def _rest(self, turn: TurnRecord) -> None:
        self.usage = self.usage + turn.usage
        if turn.charge is not None:
            turn.charge.settle(turn.usage)
        self.busy = None
        self.pending.leave(self.log)
        self.rested_at = self._used_at = time.monotonic()

    # ---- messages -------------------------------------------------------------------------------------------------
    async def add(self, messages: Sequence[Message], *, prefill: bool) -> None:
        """Messages without a turn; results that wait go before what closes their calls."""
        if self.defaults.plain:
            raise no_messages()
        given = [*messages]
        with self.doing("add"):
            if any(not isinstance(message, ToolMessage) for message in given):  # whose words close open calls
                by_hand = {message.call_id for message in given if isinstance(message, ToolMessage)}
                given = [*(due for due in self.pending.due(self.log) if due.call_id not in by_hand), *given]
            await self._append(given)
            self.pending.leave(self.log)
            if prefill:
                await self.branch.prefill(self._prefilled)

    def _prefilled(self, usage: wire.TurnUsage) -> None:
        found = dataclasses.replace(usage_of(usage), turns=0)
        self.usage = self.usage + found
        account.prefilled(self.id, found)

    async def _append(self, messages: Sequence[Message]) -> None:
        codec = self.codec
        await self._revise(messages)
        await self.branch.append(lambda: _beside(messages, lambda: transcript.write(self.log, codec, messages)))
        self.moves += 1

    async def _revise(self, messages: Sequence[Message], *, complete: bool = False) -> None:
        """Before messages are appended: what the template leaves out of earlier answers now is left out of the log."""
        codec = self.codec
        found = await _beside(messages, lambda: transcript.revision(self.log, codec, messages, complete=complete))
        if found is not None:
            await self.branch.revise(found.point, lambda: transcript.revise(self.log, found))

    # ---- pauses ---------------------------------------------------------------------------------------------------
    async def expect(self, seconds: float | None, keep: Literal["soft", "firm"], tool: str) -> Lease:
        """See `Session.expect`. Raises `InvalidRequest`."""
        if seconds is not None:
            check_number("seconds", seconds)
        if keep not in ("soft", "firm"):
            raise errors.InvalidRequest(f"keep is {shown(keep)}; it must be 'soft' or 'firm'.")
        check_text("tool", tool)
        with self.doing("expect"):
            return await self.branch.expect(seconds, keep, tool)

    async def pause(self, calls: tuple[ToolCall, ...], expect: float | None, tell: Tell) -> None:
        """The branch is held under a lease while `calls` are served. The pause is as long as the slowest of the tools,
        so that is the one the engine learns it of. `expect` is only what the user knows: the last time that a tool took
        would hide what the engine learnt. The caller has made the session busy."""
        lease = await self.branch.expect(expect, "soft", self.pending.slowest(calls))
        self.pending.begin()
        tell(self.stamp(events.Paused(lease=lease)))

    async def resume(self, calls: Sequence[ToolCall]) -> tuple[ToolMessage, ...]:
        """The results of `calls`, all of which have arrived, enter the log whatever ended the tools: a call without one
        could not be rendered. Gives them as the model reads them. The caller has made the session busy."""
        results = self.pending.of(calls)
        if (seconds := self.pending.end()) is not None:
            self.usage = self.usage + Usage(pauses=1, pause_seconds=seconds)
        return await run_to_completion(lambda: self._write(results)) if self.state == "open" else results

    def stay_open(self) -> tuple[ToolMessage, ...]:
        """Some calls get no result yet: those that have arrived wait for them. Gives none, as none enters the log."""
        if (seconds := self.pending.end()) is not None:
            self.usage = self.usage + Usage(pauses=1, pause_seconds=seconds)
        return ()

    async def _write(self, results: tuple[ToolMessage, ...]) -> tuple[ToolMessage, ...]:
        """Results that leave no room in the context give way to an error, the longest first, until the rest fits.

        Raises `ContextOverflow` when not even the errors do."""
        told = list(results)
        by_length = sorted(range(len(told)), key=lambda index: len(told[index].text))
        while True:
            try:
                await self._append(told)
            except errors.ContextOverflow:
                if not by_length:
                    raise
                index = by_length.pop()
                size, name = len(told[index].text), told[index].name
                text = f"error: {name}: its result of {size} characters does not fit into the context"
                told[index] = msgspec.structs.replace(told[index], text=text, ok=False)
            else:
                self.pending.leave(self.log)
                return tuple(told)

    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last assistant message that have no result in the log yet, in call order."""
        return transcript.unanswered(self.log)

    # ---- places in the log ----------------------------------------------------------------------------------------
    def mark(self, name: str | None) -> Mark:
        """Here; a name stands for the latest mark that was given it. Raises `InvalidRequest`."""
        self.must_be_idle()
        if name is not None and not (isinstance(name, str) and name):
            raise errors.InvalidRequest(f"name is {name!r}; it must be a text that is not empty, or None.")
        check_text("name", name or "")
        mark = Mark(name, self.log)
        if name is not None:
            self.log.marks[name] = mark.point
        return mark

    def point(self, to: Mark | str | int) -> Checkpoint:
        """Where a mark, a name or a position is. Raises `MarkNotFound`."""
        found = place_of(self.log, to, self.compacted)
        if self.log.plain and not found.tokens:
            raise errors.MarkNotFound(
                "Position 0 of a session over a text is before the text: nothing is there to go on with.",
                remedy="Go back to its first token, position 1, or make a new session over a text.",
            )
        return found

    def position(self, messages: int) -> int:
        """Where the first `messages` messages end. Raises `InvalidRequest`."""
        return end_of(self.log, messages)

    async def rewind(self, to: Mark | str | int) -> None:
        """Exactly back to there. Raises `MarkNotFound`."""
        with self.doing("rewind"):
            point = self.point(to)
            _ = await self.branch.attach()
            await run_to_completion(lambda: self._rewind(point))

    async def _rewind(self, point: Checkpoint) -> None:
        await self.branch.rewind(point)
        self.moves += 1
        self.pending.leave(self.log)


def written(messages: Sequence[Message]) -> str:
    """Messages as JSON, for who watches."""
    return msgspec.json.encode(messages).decode()


async def _beside(messages: Sequence[Message], write: Callable[[], T]) -> T:
    large = sum(len(message.text) for message in messages) > _LARGE_CHARS
    return await anyio.to_thread.run_sync(write) if large else write()
