"""What a turn and a run come to, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, Literal, TypeVar, final

from agentspeed.limits import LimitName
from agentspeed.messages import ToolCall, ToolMessage
from agentspeed.usage import Usage

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[T]):
    """What a turn came to."""

    text: str
    """The text of the whole message: also what earlier turns wrote of it, when this one went on with an open message.
    `output`, `tool_calls`, `reasoning` and `partial_call` are of the whole message too. No text of `stop` is in it."""
    new_text: str
    """What this turn wrote of `text`: its `TextDelta` events together. `ids`, the log-probabilities and `usage` are
    of this turn alone too."""
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
    """Of `ids` in the model's own distribution: the softmax of its logits. Empty, as the next two are, unless asked
    for."""
    draw_logprobs: tuple[float, ...] = ()
    """Of `ids` in the distribution that they were drawn from, after all of `sampling` and the grammar; 0 where only
    one token could come, as in a greedy turn."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """The most likely ids and their log-probabilities in the model's own distribution."""
    bound: str = ""
    """What ended the turn at fewer tokens than were asked for: the context limit, the tenant's quota of pages, or a
    limit of the run that it belongs to."""
    partial_call: str | None = None
    """What there is of a call in which the turn was cut, if it was; `generate()` goes on with it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Generic[T]):
    """What a run came to: its last turn, and what all of it cost."""

    text: str
    output: T
    """The text, or what `output=` asked for."""
    reason: Literal["answered", "forced", "cut", "max_turns", "limit", "approval"]
    """"answered": by itself. "forced": in the last of `max_turns` turns, in which it could call no tool any more.
    "cut": `max_tokens` ended its answer. "max_turns": that last turn was a call, in a session without tools.
    "limit": one of `limits` ended it, the one that `limit` names. "approval": the approver answered "later", and calls
    are open, which the session's next run asks about before anything else."""
    turns: int
    tools: tuple[ToolMessage, ...]
    """Every tool result, in the order in which the model read them."""
    usage: Usage
    reply: Reply[T]
    """The last turn that ended. Of a run that asked about open calls and was told "later" at once, the calls alone."""
    limit: LimitName | None = None
    """With the reason "limit": which of `Limits` ended the run, its own or that of a run whose tool it serves."""
    bound: str = ""
    """With the reason "limit": how much the limit is, whose, and what each session had spent of it."""
    by_branch: Mapping[str, Usage] = field(default_factory=lambda: MappingProxyType({}))
    """What turns cost while it ran, by the id of their session: this one, and those that its tools used."""
