"""Stop strings over token bytes, against plain search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentspeed_engine.exec.stops import StopAutomaton, StopWatch

TEXT = st.binary(max_size=40).map(lambda data: bytes(byte % 3 + 97 for byte in data))
STOPS = st.lists(TEXT.filter(bool).map(lambda data: data[:4]), min_size=1, max_size=4)


@given(stops=STOPS, tokens=st.lists(TEXT.map(lambda data: data[:5]), max_size=15))
def test_a_turn_ends_with_the_token_that_completes_a_stop_string(stops: list[bytes], tokens: list[bytes]) -> None:
    watch = StopWatch(tuple(stops))
    before = b""
    for index, token in enumerate(tokens):
        known = len(before)
        before += token
        ends_here = any(before.find(stop, max(0, known - len(stop) + 1)) >= 0 and len(token) > 0 for stop in stops)
        assert watch.saw(index, token) == ends_here
        if ends_here:
            return


def test_a_stop_string_may_span_tokens() -> None:
    watch = StopWatch((b"</end>",))
    assert [watch.saw(index, token) for index, token in enumerate((b"a <", b"/en", b"d", b"> b"))] == [
        False, False, False, True,
    ]  # fmt: skip


def test_a_stop_string_inside_a_longer_one_is_found() -> None:
    automaton = StopAutomaton((b"abcd", b"bc"))
    assert automaton.feed(StopAutomaton.START, b"xabc")[1]


def test_a_token_drawn_again_replaces_what_was_drawn_in_its_place() -> None:
    watch = StopWatch((b"ab",))
    assert not watch.saw(0, b"a")
    assert watch.saw(1, b"b")
    assert not watch.saw(1, b"c"), "the first draw of this place was not taken"
    assert not watch.saw(2, b"b")
    assert not watch.saw(0, b"x")
    assert not watch.saw(1, b"b")
