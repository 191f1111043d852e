"""The outbox: order, coalescing, bounds."""

from __future__ import annotations

import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol.frames import BadFrame, encode_command, outbox_reader
from agentspeed_engine.protocol.messages import (
    Done,
    GetStats,
    Hello,
    Outgoing,
    Tokens,
    TopLogprob,
    TurnEnded,
    TurnStarted,
    TurnUsage,
)
from agentspeed_engine.protocol.token_ids import pack_ids, unpack_ids
from agentspeed_engine.serve.connections import Link, coalesce

MESSAGES = st.lists(
    st.one_of(
        st.builds(
            lambda branch, ids: Tokens(
                branch=branch,
                ids=pack_ids(ids),
                logprobs=tuple(map(float, ids)),
                draw_logprobs=tuple(float(number) / 2 for number in ids),
            ),
            st.integers(1, 3),
            st.lists(st.integers(0, 9), min_size=1, max_size=3),
        ),
        st.builds(lambda branch: TurnStarted(branch=branch, usage=TurnUsage()), st.integers(1, 3)),
        st.builds(
            lambda branch: TurnEnded(branch=branch, reason="stop_id", known=1, usage=TurnUsage()), st.integers(1, 3)
        ),
        st.builds(lambda request: Done(request=request), st.integers(1, 9)),
    ),
    max_size=30,
)


def story(messages: list[Outgoing], branch: int) -> list[object]:
    """What one branch's reader learns, in order, whatever the frames."""
    told: list[object] = []
    for message in messages:
        if isinstance(message, Tokens) and message.branch == branch:
            told += zip(unpack_ids(message.ids), message.logprobs, message.draw_logprobs, strict=True)
        elif getattr(message, "branch", None) == branch:
            told.append(message)
    return told


@given(MESSAGES)
def test_coalescing_changes_no_branchs_story_and_loses_no_other_message(messages: list[Outgoing]) -> None:
    joined = coalesce(messages)
    for branch in (1, 2, 3):
        assert story(joined, branch) == story(messages, branch)
    assert [m for m in joined if not isinstance(m, Tokens)] == [m for m in messages if not isinstance(m, Tokens)]


@given(MESSAGES)
def test_coalescing_leaves_one_delta_between_two_other_messages_of_a_branch(messages: list[Outgoing]) -> None:
    joined = coalesce(messages)
    for branch in (1, 2, 3):
        kinds = [isinstance(m, Tokens) for m in joined if getattr(m, "branch", None) == branch]
        assert not any(first and second for first, second in pairwise(kinds))


@pytest.fixture
def pair() -> tuple[Link, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Link(LinkId(1), ours, outbox_bytes=8192), theirs


def test_a_reader_that_takes_nothing_costs_a_bounded_number_of_messages(pair: tuple[Link, socket.socket]) -> None:
    link, theirs = pair
    with link.socket, theirs:
        top = (TopLogprob(id=1, logprob=-1.0),)
        for number in range(100_000):
            link.put(
                Tokens(
                    branch=number % 4,
                    ids=pack_ids([number % 512]),
                    logprobs=(-0.5,),
                    top=(top,),
                    draw_logprobs=(-0.25,),
                )
            )
            if number % 50 == 0:
                assert link.write()
        assert len(link._pending) <= 512
        assert not link.behind, "what the engine has to say keeps nobody from asking"
        for request in range(2000):
            link.put(Done(request=request))
        assert link.behind
        got: list[Outgoing] = []
        theirs.settimeout(5)
        reader = outbox_reader()
        while link.has_output or reader.pending_bytes:
            assert link.write()
            reader.feed(theirs.recv(1 << 20))
            for frame in reader:
                got += frame
        assert not link.behind
    for branch in range(4):
        told = story(got, branch)
        assert told == [(number % 512, -0.5, -0.25) for number in range(branch, 100_000, 4)]


def test_frames_arrive_whole_however_they_are_cut(pair: tuple[Link, socket.socket]) -> None:
    link, theirs = pair
    with link.socket, theirs:
        commands = [Hello(request=1), GetStats(request=2), GetStats(request=3)]
        data = b"".join(map(encode_command, commands))
        got = []
        for start in range(0, len(data), 5):
            theirs.sendall(data[start : start + 5])
            got += link.read() or []
        assert got == commands
        assert list(link.read() or ["the peer is gone"]) == []
        theirs.close()
        assert link.read() is None


def test_commands_before_what_is_no_frame_are_taken_though_they_came_with_it(pair: tuple[Link, socket.socket]) -> None:
    link, theirs = pair
    with link.socket, theirs:
        theirs.sendall(encode_command(Hello(request=1)) + encode_command(GetStats(request=2)) + b"\xff\xff\xff\xff")
        commands = link.read()
        assert commands is not None
        assert (next(commands), next(commands)) == (Hello(request=1), GetStats(request=2))
        with pytest.raises(BadFrame):
            _ = next(commands)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        framed(b"\xc1"),
        framed(b"\x91\xa1"),
        pytest.param(framed(b"\x94\xa5Hello\x01\x01\xa2\xff\xfe"), id="a text that is no UTF-8"),
        pytest.param(framed(b"\x91" * 30_000), id="nested deeper than any message"),
        pytest.param(framed(b"\x95\xa5Hello\x01\x01\xa0" + b"\x91" * 30_000), id="nested behind a good message"),
    ],
)
def test_what_is_no_frame_is_refused(pair: tuple[Link, socket.socket], data: bytes) -> None:
    link, theirs = pair
    with link.socket, theirs:
        theirs.sendall(data)
        with pytest.raises(BadFrame):
            _ = list(link.read() or ())
