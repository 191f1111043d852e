"""What a running turn tells: typed events, in order, the same from every backend."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from agentspeed.messages import ToolCall
from agentspeed.usage import Lease, Usage


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base: `seq` counts within the session."""

    seq: int = 0
    session_id: str = ""


class TurnStarted(Event, frozen=True, kw_only=True, tag=True):
    """The engine admitted the turn: what is resumed is known."""

    usage: Usage


class TextDelta(Event, frozen=True, kw_only=True, tag=True):
    """A piece of the answer; characters are never broken."""

    text: str


class ReasoningDelta(Event, frozen=True, kw_only=True, tag=True):
    """A piece of what the model thinks before it answers."""

    text: str


class ToolCallStarted(Event, frozen=True, kw_only=True, tag=True):
    """A call was opened; its arguments follow."""

    index: int
    name: str


class ToolCallDelta(Event, frozen=True, kw_only=True, tag=True):
    """A piece of the arguments' JSON text."""

    index: int
    arguments: str


class ToolCallReady(Event, frozen=True, kw_only=True, tag=True):
    """A call is whole."""

    call: ToolCall


class Paused(Event, frozen=True, kw_only=True, tag=True):
    """Tools run; the branch is held under this lease."""

    lease: Lease


class ToolStarted(Event, frozen=True, kw_only=True, tag=True):
    """A tool begins to run: a call that is denied, or whose arguments are wrong, never does. `call` has the arguments
    as the model wrote them, or as the approver changed them."""

    call: ToolCall


class ToolProgress(Event, frozen=True, kw_only=True, tag=True):
    """A tool says how far it is (`ToolContext.report`); `total`: what `done` will have come to, if it knows."""

    call: ToolCall
    done: float
    total: float | None
    message: str


class ToolFinished(Event, frozen=True, kw_only=True, tag=True):
    """A tool ended, well or not; `content` is what the model is told."""

    call: ToolCall
    content: str
    ok: bool
    seconds: float


class LeaseChanged(Event, frozen=True, kw_only=True, tag=True):
    """The engine promises something else than it did; `lease.why` says what happened."""

    lease: Lease


class Resumed(Event, frozen=True, kw_only=True, tag=True):
    """The first turn after a pause: what was still there."""

    device: int
    host: int
    recomputed: int
    why: str


class TurnFinished(Event, frozen=True, kw_only=True, tag=True):
    """The last event of a turn."""

    reason: str
    usage: Usage
    bound: str = ""
    """See `Reply.bound`."""


AnyEvent: TypeAlias = (
    TurnStarted
    | TextDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallDelta
    | ToolCallReady
    | Paused
    | ToolStarted
    | ToolProgress
    | ToolFinished
    | LeaseChanged
    | Resumed
    | TurnFinished
)
"""All of them: what `match` has to cover."""
