"""How messages enter a mirror and how a turn's message opens and closes there: the codec's ids, only ever appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from agentspeed.errors import InvalidRequest
from agentspeed.front.codec import ChatCodec
from agentspeed.front.mirror import Mirror, Span
from agentspeed.front.tokenizer import IncrementalText
from agentspeed.messages import Assistant, Message, System, ToolCall, ToolMessage

NO_RESULT = "error: the call got no result"


def write(mirror: Mirror, codec: ChatCodec, messages: Sequence[Message], *, complete: bool = False) -> None:
    """Closes an open message and appends whole ones. `complete`: the model speaks next, so calls that nobody answered
    get a result that says so.

    Raises `InvalidRequest` for a result without an open call before it, or with a call before it that is still open,
    and for a system message that is not the log's first."""
    messages = _in_order(unanswered(mirror), messages, complete)
    _check_system(mirror, codec, messages)
    _record_open(mirror, codec)
    mirror.append(codec.closing(None) if mirror.open_at is not None else mirror.owed)
    mirror.open_at, mirror.owed = None, ()
    for message in messages:
        start = len(mirror)
        mirror.append(codec.message(message))
        mirror.spans.append(Span(message, start, len(mirror)))


def _record_open(mirror: Mirror, codec: ChatCodec) -> None:
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
    """Its stop texts, as in `Mirror.hidden`, but counted from its own first id."""
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


def open_message(mirror: Mirror) -> OpenMessage | None:
    """The message that the model would go on with; None when all are closed."""
    start = mirror.open_at
    if start is None:
        return None
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
            remedy="The model reads results in the order of its calls: add those of the earlier calls first.")
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
            remedy=f"The open calls are: {', '.join(still) or 'none'}. A result follows the message with its call.")


def _check_system(mirror: Mirror, codec: ChatCodec, messages: Sequence[Message]) -> None:
    for place, message in enumerate(messages):
        if isinstance(message, System) and (place or mirror.spans or len(mirror) != len(codec.opening(None, []))):
            raise InvalidRequest(
                "A system message stands above the conversation, and this one has begun or has a system text or tools.",
                remedy="Give the text to Session(system=...), or say it as a user's message.")


def open_reply(mirror: Mirror, codec: ChatCodec, messages: Sequence[Message]) -> list[int]:
    """Makes the mirror ready for the model to speak; gives the ids of the open message that it goes on with, if any.

    Raises `InvalidRequest` when the model spoke last and has finished."""
    if not messages and mirror.open_at is not None:
        return list(mirror.ids[mirror.open_at :])
    last = mirror.spans[-1].message if mirror.spans else None
    if not messages and isinstance(last, Assistant) and not unanswered(mirror):
        raise InvalidRequest("There is nothing to answer: the last message is the model's own, and it is finished.",
                             remedy="Give a prompt.")
    write(mirror, codec, messages, complete=True)
    mirror.append(codec.generation_ids)
    mirror.open_at = len(mirror)
    return []


def settle(mirror: Mirror, codec: ChatCodec, reason: str) -> None:
    """After a turn's last id. One that ended by itself closes the message; a bound or a stop text leaves it open."""
    if reason == "stop_id":
        mirror.open_at, mirror.owed = None, tuple(codec.closing(mirror.ids[-1]))
    elif reason == "grammar_end":
        mirror.open_at, mirror.owed = None, tuple(codec.closing(None))


def record(mirror: Mirror, message: Assistant, open_at: int) -> None:
    """The message of a turn that ended. `open_at`: where its text began; a shorter message from there gives way."""
    if mirror.spans and mirror.spans[-1].end > open_at:
        _ = mirror.spans.pop()
    start = mirror.spans[-1].end if mirror.spans else 0
    mirror.spans.append(Span(message, start, len(mirror)))


def unanswered(mirror: Mirror) -> tuple[ToolCall, ...]:
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
