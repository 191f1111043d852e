"""One call to generate while it runs: an async context manager that iterates over typed events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, final

import anyio

from agentspeed import errors, events
from agentspeed.asking import Asked
from agentspeed.branch import lease_of
from agentspeed.front.parser import (
    CallBroken,
    CallDelta,
    CallOpened,
    CallReady,
    Piece,
    ReasoningPiece,
    TextPiece,
)
from agentspeed.front.stops import StopFilter
from agentspeed.front.tokenizer import IncrementalText
from agentspeed.messages import Assistant, ToolCall
from agentspeed.transport.base import unpack_ids, wire
from agentspeed.usage import Usage

if TYPE_CHECKING:
    from agentspeed.session import Session

T = TypeVar("T")
_TO_BE_TAKEN: Final = "the engine to take it"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[T]):
    """What a turn came to."""

    text: str
    output: T
    """The text, or what `output=` asked for. With `output=`, None for a turn that ended in calls instead."""
    tool_calls: tuple[ToolCall, ...]
    reasoning: str
    finish_reason: str
    """"tool_calls", or why the turn ended: by itself ("stop_id", "grammar_end"), or cut ("max_tokens",
    "stop_string")."""
    usage: Usage
    ids: tuple[int, ...]
    """Drawn in this turn, the end id included."""
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    bound: str = ""
    """What ended the turn at fewer tokens than were asked for: the context limit, or the tenant's quota of pages."""
    partial_call: str | None = None
    """What there is of a call in which the turn was cut, if it was; `generate()` goes on with it."""


@final
class Turn(Generic[T]):
    """Made by `Session.stream`. Leaving the block before the end cancels the turn; the session stays usable."""

    def __init__(self, session: Session, asked: Asked) -> None:
        self._session = session
        self._asked = asked
        self._raw: deque[wire.Event | None] = deque()
        self._ready: deque[events.AnyEvent] = deque()
        self._wake = anyio.Event()
        self._text: IncrementalText = session.codec.tokenizer.decoder()
        self._stops = StopFilter(asked.stop)
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._calls: list[ToolCall] = []
        self._partial_call: str | None = None
        self._whole: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        self._ended: wire.TurnEnded | None = None
        self._started = False
        """The engine has admitted it."""
        self._finished = False
        self._state = "new"
        self._deadline = float("inf")
        self.usage = Usage()

    # ---- entering and leaving -------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise errors.SessionError("A turn is entered once.", remedy="Call stream() again.")
        self._state = "entered"
        if self._asked.timeout is None:
            continued = await self._session._begin(self, self._asked)
        else:
            self._deadline = anyio.current_time() + self._asked.timeout
            continued = None
            with anyio.move_on_after(self._asked.timeout):
                continued = await self._session._begin(self, self._asked)
            if continued is None:  # too late before it was queued: by then nothing is cancelled any more
                self._finished = True
                raise self._too_late(_TO_BE_TAKEN)
        if continued:
            self._absorb(self._text.feed(continued))
            self._ready.clear()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        self._state = "left"
        if not self._finished:
            await self._session._abort(self, keep=self._asked.keep_on_cancel)
            self._finished = True

    # ---- reading --------------------------------------------------------------------------------------------------
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> events.AnyEvent:
        if self._state != "entered":
            raise errors.SessionError("A turn is read inside its own block.",
                                      remedy="async with session.stream(...) as turn: async for event in turn: ...")
        while not self._ready:
            if self._finished:
                raise StopAsyncIteration
            if self._raw:
                self._take(self._raw.popleft())
                continue
            await self._more()
        return self._ready.popleft()

    async def _more(self) -> None:
        """Waits for the engine; with a scope of its own only where there is a deadline, since scopes are not free."""
        self._wake = anyio.Event()
        if self._asked.timeout is None:
            await self._wake.wait()
            return
        with anyio.move_on_after(self._deadline - anyio.current_time()) as scope:
            await self._wake.wait()
        if scope.cancelled_caught and not self._raw:
            raise self._too_late("" if self._started else await self._session._branch.waits_for())

    def _too_late(self, waits_for: str) -> errors.TurnTimeout:
        after = f"{self._asked.timeout} s"
        if waits_for:
            remedy = ("Give it more time: an engine that starts takes seconds." if waits_for == _TO_BE_TAKEN else
                      "Give it more time, or the engine more pages or fewer turns at once.")
            return errors.TurnTimeout(f"The turn still waited for {waits_for} after {after} and was cancelled.",
                                      partial=self.text, remedy=remedy)
        return errors.TurnTimeout(f"The turn took longer than {after} and was cancelled.", partial=self.text,
                                  remedy="Give it more time or fewer tokens.")

    async def reply(self) -> Reply[T]:
        """Reads to the end. Raises `OutputError` when `output=` was asked for and the text is not that."""
        async for _ in self:
            pass
        return self._reply()

    def result(self) -> Reply[T]:
        """The reply of a turn that was read to its end."""
        if self._ended is None or not self._finished:
            raise errors.SessionError("The turn has not ended.", remedy="Read its events to the end first.")
        return self._reply()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    # ---- events from the engine -----------------------------------------------------------------------------------
    def sink(self, event: wire.Event | None) -> None:
        """Called by the link on the event loop. The session's mirror has the ids already."""
        self._raw.append(event)
        self._wake.set()

    def _take(self, event: wire.Event | None) -> None:
        match event:
            case None:
                self._finished = True
                raise self._session._died(self)
            case wire.TurnStarted():
                self._started = True
                self.usage = usage_of(event.usage)
                self._emit(events.TurnStarted(usage=self.usage))
                if (resumed := self._session._resumed(self.usage)) is not None:
                    self._emit(resumed)
            case wire.Tokens():
                ids = list(unpack_ids(event.ids))
                self._ids += ids
                self._logprobs += event.logprobs
                self._top += [tuple((other.id, other.logprob) for other in top) for top in event.top]
                stop_ids = self._session.codec.stop_ids
                fresh = self._text.feed([number for number in ids if number not in stop_ids])
                if fresh:
                    self._absorb(self._stops.feed(fresh))
            case wire.LeaseChanged():
                self._emit(events.LeaseChanged(lease=lease_of(event.lease)))
            case wire.TurnEnded():
                self._end(event)

    def _absorb(self, text: str) -> None:
        if text:
            self._whole.append(text)
            self._pieces(self._asked.parser.feed(text))

    def _close_text(self) -> None:
        if self._ended_by_itself:  # half a character of a message that goes on is the beginning of a whole one
            self._absorb(self._stops.feed(self._text.finish()))
        self._absorb(self._stops.finish())
        self._pieces(self._asked.parser.finish())

    def _end(self, event: wire.TurnEnded) -> None:
        from agentspeed.running import go_on_serving

        self._ended = event
        self.usage = usage_of(event.usage)
        if event.reason == "closed":
            raise errors.SessionClosed("The session was closed during the turn.")
        self._close_text()
        if event.reason == "error":
            raise errors.OutputError(f"The turn could not go on: {event.message}", text=self.text)
        self._finished = True
        self._session._turn_ended(self, self.message)
        go_on_serving(self._session)
        self._emit(events.TurnFinished(reason=event.reason, usage=self.usage, bound=event.message))

    def left(self) -> None:
        """Left early: what it cost is what the engine said at its end."""
        for event in self._raw:
            if isinstance(event, wire.TurnStarted | wire.TurnEnded):
                self.usage = usage_of(event.usage)

    def drain(self) -> None:
        """Takes in what came before the turn was cancelled, for `keep_on_cancel`."""
        for event in self._raw:
            if isinstance(event, wire.Tokens):
                self._take(event)
        self._raw.clear()
        if self._ended is None:
            self._close_text()

    @property
    def message(self) -> Assistant:
        """The assistant's message so far."""
        return Assistant(self.text, tuple(self._calls), "".join(self._reasonings), "".join(self._whole))

    def _pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case TextPiece(text):
                    self._texts.append(text)
                    self._emit(events.TextDelta(text=text))
                case ReasoningPiece(text):
                    self._reasonings.append(text)
                    self._emit(events.ReasoningDelta(text=text))
                case CallOpened(index, name):
                    self._emit(events.ToolCallStarted(index=index, name=name))
                case CallDelta(index, arguments):
                    self._emit(events.ToolCallDelta(index=index, arguments=arguments))
                case CallReady(_, name, arguments, own):
                    call = ToolCall(id=own or self._session._next_call_id(), name=name, arguments=arguments)
                    self._calls.append(call)
                    self._emit(events.ToolCallReady(call=call))
                case CallBroken(_, raw, _, cut=True) if not self._ended_by_itself:
                    self._partial_call = raw
                case CallBroken(_, raw, _, cut):
                    tags = self._session.codec.tags
                    opened = "" if tags.calls.only_at_start else tags.call_open
                    text = f"{opened}{raw}{'' if cut else tags.call_close}"
                    self._texts.append(text)
                    self._emit(events.TextDelta(text=text))

    @property
    def _ended_by_itself(self) -> bool:
        return self._ended is not None and self._ended.reason in ("stop_id", "grammar_end")

    def _emit(self, event: events.AnyEvent) -> None:
        self._ready.append(self._session._stamped(event))

    def _reply(self) -> Reply[T]:
        if self._ended is None:
            raise errors.InternalError("A turn without an end was asked for its reply.")
        text = self.text
        spec = self._asked.output
        calls, cut = tuple(self._calls), self._partial_call
        if spec is not None and (problem := self._cut()) is not None:
            raise problem
        output: Any = text if spec is None else None if calls else spec.decode(text)
        return Reply(text=text, output=output, tool_calls=calls, reasoning="".join(self._reasonings),
                     finish_reason="tool_calls" if calls and cut is None else self._ended.reason, usage=self.usage,
                     ids=tuple(self._ids), logprobs=tuple(self._logprobs), top_logprobs=tuple(self._top),
                     bound=self._ended.message, partial_call=cut)

    def _cut(self) -> errors.OutputError | None:
        """For who asked for an answer or for calls, and got neither: asked again, the model would be cut again."""
        spec = self._asked.output
        if self._ended is None or self._ended_by_itself:
            return None
        if self._partial_call is not None:
            inside = "a call"
        elif spec is not None and not self._calls and not spec.is_whole(self.text):
            inside = "its output"
        else:
            return None
        if self._ended.reason == "stop_string":
            by, remedy = "a stop text", "Give other stop texts, or let generate() go on with the message"
        elif self._ended.message:
            by, remedy = self._ended.message, "Rewind or start anew: there is no room to go on"
        else:
            by, remedy = "max_tokens", "Raise max_tokens, or let generate() go on with the message"
        return errors.OutputError(f"The turn was cut inside {inside}, by {by}.", text=self.text, remedy=f"{remedy}.")


def usage_of(usage: wire.TurnUsage) -> Usage:
    """The engine's account of one turn as a public value."""
    return Usage(
        new=usage.new, resumed_device=usage.resumed_device, resumed_host=usage.resumed_host,
        recomputed=usage.recomputed, shared=usage.shared, drawn=usage.drawn, preempted=usage.preempted, turns=1,
        queue_seconds=usage.queue_seconds, prefill_seconds=usage.prefill_seconds,
        decode_seconds=usage.decode_seconds, why=usage.why,
    )
