"""How messages enter a mirror and how a turn's message opens and closes there: the codec's ids, only ever appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.tags import Tags
from agentspeed.chat.token_log import Checkpoint, Span, TokenLog
from agentspeed.chat.tokenizer import IncrementalText
from agentspeed.errors import InvalidRequest
from agentspeed.messages import Assistant, Message, System, ToolCall, ToolMessage

NO_RESULT = "error: the call got no result"


def write(mirror: TokenLog, codec: ChatCodec, messages: Sequence[Message], *, complete: bool = False) -> None:
    """Closes an open message and appends whole ones. `complete`: the model speaks next, so calls that nobody answered
    get a result that says so.

    Raises `InvalidRequest` for a result without an open call before it, or with a call before it that is still open,
    and for a system message that is not the log's first."""
    messages = _in_order(unanswered(mirror), messages, complete)
    _check_system(mirror, codec, messages)
    _record_open(mirror, codec)
    if mirror.open_at is not None:
        settle(mirror, codec, "grammar_end")
    history = _said(mirror)
    if messages and isinstance(messages[0], System):
        written = [codec.system(messages[0].text), *codec.append(history, messages[1:], generate=complete)]
    else:
        written = codec.append(history, messages, generate=complete)
    stray = _stray(mirror, codec)
    mirror.append(mirror.owed)
    mirror.owed = ()
    for message, ids in zip(messages, written, strict=True):
        start = len(mirror)
        mirror.append(ids[1:] if stray and ids[:1] == list(mirror.ids[-1:]) else ids)
        stray = False
        mirror.spans.append(Span(message, start, len(mirror)))


@final
@dataclass(frozen=True, slots=True)
class Revision:
    """What of a log its template writes differently now: it goes back to `point`, and on with `messages`."""

    point: Checkpoint
    messages: tuple[tuple[Message, tuple[int, ...]], ...]


def revision(
    mirror: TokenLog, codec: ChatCodec, messages: Sequence[Message], *, complete: bool = False
) -> Revision | None:
    """What has to be rewritten before `messages` are appended: earlier reasoning that the template leaves out once they
    are there, and the end of an answer that is not how its template ends one. None where the log can stay.

    Raises as `write` does."""
    if not messages and (mirror.open_at is not None or not complete):
        return None
    messages = _in_order(unanswered(mirror), messages, complete)
    spans = [span for span in mirror.spans if _is_said(span)]
    history = [span.message for span in spans]
    new = [message for message in messages if not isinstance(message, System)]
    place = codec.first_changed(history, new, _drawn(mirror, spans), generate=complete)
    if place is not None and place > 0:
        return _rewritten(mirror, codec, spans, new, place, complete)
    if not _stray(mirror, codec):
        return None
    following = codec.append(history, new, generate=complete)[0] if new else codec.prompt(history)
    if not mirror.owed and following[:1] == list(mirror.ids[-1:]):
        return None  # the model drew the beginning of what comes next
    end = len(mirror) - 1
    last = mirror.spans[-1]
    kept = (*mirror.spans[:-1], Span(last.message, last.start, end))
    return Revision(Checkpoint(end, kept, None, mirror.owed), ())


def revise(mirror: TokenLog, given: Revision) -> None:
    """Carries a revision out."""
    mirror.back_to(given.point)
    for message, ids in given.messages:
        start = len(mirror)
        mirror.append(ids)
        mirror.spans.append(Span(message, start, len(mirror)))


def _rewritten(
    mirror: TokenLog, codec: ChatCodec, spans: Sequence[Span], new: Sequence[Message], place: int, complete: bool
) -> Revision | None:
    """From the first message on that is written differently; None where the log has it so already."""
    history = [span.message for span in spans]
    again = [_as_told(message) for message in history[place:]]
    written = codec.append(history[:place], [*again, *new], generate=complete)[: len(again)]
    start, before = spans[place].start, spans[place - 1]
    if start == before.end and isinstance(before.message, Assistant):  # nothing has closed the answer before it
        written[0] = [*codec.owed(mirror.ids[before.start : before.end], history[: place - 1]), *written[0]]
    ids = [number for message in written for number in message]
    if list(mirror.ids[start:]) == ids:
        return None
    pairs = zip(history[place:], map(tuple, written), strict=True)
    return Revision(Checkpoint(start, tuple(mirror.spans[: mirror.spans.index(spans[place])]), None, ()), tuple(pairs))


def _as_told(message: Message) -> Message:
    """A message by what it says, and not by how a model drew it."""
    if isinstance(message, Assistant):
        return Assistant(message.text, message.tool_calls, message.reasoning)
    return message


def _drawn(mirror: TokenLog, spans: Sequence[Span]) -> dict[int, list[int]]:
    """The ids of answers that a model drew, or that were given with reasoning, prompts included, by their place."""
    return {
        place: list(mirror.ids[span.start : span.end])
        for place, span in enumerate(spans)
        if isinstance(span.message, Assistant)
        and (span.message.reasoning or mirror.made.find(1, span.start, span.end) >= 0)
    }


def _said(mirror: TokenLog) -> list[Message]:
    """The messages whose frames a template writes one by one."""
    return [span.message for span in mirror.spans if _is_said(span)]


def _stray(mirror: TokenLog, codec: ChatCodec) -> bool:
    """Whether the log ends in an end id that the model drew and its template does not write."""
    drawn = bool(mirror.made) and mirror.made[-1] == 1 and mirror.open_at is None and bool(mirror.spans)
    last = mirror.spans[-1] if mirror.spans else None
    if not drawn or last is None or not isinstance(last.message, Assistant) or last.end != len(mirror):
        return False
    return codec.stray_end(mirror.ids[-1:], _said(mirror)[:-1])


def _record_open(mirror: TokenLog, codec: ChatCodec) -> None:
    """An open message that no turn of this mirror ended (it was forked or cut in its middle) is one when it closes:
    what there is of it, as plain text."""
    start = mirror.spans[-1].end if mirror.spans else 0
    message = open_message(mirror)
    if message is None or mirror.open_at is None or start > mirror.open_at:
        return
    said = "".join(message.read(codec.tokenizer.decoder(), codec.stop_ids))
    mirror.spans.append(Span(Assistant(said, raw=said), start, len(mirror)))


@final
@dataclass(frozen=True, slots=True)
class OpenMessage:
    """An assistant's message that is not closed, as it was when this was made."""

    ids: list[int]
    hidden: tuple[tuple[int, int], ...]
    """Its stop texts, as in `TokenLog.hidden`, but counted from its own first id."""
    calls: tuple[ToolCall, ...]
    """Its whole calls, if a turn has ended in it."""

    @property
    def since_stop(self) -> int:
        """How many of its last ids came after the last stop text in it."""
        return len(self.ids) - (self.hidden[-1][0] if self.hidden else 0)

    def read(self, decoder: IncrementalText, stop_ids: Sequence[int]) -> tuple[str, str]:
        """Its text in two parts: up to the last stop text in it, and since; no stop text is in either. `decoder` has
        read all ids afterwards."""
        text, place = "", 0
        for end, characters in self.hidden:
            text += decoder.feed([number for number in self.ids[place:end] if number not in stop_ids])
            text, place = text[: len(text) - characters], end
        return text, decoder.feed([number for number in self.ids[place:] if number not in stop_ids])


def open_message(mirror: TokenLog) -> OpenMessage | None:
    """The message that the model would go on with; None when all are closed."""
    return None if mirror.open_at is None else _message_since(mirror, mirror.open_at)


def _message_since(mirror: TokenLog, start: int) -> OpenMessage:
    """The log's last message, whose text begins at `start`."""
    last = mirror.spans[-1] if mirror.spans else None
    said = last.message if last is not None and last.end > start else None
    return OpenMessage(
        ids=list(mirror.ids[start:]),
        hidden=tuple((end - start, characters) for end, characters in mirror.hidden if end > start),
        calls=said.tool_calls if isinstance(said, Assistant) else (),
    )


def _in_order(calls: Sequence[ToolCall], messages: Sequence[Message], complete: bool) -> list[Message]:
    """The messages with one result for each call before anybody but a tool speaks, in call order whatever order they
    were given in."""
    ordered: list[Message] = []
    results: dict[str, ToolMessage] = {}
    for message in messages:
        if isinstance(message, ToolMessage):
            _check_result(calls, results, message)
            results[message.call_id] = message
            continue
        ordered += _completed(calls, results)
        ordered.append(message)
        calls, results = message.tool_calls if isinstance(message, Assistant) else (), {}
    if complete:
        return [*ordered, *_completed(calls, results)]
    answered = [call.id in results for call in calls]
    if False in answered[: len(results)]:
        waited = calls[answered.index(False)]
        raise InvalidRequest(
            f"The call {waited.id!r} of {waited.name} has no result yet, and a later one has.",
            remedy="The model reads results in the order of its calls: add those of the earlier calls first.",
        )
    return [*ordered, *(results[call.id] for call in calls if call.id in results)]


def _completed(calls: Sequence[ToolCall], results: Mapping[str, ToolMessage]) -> list[ToolMessage]:
    return [
        results.get(call.id) or ToolMessage(call_id=call.id, name=call.name, text=NO_RESULT, ok=False) for call in calls
    ]


def _check_result(calls: Sequence[ToolCall], results: Mapping[str, ToolMessage], given: ToolMessage) -> None:
    still = [call.id for call in calls if call.id not in results]
    if given.call_id not in still:
        raise InvalidRequest(
            f"There is no open call {given.call_id!r} for this result of {given.name}.",
            remedy=f"The open calls are: {', '.join(still) or 'none'}. A result follows the message with its call.",
        )


def _check_system(mirror: TokenLog, codec: ChatCodec, messages: Sequence[Message]) -> None:
    for place, message in enumerate(messages):
        if isinstance(message, System) and (place or mirror.spans or len(mirror) != len(codec.opening(None, []))):
            raise InvalidRequest(
                "A system message stands above the conversation, and this one has begun or has a system text or tools.",
                remedy="Give the text to Session(system=...), or say it as a user's message.",
            )


def tags_for(mirror: TokenLog, codec: ChatCodec, messages: Sequence[Message]) -> Tags:
    """The marks of the model's next message: whether its prompt opens the reasoning depends on who spoke last."""
    opened = mirror.open_at
    if not messages and opened is not None:
        return codec.tags_after([span.message for span in mirror.spans if span.end <= opened and _is_said(span)])
    calls = unanswered(mirror)
    return codec.tags_after(
        [*_said(mirror), *(m for m in _in_order(calls, messages, True) if not isinstance(m, System))]
    )


def _is_said(span: Span) -> bool:
    return not isinstance(span.message, System)


def open_reply(mirror: TokenLog, codec: ChatCodec, messages: Sequence[Message]) -> list[int]:
    """Makes the mirror ready for the model to speak; gives the ids of the open message that it goes on with, if any.

    Raises `InvalidRequest` when the model spoke last and has finished."""
    if not messages and mirror.open_at is not None:
        return list(mirror.ids[mirror.open_at :])
    last = mirror.spans[-1].message if mirror.spans else None
    if not messages and isinstance(last, Assistant) and not unanswered(mirror):
        raise InvalidRequest(
            "There is nothing to answer: the last message is the model's own, and it is finished.",
            remedy="Give a prompt.",
        )
    write(mirror, codec, messages, complete=True)
    mirror.append(codec.prompt(_said(mirror)))
    mirror.open_at = len(mirror)
    return []


def settle(mirror: TokenLog, codec: ChatCodec, reason: str) -> None:
    """After a turn's last id. One that ended by itself closes the message; a bound or a stop text leaves it open."""
    if reason not in ("stop_id", "grammar_end"):
        return
    opened = len(mirror) if mirror.open_at is None else mirror.open_at
    earlier = [span.message for span in mirror.spans if span.end <= opened and _is_said(span)]
    mirror.open_at, mirror.owed = None, tuple(codec.owed(mirror.ids[opened:], earlier))


def record(mirror: TokenLog, message: Assistant, open_at: int) -> None:
    """The message of a turn that ended. `open_at`: where its text began; a shorter message from there gives way."""
    if mirror.spans and mirror.spans[-1].end > open_at:
        _ = mirror.spans.pop()
    start = mirror.spans[-1].end if mirror.spans else 0
    mirror.spans.append(Span(message, start, len(mirror)))


def record_unread(mirror: TokenLog, codec: ChatCodec, open_at: int) -> None:
    """In a copy that was made after the model had ended its message and before anybody had read the turn to its end:
    what there is of the message, as plain text. `open_at`: where that begins."""
    start = mirror.spans[-1].end if mirror.spans else 0
    if mirror.open_at is not None or mirror.made.find(1, start) < 0:
        return
    message = _message_since(mirror, open_at)
    said = "".join(message.read(codec.tokenizer.decoder(), codec.stop_ids))
    record(mirror, Assistant(said, raw=said), open_at)


def unanswered(mirror: TokenLog) -> tuple[ToolCall, ...]:
    """Calls of the last assistant message that have no result yet, in call order."""
    answered: set[str] = set()
    for span in reversed(mirror.spans):
        match span.message:
            case ToolMessage(call_id=call_id):
                answered.add(call_id)
            case Assistant(tool_calls=calls):
                return tuple(call for call in calls if call.id not in answered)
            case _:
                return ()
    return ()
