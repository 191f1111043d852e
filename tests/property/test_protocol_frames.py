"""The frame reader of both sides: whatever the bytes and however they are cut, the same messages and the same end."""

from __future__ import annotations

import sys
from bisect import bisect_right
from itertools import accumulate

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed_engine.protocol import frames
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import (
    BadFrame,
    FrameReader,
    Unsendable,
    command_reader,
    encode_command,
    encode_outbox,
    outbox_reader,
)
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20)
COMMANDS = st.lists(
    st.one_of(
        st.builds(lambda request, client: wire.Hello(request=request, client=client), st.integers(0, 2**40), st.text()),
        st.builds(lambda request, ids: wire.Open(request=request, ids=pack_ids(ids)), st.integers(0, 99), IDS),
        st.builds(lambda request: wire.GetStats(request=request), st.integers(0, 2**63)),
    ),
    max_size=6,
)
OUTBOXES = st.lists(
    st.lists(
        st.one_of(
            st.builds(lambda request: wire.Done(request=request), st.integers(0, 99)),
            st.builds(lambda branch, ids: wire.Tokens(branch=branch, ids=pack_ids(ids)), st.integers(1, 9), IDS),
        ),
        max_size=5,
    ).map(tuple),
    max_size=6,
)
BAD = st.sampled_from(
    [
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        b"\x02\x00\x00\x00\x91\xa1",
        b"\x00\x00\x00\x00",
        (30_000).to_bytes(4, "little") + b"\x91" * 30_000,
    ]
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """`data` in pieces, some of them empty."""
    places = sorted(place % (len(data) + 1) for place in at)
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def told(reader: FrameReader[object], pieces: list[bytes]) -> tuple[list[object], str | None]:
    """Every message in order, and why there will be no more."""
    given: list[object] = []
    for piece in pieces:
        reader.feed(piece)
        try:
            given += reader
        except BadFrame as error:
            for _ in range(2):  # it says the same for as long as it is asked, and takes nothing more
                reader.feed(encode_command(wire.GetStats(request=1)))
                with pytest.raises(BadFrame) as again:
                    reader.next()
                assert str(again.value) == str(error)
                assert reader.pending_bytes == 0
            return given, str(error)
    return given, None


@settings(deadline=None)
@given(COMMANDS, st.lists(st.integers(0, 10_000), max_size=30))
def test_commands_cut_anywhere_arrive_as_they_were(commands: list[wire.Command], at: list[int]) -> None:
    data = b"".join(map(encode_command, commands))
    assert told(command_reader(), cut(data, at)) == (commands, None)


@settings(deadline=None)
@given(OUTBOXES, st.lists(st.integers(0, 10_000), max_size=30))
def test_outboxes_cut_anywhere_arrive_as_they_were(outboxes: list[tuple[wire.Outgoing, ...]], at: list[int]) -> None:
    data = b"".join(map(encode_outbox, outboxes))
    assert told(outbox_reader(), cut(data, at)) == (outboxes, None)


@settings(deadline=None)
@given(COMMANDS, BAD, COMMANDS, st.lists(st.integers(0, 60_000), max_size=30))
def test_a_bad_frame_ends_the_reader_behind_the_good_ones_however_they_are_cut(
    before: list[wire.Command], bad: bytes, behind: list[wire.Command], at: list[int]
) -> None:
    data = b"".join(map(encode_command, before)) + bad + b"".join(map(encode_command, behind))
    given, end = told(command_reader(), cut(data, at))
    assert given == before
    assert end is not None


@settings(deadline=None)
@given(OUTBOXES, st.integers(1, 10_000))
def test_of_a_truncated_stream_only_whole_frames_are_given(
    outboxes: list[tuple[wire.Outgoing, ...]], less: int
) -> None:
    whole = [encode_outbox(outbox) for outbox in outboxes]
    data = b"".join(whole)
    data = data[: max(0, len(data) - less)]
    ends = list(accumulate(map(len, whole)))
    assert told(outbox_reader(), [data]) == (outboxes[: bisect_right(ends, len(data))], None)


@settings(deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=10))
def test_garbage_never_raises_anything_but_bad_frame_and_does_not_depend_on_its_pieces(
    data: bytes, at: list[int]
) -> None:
    for reader in (command_reader, outbox_reader):
        assert told(reader(), cut(data, at)) == told(reader(), [data])


@settings(deadline=None)
@given(st.integers(65, 2**32 - 1), st.binary(max_size=100))
def test_an_oversized_frame_is_refused_at_its_length_and_nothing_of_it_is_kept(size: int, data: bytes) -> None:
    reader = FrameReader(bytes, most_bytes=64)
    reader.feed(size.to_bytes(4, "little") + data)
    with pytest.raises(BadFrame, match=f"a frame of {size} bytes; the limit is 64"):
        reader.next()
    assert reader.pending_bytes == 0


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=64), max_size=40))
def test_what_a_reader_keeps_is_less_than_a_frame_once_it_was_emptied(bodies: list[bytes]) -> None:
    reader = FrameReader(bytes, most_bytes=64)
    data = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    given: list[bytes] = []
    for start in range(0, len(data), 7):
        reader.feed(data[start : start + 7])
        given += reader
        assert reader.pending_bytes < 4 + 64
    assert given == bodies


# ---- writers ---------------------------------------------------------------------------------------------------------
def small_frames(monkeypatch: pytest.MonkeyPatch) -> FrameReader[tuple[wire.Outgoing, ...]]:
    """Both sides with a limit of 200 bytes."""
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 200)
    return FrameReader(frames._decode_outbox, most_bytes=200)


def test_an_outbox_that_no_frame_holds_goes_in_several_and_a_long_delta_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = small_frames(monkeypatch)
    ids, logprobs = list(range(300)), [-number / 2 for number in range(300)]
    top = tuple((wire.TopLogprob(id=number, logprob=-1.0),) for number in range(300))
    done = [wire.Done(request=number) for number in range(60)]
    own = [-number / 4 for number in range(300)]
    delta = wire.Tokens(branch=3, ids=pack_ids(ids), logprobs=tuple(logprobs), top=top, draw_logprobs=tuple(own))
    reader.feed(encode_outbox((*done, delta, *done)))
    got = [message for frame in reader for message in frame]
    assert reader.pending_bytes == 0
    tokens = [message for message in got if isinstance(message, wire.Tokens)]
    assert [message for message in got if isinstance(message, wire.Done)] == done + done
    assert all(isinstance(message, wire.Tokens) for message in got[60:-60])
    assert [number for part in tokens for number in unpack_ids(part.ids)] == ids
    assert [value for part in tokens for value in part.logprobs] == logprobs
    assert tuple(value for part in tokens for value in part.top) == top
    assert [value for part in tokens for value in part.draw_logprobs] == own


def test_a_message_that_no_frame_holds_is_refused_by_name_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small_frames(monkeypatch)
    with pytest.raises(Unsendable, match=r"A frame of .* bytes; the limit is 200"):
        encode_command(wire.Open(request=1, ids=bytes(300)))
    with pytest.raises(Unsendable, match=r"A Failed of .* bytes; a frame holds 200"):
        encode_outbox((wire.Failed(request=1, code="internal", message="x" * 300),))


@pytest.mark.parametrize(
    "command",
    [
        wire.Hello(request=1, client="lone \ud800 surrogate"),
        wire.Rewind(request=1, branch=2**64, tokens=0),
    ],
)
def test_a_value_that_has_no_form_in_a_frame_is_refused(command: wire.Command) -> None:
    with pytest.raises(Unsendable):
        encode_command(command)


# ---- ids -------------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(IDS)
def test_ids_come_back_as_they_went(ids: list[int]) -> None:
    assert list(unpack_ids(pack_ids(ids))) == ids


def test_ids_are_little_endian_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack_ids([1, 0x01020304]) == b"\1\0\0\0\4\3\2\1"
    native = pack_ids([1, 0x01020304])
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    assert pack_ids([1, 0x01020304]) == b"".join(native[at : at + 4][::-1] for at in range(0, 8, 4))
    assert list(unpack_ids(pack_ids([1, 2**32 - 1]))) == [1, 2**32 - 1]


@pytest.mark.parametrize("ids", [[-1], [2**32]])
def test_numbers_that_are_no_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(OverflowError):
        pack_ids(ids)


def test_a_part_of_an_id_is_refused() -> None:
    with pytest.raises(ValueError):
        unpack_ids(b"\0\0\0\0\0")


def test_whether_a_refusal_may_be_tried_again_follows_from_its_code_and_is_not_sent() -> None:
    failed = wire.Failed(request=1, code="overloaded", message="Later.")
    assert failed.retryable
    assert b"retryable" not in msgspec.json.encode(failed)
    assert not wire.Failed(request=1, code="invalid_request", message="Never.").retryable
