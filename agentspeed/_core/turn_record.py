"""What one turn has said so far: the engine's events in, typed events out, the message and the reply at any moment.

It performs nothing and knows no session: the turn's face reads events through it, and the session takes its message.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any, final

from agentspeed import errors, events
from agentspeed._core.account import Charge
from agentspeed._core.options import TurnRequest
from agentspeed._core.wire_values import lease_of, usage_of
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.parser import CallBroken, CallDelta, CallOpened, CallReady, Piece, ReasoningPiece, TextPiece
from agentspeed.chat.stop_filter import StopFilter
from agentspeed.chat.tokenizer import IncrementalText
from agentspeed.chat.transcript import OpenMessage
from agentspeed.limits import Reached
from agentspeed.messages import Assistant, ToolCall
from agentspeed.replies import Reply
from agentspeed.transport.base import unpack_ids, wire
from agentspeed.usage import Usage


@final
class TurnRecord:
    """One for each turn. `take` is given the engine's events in their order."""

    def __init__(self, request: TurnRequest, codec: ChatCodec) -> None:
        self.request = request
        self.inbox: deque[wire.Event | None] = deque()
        """Events that have come and were not taken yet; None: the engine is gone."""
        self.usage = Usage()
        self.calls: list[ToolCall] = []
        """Whole calls, in the order in which they were written."""
        self.started = False
        """Whether the engine has admitted the turn."""
        self.ended: wire.TurnEnded | None = None
        self.charge: Charge | None = None
        """What it spends of the run that it belongs to, once it has begun; None outside of every run."""
        self._codec = codec
        self._stop_ids = frozenset(codec.stop_ids)
        self._decoder: IncrementalText = codec.tokenizer.decoder()
        self._stops = StopFilter(request.stop, include=request.include_stop)
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._raw: list[str] = []
        self._partial_call: str | None = None
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._draw_logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        self._told: list[events.AnyEvent] = []
        self._earlier_calls: deque[ToolCall] = deque()
        """Of the message that this turn goes on with: they keep their ids."""
        self._new: list[str] = []
        """The pieces of text that this turn added."""
        self._decoded = 0
        """Characters of the message that were drawn, the stop texts that earlier turns ended at not counted."""
        self._shown = 0
        """Characters of the message that earlier turns wrote and that were told of then."""

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def new_text(self) -> str:
        """What this turn wrote of it."""
        return "".join(self._new)

    @property
    def message(self) -> Assistant:
        """The assistant's message so far."""
        return Assistant(self.text, tuple(self.calls), "".join(self._reasonings), "".join(self._raw))

    # ---- the engine's events --------------------------------------------------------------------------------------
    def go_on_from(self, message: OpenMessage) -> None:
        """The turn goes on with this message. Nothing is told of what it has said already; its end is held back where
        a stop text may have begun."""
        before, since_stop = message.read(self._decoder, self._codec.stop_ids)
        self._decoded = self._shown = len(before) + len(since_stop)
        self._earlier_calls.extend(message.calls)
        self._absorb(before + self._stops.go_on_from(since_stop))

    def take(self, event: wire.Event) -> list[events.AnyEvent]:
        """What the event tells a reader, without `seq` and `session_id`. Raises `SessionClosed` and `OutputError` for a
        turn that ended because it could not go on."""
        match event:
            case wire.TurnStarted():
                self.started = True
                self.usage = usage_of(event.usage)
                self._told.append(events.TurnStarted(usage=self.usage))
            case wire.Tokens():
                self._drew([event])
            case wire.LeaseChanged():
                self._told.append(events.LeaseChanged(lease=lease_of(event.lease)))
            case wire.TurnEnded():
                self._end(event)
        told, self._told = self._told, []
        return told

    def take_tokens(self, run: Sequence[wire.Tokens]) -> list[events.AnyEvent]:
        """As `take`, for tokens that came one after the other: they are decoded and told of as one."""
        self._drew(run)
        told, self._told = self._told, []
        return told

    def leave(self, *, kept: bool) -> None:
        """The turn was left before its end: it cost what the engine said at its end. `kept`: what it drew stays in the
        log, so what came and was not read yet belongs to its message."""
        for event in self.inbox:
            if isinstance(event, wire.TurnStarted | wire.TurnEnded):
                self.usage = usage_of(event.usage)
            elif kept and isinstance(event, wire.Tokens):
                self._drew([event])
        self.inbox.clear()
        if kept and self.ended is None:
            self._close_text()

    def _drew(self, run: Sequence[wire.Tokens]) -> None:
        ids = unpack_ids(run[0].ids if len(run) == 1 else b"".join([event.ids for event in run]))
        self._ids += ids
        for event in run:
            if event.logprobs:
                self._logprobs += event.logprobs
            if event.draw_logprobs:
                self._draw_logprobs += event.draw_logprobs
            if event.top:
                self._top += [tuple((other.id, other.logprob) for other in top) for top in event.top]
        written: Sequence[int] = ids
        if not self._stop_ids.isdisjoint(ids):
            written = [number for number in ids if number not in self._stop_ids]
        fresh = self._decoder.feed(written)
        if fresh:
            self._decoded += len(fresh)
            self._absorb(self._stops.feed(fresh))

    def _end(self, event: wire.TurnEnded) -> None:
        self.ended = event
        self.usage = usage_of(event.usage)
        if event.reason == "closed":
            raise errors.SessionClosed(
                "The session was closed during the turn.", remedy="Let its turns end before it is closed."
            )
        self._close_text()
        if event.reason == "error":
            raise errors.OutputError(f"The turn could not go on: {event.message}", text=self.text)

    def _absorb(self, text: str) -> None:
        """More of the message. What an earlier turn wrote was told then."""
        new = text
        if self._shown:
            old, new = text[: self._shown], text[self._shown :]
            self._shown -= len(old)
            self._raw.append(old)
            told, added = len(self._told), len(self._new)
            self._pieces(self.request.parser.feed(old))
            del self._told[told:], self._new[added:]
        if new:
            self._raw.append(new)
            self._pieces(self.request.parser.feed(new))

    def _close_text(self) -> None:
        if self.ended_by_itself:  # half a character of a message that goes on is the beginning of a whole one
            rest = self._decoder.finish()
            self._decoded += len(rest)
            self._absorb(self._stops.feed(rest))
        self._absorb(self._stops.finish())
        self._pieces(self.request.parser.finish())

    def _pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case TextPiece(text):
                    self._say(text)
                case ReasoningPiece(text):
                    self._reasonings.append(text)
                    self._told.append(events.ReasoningDelta(text=text))
                case CallOpened(index, name):
                    self._told.append(events.ToolCallStarted(index=index, name=name))
                case CallDelta(index, arguments):
                    self._told.append(events.ToolCallDelta(index=index, arguments=arguments))
                case CallReady(_, name, arguments, own):
                    call = self._call(name, arguments, own)
                    self.calls.append(call)
                    self._told.append(events.ToolCallReady(call=call))
                case CallBroken(_, raw, _, cut=True) if not self.ended_by_itself:
                    self._partial_call = raw
                case CallBroken(_, raw, _, cut):
                    tags = self._codec.tags
                    opened = "" if tags.calls.only_at_start else tags.call_open
                    self._say(f"{opened}{raw}{'' if cut else tags.call_close}")

    def _call(self, name: str, arguments: str, own: str | None) -> ToolCall:
        """`own`: the id that the model wrote, in families whose models do; one that it wrote twice names one call."""
        if self._earlier_calls:
            return self._earlier_calls.popleft()
        if own is None or any(call.id == own for call in self.calls):
            own = f"call_{secrets.token_hex(4)}"
        return ToolCall(id=own, name=name, arguments=arguments)

    def _say(self, text: str) -> None:
        self._texts.append(text)
        self._new.append(text)
        self._told.append(events.TextDelta(text=text))

    # ---- what it came to ------------------------------------------------------------------------------------------
    @property
    def hidden(self) -> int:
        """How many characters at the end of what was drawn are no text of the message: the stop text that the turn
        ended at, and what its last token wrote after it."""
        return self._decoded - sum(map(len, self._raw))

    @property
    def ended_by_itself(self) -> bool:
        """Whether the model ended the message, or its grammar did: nothing cut it."""
        return self.ended is not None and self.ended.reason in ("stop_id", "grammar_end")

    @property
    def limit(self) -> Reached | None:
        """The limit of a run that cut the turn."""
        cut = self.ended is not None and self.ended.reason == "max_tokens" and not self.ended.message
        return self.charge.now() if self.charge is not None and cut else None

    @property
    def over(self) -> Reached | None:
        """The limit that forbids the turn to go on; its end may have come already."""
        over = self.ended is not None or (self.inbox and isinstance(self.inbox[-1], wire.TurnEnded | None))
        if self.charge is None or over:
            return None
        return self.charge.over()

    def reply(self) -> Reply[Any]:
        """Of a turn that was read to its end. Raises `OutputError` when the text is not the `output` asked for."""
        if self.ended is None:
            raise errors.InternalError("A turn without an end was asked for its reply.")
        text = self.text
        spec = self.request.output
        calls, partial = tuple(self.calls), self._partial_call
        if spec is not None and (problem := self.cut()) is not None:
            raise problem
        return Reply(
            text=text,
            new_text=self.new_text,
            output=text if spec is None else None if calls else spec.decode(text),
            tool_calls=calls,
            reasoning="".join(self._reasonings),
            finish_reason="tool_calls" if calls and partial is None else self.ended.reason,
            usage=self.usage,
            ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            draw_logprobs=tuple(self._draw_logprobs),
            top_logprobs=tuple(self._top),
            bound=self.ended.message or str(self.limit or ""),
            partial_call=partial,
        )

    def cut(self) -> errors.OutputError | None:
        """For who asked for an answer or for calls, and got neither: asked again, the model would be cut again."""
        spec = self.request.output
        if self.ended is None or self.ended_by_itself:
            return None
        if self._partial_call is not None:
            inside = "a call"
        elif spec is not None and not self.calls and not spec.is_whole(self.text):
            inside = "its output"
        else:
            return None
        if self.ended.reason == "stop_string":
            by, remedy = "a stop text", "Give other stop texts, or let generate() go on with the message"
        elif self.ended.message:
            by, remedy = self.ended.message, "Rewind or start anew: there is no room to go on"
        elif (limit := self.limit) is not None:
            by, remedy = str(limit), "Give that run a higher limit, or let generate() go on with the message"
        else:
            by, remedy = "max_tokens", "Raise max_tokens, or let generate() go on with the message"
        return errors.OutputError(f"The turn was cut inside {inside}, by {by}.", text=self.text, remedy=f"{remedy}.")
