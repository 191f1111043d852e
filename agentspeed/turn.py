"""One call to generate while it runs: an async context manager that iterates over typed events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, final

import anyio
from agentspeed_engine import wire
from agentspeed_engine.ids import unpack_ids

from agentspeed import errors, events
from agentspeed.front.output import OutputSpec
from agentspeed.front.parser import (
    CallBroken,
    CallDelta,
    CallOpened,
    CallReady,
    Piece,
    ReasoningPiece,
    TextPiece,
    TurnParser,
)
from agentspeed.front.tokenizer import IncrementalText
from agentspeed.messages import Assistant, ToolCall
from agentspeed.usage import Lease, Residence, Usage

if TYPE_CHECKING:
    from agentspeed.session import Session

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[T]):
    """What a turn came to."""

    text: str
    output: T
    """The text, or what `output=` asked for."""
    tool_calls: tuple[ToolCall, ...]
    reasoning: str
    finish_reason: str
    usage: Usage
    ids: tuple[int, ...]
    """Drawn in this turn, the end id included."""
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPlan:
    """What a session settled before the turn: all that the engine and the parser need."""

    ids: list[int]
    continues: list[int]
    """Ids of the open assistant message that the turn goes on with."""
    sampling: wire.Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    grammar: str | None
    output: OutputSpec | None
    parser: TurnParser
    seed: int | None
    keep_on_cancel: bool
    timeout: float | None


@final
class Turn(Generic[T]):
    """Made by `Session.stream`. Leaving the block before the end cancels the turn; the session stays usable."""

    def __init__(self, session: Session, plan_of: Any) -> None:
        self._session = session
        self._plan_of = plan_of
        self._plan: TurnPlan | None = None
        self._raw: deque[wire.Event | None] = deque()
        self._ready: deque[events.AnyEvent] = deque()
        self._wake = anyio.Event()
        self._text: IncrementalText | None = None
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._calls: list[ToolCall] = []
        self._whole: list[str] = []
        self._continued_chars = 0
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        self._ended: wire.TurnEnded | None = None
        self._finished = False
        self._entered = False
        self._deadline = float("inf")
        self.usage = Usage()

    # ---- entering and leaving -------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        plan: TurnPlan = await self._session._begin(self, self._plan_of)
        self._plan = plan
        self._entered = True
        self._text = self._session.engine.codec.tokenizer.decoder()
        if plan.timeout is not None:
            self._deadline = anyio.current_time() + plan.timeout
        if plan.continues:
            self._absorb(plan.continues)
            self._ready.clear()
            self._continued_chars = len(self.text)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        self._entered = False
        if not self._finished:
            await self._session._abort(self, failed=error is not None)

    # ---- reading --------------------------------------------------------------------------------------------------
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> events.AnyEvent:
        if not self._entered:
            raise errors.SessionError("A turn is read inside its own block.",
                                      remedy="async with session.stream(...) as turn: async for event in turn: ...")
        while not self._ready:
            if self._finished:
                raise StopAsyncIteration
            if self._raw:
                self._take(self._raw.popleft())
                continue
            self._wake = anyio.Event()
            with anyio.move_on_after(self._deadline - anyio.current_time()) as scope:
                await self._wake.wait()
            if scope.cancelled_caught and not self._raw:
                assert self._plan is not None
                raise errors.TurnTimeout(f"The turn took longer than {self._plan.timeout} s and was cancelled.",
                                         remedy="Give it more time or fewer tokens.")
        return self._ready.popleft()

    async def reply(self) -> Reply[T]:
        """Reads to the end. Raises `OutputError` when `output=` was asked for and the text is not that."""
        async for _ in self:
            pass
        return self._reply()

    def result(self) -> Reply[T]:
        """The reply of a turn that was read to its end."""
        if not self._finished:
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
                raise self._session._engine_died(self)
            case wire.TurnStarted():
                self.usage = usage_of(event.usage)
                self._emit(events.TurnStarted(usage=self.usage))
            case wire.Tokens():
                ids = list(unpack_ids(event.ids))
                self._ids += ids
                self._logprobs += event.logprobs
                self._top += [tuple((other.id, other.logprob) for other in top) for top in event.top]
                self._absorb([number for number in ids if number not in self._session.engine.codec.stop_ids])
            case wire.LeaseChanged():
                self._emit(events.LeaseChanged(lease=lease_of(event.lease)))
            case wire.TurnEnded():
                self._end(event)

    def _absorb(self, ids: list[int]) -> None:
        assert self._text is not None and self._plan is not None
        text = self._text.feed(ids)
        if not text:
            return
        self._whole.append(text)
        self._pieces(self._plan.parser.feed(text))

    def _end(self, event: wire.TurnEnded) -> None:
        assert self._plan is not None
        self._ended = event
        self._pieces(self._plan.parser.finish())
        if event.reason == "stop_string":
            self._cut_at_stop(self._plan.stop)
        self.usage = usage_of(event.usage)
        self._finished = True
        message = Assistant(self.text, tuple(self._calls), "".join(self._reasonings), "".join(self._whole))
        self._session._turn_ended(self, event, message)
        self._emit(events.TurnFinished(reason=event.reason, usage=self.usage))
        if event.reason == "error":
            raise errors.OutputError(f"The turn could not go on: {event.message}", text=self.text)

    def _cut_at_stop(self, stops: tuple[str, ...]) -> None:
        text = self.text
        places = [place for stop in stops if (place := text.find(stop, self._continued_chars)) >= 0]
        if places:
            self._texts = [text[: min(places)]]

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
                case CallReady(_, name, arguments):
                    call = ToolCall(id=self._session._next_call_id(), name=name, arguments=arguments)
                    self._calls.append(call)
                    self._emit(events.ToolCallReady(call=call))
                case CallBroken(_, raw, _):
                    self._texts.append(raw)
                    self._emit(events.TextDelta(text=raw))

    def _emit(self, event: events.AnyEvent) -> None:
        self._ready.append(self._session._stamped(event))

    def _reply(self) -> Reply[T]:
        assert self._ended is not None and self._plan is not None
        text = self.text
        spec = self._plan.output
        output: Any = text if spec is None or self._calls else spec.decode(text)
        return Reply(text=text, output=output, tool_calls=tuple(self._calls), reasoning="".join(self._reasonings),
                     finish_reason="tool_calls" if self._calls else self._ended.reason, usage=self.usage,
                     ids=tuple(self._ids), logprobs=tuple(self._logprobs), top_logprobs=tuple(self._top))


def usage_of(usage: wire.TurnUsage) -> Usage:
    """The engine's account of one turn as a public value."""
    return Usage(
        new=usage.new, resumed_device=usage.resumed_device, resumed_host=usage.resumed_host,
        recomputed=usage.recomputed, shared=usage.shared, drawn=usage.drawn, preempted=usage.preempted, turns=1,
        queue_seconds=usage.queue_seconds, prefill_seconds=usage.prefill_seconds,
        decode_seconds=usage.decode_seconds, why=usage.why,
    )


def lease_of(lease: wire.Lease) -> Lease:
    """The engine's lease as a public value."""
    return Lease(keep=lease.keep, seconds=lease.seconds, why=lease.why, residence=residence_of(lease.residence))


def residence_of(residence: wire.Residence) -> Residence:
    return Residence(device=residence.device, host=residence.host, lost=residence.lost)
