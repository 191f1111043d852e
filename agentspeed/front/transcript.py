"""How messages enter a mirror and how a turn's message opens and closes there: the codec's ids, only ever appended."""

from __future__ import annotations

from collections.abc import Sequence

from agentspeed.errors import InvalidRequest
from agentspeed.front.codec import ChatCodec
from agentspeed.front.mirror import Mirror, Span
from agentspeed.messages import Assistant, Message, ToolCall, ToolMessage

NO_RESULT = "error: the call got no result"


def write(mirror: Mirror, codec: ChatCodec, messages: Sequence[Message], *, complete: bool = False) -> None:
    """Closes an open message and appends whole ones. `complete`: the model speaks next, or somebody else than a tool
    does, so calls that nobody answered get a result that says so."""
    if complete or not all(isinstance(message, ToolMessage) for message in messages):
        messages = _completed(unanswered(mirror), messages)
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
    if mirror.open_at is None or start > mirror.open_at:
        return
    stops = codec.stop_ids
    said = codec.tokenizer.decoder().feed([number for number in mirror.ids[mirror.open_at :] if number not in stops])
    mirror.spans.append(Span(Assistant(said, raw=said), start, len(mirror)))


def _completed(calls: Sequence[ToolCall], messages: Sequence[Message]) -> list[Message]:
    """A result for each call, in call order, then what else there is."""
    given = {message.call_id: message for message in messages if isinstance(message, ToolMessage)}
    results: list[Message] = [
        given.get(call.id) or ToolMessage(call_id=call.id, name=call.name, text=NO_RESULT, ok=False) for call in calls
    ]
    return [*results, *(message for message in messages if message not in results)]


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
