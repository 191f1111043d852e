"""Frames: how messages become bytes and come back, without a socket, the same for both sides of every link.

A frame is a 4-byte little-endian length and one msgpack body: a `Command` from a client, an `Outbox` from an engine.
A reader is fed whatever bytes came, cut anywhere, and gives whole messages in order. It keeps at most one frame of
`MAX_FRAME_BYTES` and what was fed since it was last emptied. What is no frame ends it: the messages before it are
given, and from there on it raises `BadFrame`, however often it is asked. No writer makes a frame that a reader refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar, final

import msgspec

from agentspeed_engine.protocol.messages import Command, Outbox, Outgoing, Tokens

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""Of a body; both sides keep it."""
_HEADER_BYTES: Final = 4

M = TypeVar("M")


class BadFrame(Exception):
    """The peer sent what is no frame of this protocol; its link cannot be read any further."""


class Unsendable(ValueError):
    """A message that no frame can carry: it is too large, or a value in it has no msgpack form."""


@final
class FrameReader(Generic[M]):
    """Bytes in, messages out; the rule is in the module's docstring."""

    __slots__ = ("_at", "_bad", "_body_of", "_inbox", "_most_bytes")

    def __init__(self, body_of: Callable[[bytes], M], most_bytes: int = MAX_FRAME_BYTES) -> None:
        """`body_of`: decodes one body, and raises `BadFrame` where it is none."""
        self._body_of = body_of
        self._most_bytes = most_bytes
        self._inbox = bytearray()
        self._at = 0
        """Where the first frame that was not given begins."""
        self._bad: BadFrame | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes what came. Nothing is kept of what comes after a bad frame."""
        if self._bad is None:
            del self._inbox[: self._at]
            self._at = 0
            self._inbox += data

    def next(self) -> M | None:
        """The next whole message; None until more bytes come. Raises `BadFrame`."""
        if self._bad is not None:
            raise self._bad
        start = self._at + _HEADER_BYTES
        if len(self._inbox) < start:
            return None
        size = int.from_bytes(self._inbox[self._at : start], "little")
        if size > self._most_bytes:
            raise self._ended(BadFrame(f"a frame of {size} bytes; the limit is {self._most_bytes}"))
        end = start + size
        if len(self._inbox) < end:
            return None
        with memoryview(self._inbox) as inbox:
            body = bytes(inbox[start:end])
        try:
            message = self._body_of(body)
        except BadFrame as error:
            raise self._ended(error) from error.__cause__
        self._at = end
        return message

    def __iter__(self) -> Iterator[M]:
        """Every whole message that came. Raises `BadFrame` behind the last good one."""
        while (message := self.next()) is not None:
            yield message

    @property
    def pending_bytes(self) -> int:
        """Bytes of frames that were not given yet."""
        return len(self._inbox) - self._at

    def _ended(self, error: BadFrame) -> BadFrame:
        self._bad = error
        self._inbox.clear()
        self._at = 0
        return error


def command_reader() -> FrameReader[Command]:
    """The engine's reader of one link."""
    return FrameReader(_decode_command)


def outbox_reader() -> FrameReader[tuple[Outgoing, ...]]:
    """A client's reader of one link: all messages of one frame at a time."""
    return FrameReader(_decode_outbox)


def encode_command(command: Command) -> bytes:
    """One whole frame. Raises `Unsendable`."""
    return _framed(_body(command))


def encode_outbox(messages: tuple[Outgoing, ...]) -> bytes:
    """One whole frame, or several where one cannot hold them: a reader gets the same messages in the same order, the
    tokens of a delta that is too long for one frame as two deltas. Raises `Unsendable`."""
    body = _body(Outbox(messages))
    if len(body) <= MAX_FRAME_BYTES:
        return _framed(body)
    if len(messages) > 1:
        middle = len(messages) // 2
        return encode_outbox(messages[:middle]) + encode_outbox(messages[middle:])
    return b"".join(encode_outbox((part,)) for message in messages for part in _halves(message, len(body)))


def _halves(message: Outgoing, size: int) -> tuple[Tokens, Tokens]:
    count = len(message.ids) // 4 if isinstance(message, Tokens) else 0
    if not isinstance(message, Tokens) or count < 2:
        raise Unsendable(f"A {type(message).__name__} of {size} bytes; a frame holds {MAX_FRAME_BYTES}.")
    cut = count // 2
    return _part(message, 0, cut), _part(message, cut, count)


def _part(message: Tokens, start: int, end: int) -> Tokens:
    return Tokens(
        branch=message.branch,
        ids=message.ids[4 * start : 4 * end],
        logprobs=message.logprobs[start:end],
        top=message.top[start:end],
        draw_logprobs=message.draw_logprobs[start:end],
    )


_COMMANDS: Final = msgspec.msgpack.Decoder(Command)
_OUTBOXES: Final = msgspec.msgpack.Decoder(Outbox)
_ENCODER: Final = msgspec.msgpack.Encoder()


def _decode_command(body: bytes) -> Command:
    try:
        command: Command = _COMMANDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the latter two through
        raise BadFrame(str(error)) from error
    return command


def _decode_outbox(body: bytes) -> tuple[Outgoing, ...]:
    try:
        return _OUTBOXES.decode(body).messages
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(str(error)) from error


def _body(message: Command | Outbox) -> bytes:
    try:
        return _ENCODER.encode(message)
    except (msgspec.EncodeError, UnicodeEncodeError, OverflowError, TypeError, RecursionError) as error:
        raise Unsendable(f"No frame can carry it: {error}.") from error


def _framed(body: bytes) -> bytes:
    if len(body) > MAX_FRAME_BYTES:
        raise Unsendable(f"A frame of {len(body)} bytes; the limit is {MAX_FRAME_BYTES}.")
    return len(body).to_bytes(_HEADER_BYTES, "little") + body
