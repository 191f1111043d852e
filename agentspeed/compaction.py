"""Compaction: a session that is nearly full goes on over a shorter log, with a summary of what is gone."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias, TypeVar, final

from agentspeed import errors
from agentspeed._base.completion import run_to_completion
from agentspeed._base.validate import check_count, check_text, shown
from agentspeed._base.wording import counted
from agentspeed._core.session_core import SessionCore
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.token_log import Checkpoint, Span, TokenLog
from agentspeed.fork import fork
from agentspeed.messages import Assistant, Message, System, ToolMessage, User

S = TypeVar("S")
Summarise: TypeAlias = Callable[[S], Awaitable[str]]
"""Writes the summary on a fork that ends where the kept messages begin."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """What `Session.compact` did."""

    dropped: int
    """Messages that are not in the log any more; 0: there was nothing to drop, and nothing has changed."""
    tokens_before: int
    tokens: int
    """Tokens of the log now."""
    marks: Mapping[str, int | None] = field(default_factory=lambda: MappingProxyType({}))
    """Where each named mark is now, in tokens; None for one that stood among what was dropped."""


async def compact(
    core: SessionCore, keep: int, summary: str | Summarise[S] | None, face: Callable[[SessionCore], S]
) -> Compaction:
    """See `Session.compact`. `face` makes a session of the fork's core."""
    check_count("keep", keep, least=0)
    if summary is not None and not callable(summary):
        _check_summary(summary)
    with core.doing("compact"):
        log, before = core.log, core.tokens
        head, first = _cut(log.spans, keep)
        if first == head:
            return Compaction(dropped=0, tokens_before=before, tokens=before, marks=_places(log, log))
        text = await _written(core, log.spans[first - 1].end, summary, face) if callable(summary) else summary
        codec = core.codec
        root = log.spans[head].start or len(codec.opening(core.system, core.described))
        shorter = compacted(log, codec, root, head, first, text)
        if len(shorter) >= core.engine.context_limit:
            raise errors.ContextOverflow(
                f"The session would have {counted(len(shorter), 'token')} after compaction, and its context has "
                f"{core.engine.context_limit}.",
                remedy="Keep fewer messages, or give a shorter summary.",
            )
        marks = _places(log, shorter)
        await run_to_completion(lambda: _restarted(core, shorter, marks))
    return Compaction(dropped=first - head, tokens_before=before, tokens=core.tokens, marks=marks)


async def _restarted(core: SessionCore, shorter: TokenLog, marks: Mapping[str, int | None]) -> None:
    """The engine has the shorter log, and the session knows what that changes: to its end, whatever cancels it."""
    await core.branch.restart(shorter)
    core.moves += 1
    core.pending.leave(core.log)
    core.compacted.update(name for name, place in marks.items() if place is None)


def _check_summary(summary: object) -> None:
    if not isinstance(summary, str) or not summary:
        raise errors.InvalidRequest(
            f"summary is {shown(summary)}; it must be a text that is not empty.",
            remedy="Give a text, an async function of a fork that writes one, or None to go on without a summary.",
        )
    check_text("summary", summary)


async def _written(core: SessionCore, end: int, summarise: Summarise[S], face: Callable[[SessionCore], S]) -> str:
    (child,) = await fork(core, 1, None)
    try:
        await child.rewind(end)
        text = await summarise(face(child))
    finally:
        await child.close()
    _check_summary(text)
    return text


def _cut(spans: Sequence[Span], keep: int) -> tuple[int, int]:
    """How many messages stand above the conversation, and the first that is kept: results stay with their calls."""
    head = 0
    while head < len(spans) and isinstance(spans[head].message, System):
        head += 1
    first = max(head, len(spans) - keep)
    while first > head and first < len(spans) and isinstance(spans[first].message, ToolMessage):
        first -= 1
    return head, first


def compacted(log: TokenLog, codec: ChatCodec, root: int, head: int, first: int, summary: str | None) -> TokenLog:
    """The log from `root` tokens on with the summary as a user's message and then the messages from `first` on; those
    keep the ids they were drawn with where the template writes them in the new place as it did in the old one.

    Raises `InvalidRequest` when the template does not have such a conversation."""
    made = log.copy(root)
    made.spans, made.open_at, made.owed = list(log.spans[:head]), None, ()
    told: list[Message] = [] if summary is None else [User(summary)]
    _write(made, told, codec.append([], told))
    kept = [span.message for span in log.spans[first:]]
    history = [span.message for span in log.spans[head:first]]
    written = codec.append(told, kept)
    place = len(made)
    between = range(log.spans[first - 1].end, (log.spans[first].start if kept else len(log)) + 1)
    if not kept or written != codec.append(history, kept) or _after_answer(log.spans, first):
        _write(made, [_as_told(message) for message in kept], written)
        made.marks |= {name: made.at(place) for name, point in log.marks.items() if point.tokens in between}
        return made
    start = log.spans[first].start
    shift = place - start
    _move(log, made, start)
    made.spans += _shifted(log.spans[first:], shift)
    made.open_at, made.owed = None if log.open_at is None else log.open_at + shift, log.owed
    for name, point in log.marks.items():
        if point.tokens in between:
            made.marks[name] = Checkpoint(place, tuple(made.spans[: head + len(told)]), None, ())
        elif point.tokens > start:
            spans = (*made.spans[: head + len(told)], *_shifted(point.spans[first:], shift))
            opened = None if point.open_at is None else point.open_at + shift
            made.marks[name] = Checkpoint(point.tokens + shift, spans, opened, point.owed)
    return made


def _after_answer(spans: Sequence[Span], first: int) -> bool:
    """Whether the first kept message is an answer whose ids close the answer before it."""
    return all(isinstance(span.message, Assistant) for span in spans[first - 1 : first + 1])


def _as_told(message: Message) -> Message:
    """A message by what it says, and not by how a model drew it."""
    if isinstance(message, Assistant):
        return Assistant(message.text, message.tool_calls, message.reasoning)
    return message


def _write(log: TokenLog, messages: Sequence[Message], written: Sequence[Sequence[int]]) -> None:
    for message, ids in zip(messages, written, strict=True):
        start = len(log)
        log.append(ids)
        log.spans.append(Span(message, start, len(log)))


def _move(log: TokenLog, made: TokenLog, start: int) -> None:
    """The ids of `log` from `start` on, with what is known of each."""
    shift = len(made) - start
    made.ids.extend(array("I", log.ids[start:]))
    made.made.extend(log.made[start:])
    made.logprobs.extend(array("d", log.logprobs[start:]))
    made.draw_logprobs.extend(array("d", log.draw_logprobs[start:]))
    made.hidden += [(tokens + shift, characters) for tokens, characters in log.hidden if tokens > start]


def _shifted(spans: Sequence[Span], shift: int) -> list[Span]:
    return [Span(span.message, span.start + shift, span.end + shift) for span in spans]


def _places(log: TokenLog, now: TokenLog) -> Mapping[str, int | None]:
    return MappingProxyType({name: now.marks[name].tokens if name in now.marks else None for name in log.marks})
