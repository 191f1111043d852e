"""However a turn's text is split, the pieces are the same and no piece holds part of a mark."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed.chat.parser import (
    CallBroken,
    CallDelta,
    CallOpened,
    CallReady,
    Piece,
    ReasoningPiece,
    TextPiece,
    TurnParser,
)
from agentspeed.errors import InvalidRequest

CALL = '<tool_call>{"name":"add","arguments":{"a":1,"b":[2]}}</tool_call>'
TRICKY = '<tool_call>{"name":"say","arguments":{"text":"</tool_call> } \\" <think>"}}</tool_call>'


def parse(chunks: Iterable[str], *, reasoning: bool = True) -> list[Piece]:
    parser = TurnParser(reasoning=reasoning)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    return [*pieces, *parser.finish()]


def summary(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Kinds and joined contents: what must not depend on the split."""
    joined: list[tuple[str, str]] = []
    for piece in pieces:
        match piece:
            case TextPiece(text) | ReasoningPiece(text):
                kind, content = type(piece).__name__, text
            case CallOpened(index, name):
                kind, content = f"opened {index}", name
            case CallDelta(index, arguments):
                kind, content = f"delta {index}", arguments
            case CallReady(index, name, arguments):
                kind, content = f"ready {index}", f"{name}{arguments}"
            case CallBroken(index, raw, _):
                kind, content = f"broken {index}", raw
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + content)
        else:
            joined.append((kind, content))
    return joined


def test_text_reasoning_and_calls_come_apart() -> None:
    assert parse([f"<think>hm</think>Adding. {CALL}{CALL}"]) == [
        ReasoningPiece("hm"),
        TextPiece("Adding. "),
        CallOpened(0, "add"),
        CallDelta(0, '{"a":1,"b":[2]}'),
        CallReady(0, "add", '{"a":1,"b":[2]}'),
        CallOpened(1, "add"),
        CallDelta(1, '{"a":1,"b":[2]}'),
        CallReady(1, "add", '{"a":1,"b":[2]}'),
    ]


def test_a_mark_inside_a_json_string_is_part_of_the_string() -> None:
    assert parse([TRICKY + "after"])[-2:] == [
        CallReady(0, "say", '{"text":"</tool_call> } \\" <think>"}'),
        TextPiece("after"),
    ]


@pytest.mark.parametrize("said", ["", '{"na', '{"name":"add","arguments":{"a":1', '{"name":5}', "{}</tool_"])
def test_a_call_that_the_end_cut_is_told_from_one_that_was_never_right(said: str) -> None:
    (cut,) = (piece for piece in parse([f"<tool_call>{said}"]) if isinstance(piece, CallBroken))
    assert cut.cut
    (wrong,) = (piece for piece in parse(["<tool_call>{}</tool_call>"]) if isinstance(piece, CallBroken))
    assert not wrong.cut


def test_what_only_looks_like_a_mark_is_text() -> None:
    text = "a < b <tool_ <thin <<tool_call"
    assert summary(parse(list(text))) == [("TextPiece", text)]


def test_a_reasoning_mark_counts_only_at_the_start() -> None:
    assert summary(parse(["a<think>b</think>"])) == [("TextPiece", "a<think>b</think>")]
    assert summary(parse(["<think>b</think>"], reasoning=False)) == [("TextPiece", "<think>b</think>")]


def test_a_template_may_open_the_reasoning_itself() -> None:
    parser = TurnParser(starts_thinking=True)
    assert parser.feed("hm</think>yes") == [ReasoningPiece("hm"), TextPiece("yes")]


def test_arguments_arrive_while_the_call_is_open() -> None:
    parser = TurnParser()
    assert parser.feed('<tool_call>{"name":"f","arguments":{"a":') == [CallOpened(0, "f"), CallDelta(0, '{"a":')]
    assert parser.feed('"x<') == [CallDelta(0, '"x<')]


def test_a_call_with_spaces_and_no_arguments_is_read() -> None:
    spaced = '<tool_call>\n{ "name": "f", "arguments": {"a": 1} }\n</tool_call>'
    assert parse([spaced])[-1] == CallReady(0, "f", '{"a": 1}')
    assert parse(['<tool_call>{"name":"f"}</tool_call>']) == [CallReady(0, "f", "{}")]
    assert parse(['<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>']) == [CallReady(0, "f", '{"a":1}')]


@pytest.mark.parametrize(
    "raw", ["", "add(1)", "[1]", '{"name":3}', '{"name":"f","arguments":[1]}', '{"name":"f","arguments":{"a":']
)
def test_what_is_not_a_call_is_broken_and_keeps_its_text(raw: str) -> None:
    last = parse([f"<tool_call>{raw}</tool_call>"])[-1]
    assert isinstance(last, CallBroken)
    assert last.raw == raw


def test_a_turn_cut_inside_a_call_says_so() -> None:
    last = parse(['<tool_call>{"name":"f","arguments":{"a":1'])[-1]
    assert isinstance(last, CallBroken)
    assert "cut short" in last.why


def test_a_whole_call_without_its_closing_mark_is_a_call() -> None:
    assert parse(['<tool_call>{"name":"f","arguments":{}}</tool_'])[-1] == CallReady(0, "f", "{}")


def test_a_parser_serves_one_turn() -> None:
    parser = TurnParser()
    _ = parser.finish()
    with pytest.raises(InvalidRequest, match="one turn"):
        _ = parser.feed("x")


PARTS = st.sampled_from(
    [
        "text ",
        "<",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        CALL,
        TRICKY,
        '{"name":"f"',
        "é😀",
        '"',
        "\\",
        "}",
        " \n",
    ]
)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PARTS, max_size=6), cuts=st.lists(st.integers(0, 300), max_size=12), reasoning=st.booleans())
def test_the_split_never_changes_what_is_read(parts: list[str], cuts: list[int], reasoning: bool) -> None:
    text = "".join(parts)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    chunks = [text[start:end] for start, end in pairwise(places)]
    assert summary(parse(chunks, reasoning=reasoning)) == summary(parse([text], reasoning=reasoning))


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(PARTS, max_size=6), reasoning=st.booleans())
def test_no_piece_of_a_turn_fed_by_characters_holds_a_whole_opening_mark(parts: list[str], reasoning: bool) -> None:
    for piece in parse("".join(parts), reasoning=reasoning):
        if isinstance(piece, TextPiece):
            assert "<tool_call>" not in piece.text
        if isinstance(piece, ReasoningPiece):
            assert "</think>" not in piece.text


@pytest.mark.parametrize("word", ["NaN", "-Infinity"])
def test_what_only_python_takes_for_a_number_breaks_a_call(word: str) -> None:
    (last,) = parse([f'<tool_call>{{"name":"add","arguments":{{"a":{word}}}}}</tool_call>'])[-1:]
    assert isinstance(last, CallBroken) and word in last.why
