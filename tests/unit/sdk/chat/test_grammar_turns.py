"""The grammar of a turn accepts what the turn may say, refuses the rest, and always comes to an end."""

from __future__ import annotations

import datetime
import json
import random
import uuid
from typing import Annotated, Any, ClassVar, Literal

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from pydantic import BaseModel, Field, TypeAdapter

from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.output import Choice, Regex, Schema, output_spec
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.tags import Tags
from agentspeed.errors import InvalidRequest, OutputError, SchemaUnsupported
from agentspeed.tools import Bounds, tools_from
from agentspeed.tools.grammars import check_grammar

END = 256
OPEN_ID, CLOSE_ID = 257, 258


class Bytes:
    """A vocabulary of the 256 bytes, an end, and the two call marks as special tokens."""

    eos_token_id = END
    bos_token_id = None
    tokens: ClassVar = [bytes([number]) for number in range(256)] + [b"<|end|>", b"<tool_call>", b"</tool_call>"]
    special_token_ids: ClassVar = [END, OPEN_ID, CLOSE_ID]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=259)


def accepts(source: str | None, text: str) -> bool:
    """Whether `text` is a whole turn under the grammar."""
    assert source is not None
    matcher = LLMatcher(TOKENIZER, source)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def now() -> str:
    """Say the time."""
    return ""


def note(text: str, kind: Literal["x", "y"] = "x") -> None:
    """Keep a note."""


TOOLS = tools_from([add, now, note])
ADD = '<tool_call>{"name":"add","arguments":{"a":1,"b":-2}}</tool_call>'
NOW = '<tool_call>{"name":"now","arguments":{}}</tool_call>'


@pytest.mark.parametrize("text", ["", "hello", "a < b <tool_c", ADD, ADD + NOW, "I will add. " + ADD])
def test_auto_allows_text_calls_and_text_before_calls(text: str) -> None:
    assert accepts(turn_grammar(tools=TOOLS), text)


@pytest.mark.parametrize(
    "text",
    [
        ADD + "then text",
        ADD.replace("add", "sub"),
        ADD.replace("1", '"1"'),
        ADD.replace(",", ", "),
        '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>',
        '<tool_call>{"name":"add","arguments":{"a":1,"b":12345678901234567890}}</tool_call>',
        "<tool_call>",
    ],
)
def test_once_opened_a_call_is_exact(text: str) -> None:
    assert not accepts(turn_grammar(tools=TOOLS), text)


def test_required_forbids_text_and_a_name_forbids_other_tools() -> None:
    required, named = turn_grammar(tools=TOOLS, tool_choice="required"), turn_grammar(tools=TOOLS, tool_choice="now")
    assert (accepts(required, ADD + NOW), accepts(required, "hello")) == (True, False)
    assert (accepts(named, NOW), accepts(named, ADD)) == (True, False)


def test_none_forbids_the_mark_but_not_text() -> None:
    source = turn_grammar(tools=TOOLS, tool_choice="none")
    assert (accepts(source, "hello"), accepts(source, NOW)) == (True, False)


def test_parallel_calls_are_counted() -> None:
    one, two = turn_grammar(tools=TOOLS, parallel_calls=1), turn_grammar(tools=TOOLS, parallel_calls=2)
    assert (accepts(one, NOW), accepts(one, NOW * 2)) == (True, False)
    assert (accepts(two, NOW * 2), accepts(two, NOW * 3)) == (True, False)


def test_a_call_inside_reasoning_is_thought_and_not_a_call() -> None:
    source = turn_grammar(tools=TOOLS, reasoning=True)
    assert accepts(source, "<think>perhaps <tool_call> or not</think>hello")
    assert accepts(source, f"<think>so</think>{ADD}")
    assert accepts(source, "hello")
    assert not accepts(source, "<think>never closed")


def test_marks_that_are_special_tokens_are_named_by_id() -> None:
    source = turn_grammar(tools=TOOLS, tags=Tags(ids={"<tool_call>": OPEN_ID, "</tool_call>": CLOSE_ID}))
    assert source is not None
    matcher = LLMatcher(TOKENIZER, source)
    ids = [*b"so ", OPEN_ID, *b'{"name":"now","arguments":{}}', CLOSE_ID]
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


def test_a_special_mark_spelt_out_in_ordinary_tokens_is_no_text_either() -> None:
    tags = Tags(ids={"<tool_call>": OPEN_ID, "</tool_call>": CLOSE_ID})
    for choice in ("auto", "none"):
        source = turn_grammar(tools=TOOLS, tool_choice=choice, tags=tags)
        assert accepts(source, "a <tool_call")
        assert not accepts(source, "a <tool_call> b")


def test_nothing_to_constrain_is_no_grammar() -> None:
    assert turn_grammar() is None


def test_a_choice_that_cannot_be_is_an_error_with_the_names() -> None:
    with pytest.raises(InvalidRequest, match="they are: add, now, note"):
        _ = turn_grammar(tools=TOOLS, tool_choice="subtract")
    with pytest.raises(InvalidRequest, match="there are no tools"):
        _ = turn_grammar(tool_choice="required")
    with pytest.raises(InvalidRequest, match="parallel_calls is 0"):
        _ = turn_grammar(tools=TOOLS, parallel_calls=0)


class City(BaseModel):
    name: str
    people: int
    tags: list[str] = []
    where: tuple[float, float] | None = None


def test_a_model_is_compact_json_that_comes_back_as_the_model() -> None:
    spec = output_spec(City)
    assert isinstance(spec, Schema)
    text = '{"name":"Bern","people":134000,"tags":["a"],"where":[46.9,7.4]}'
    assert accepts(turn_grammar(output=spec), text)
    assert spec.decode(text) == City(name="Bern", people=134000, tags=["a"], where=(46.9, 7.4))
    assert not accepts(turn_grammar(output=spec), text.replace(":", ": "))


def test_an_output_may_be_had_after_calls_in_the_same_run() -> None:
    source = turn_grammar(tools=TOOLS, output=output_spec(City))
    assert accepts(source, ADD)
    assert accepts(source, '{"name":"Bern","people":1}')
    assert not accepts(source, "hello")


def test_types_json_schemas_regexes_and_choices_are_outputs() -> None:
    assert accepts(turn_grammar(output=output_spec(list[int])), "[1,2]")
    assert accepts(turn_grammar(output=output_spec({"type": "boolean"})), "true")
    assert accepts(turn_grammar(output=Regex(r"^[a-z]+/\d{2}$")), "ab/12")
    assert not accepts(turn_grammar(output=Regex("a+", max_chars=3)), "aaaa")
    assert accepts(turn_grammar(output=Choice('say "no"', "yes\n")), "yes\n")
    assert not accepts(turn_grammar(output=Choice("yes")), "ye")


@pytest.mark.parametrize("given", [Regex("(?=a)b"), Regex("(a")])
def test_a_regex_that_no_grammar_can_express_is_refused_before_the_turn(given: Regex) -> None:
    with pytest.raises(SchemaUnsupported, match="invalid regex"):
        _ = turn_grammar(output=given)


@pytest.mark.parametrize("given", [3, "yes", ["a"]])
def test_a_value_is_not_a_shape(given: object) -> None:
    with pytest.raises(SchemaUnsupported):
        _ = output_spec(given)


def test_text_cut_short_is_an_output_error_that_keeps_the_text() -> None:
    for spec, text in ((Schema(City), '{"name":"B'), (Schema.json({"type": "null"}), "nu"), (Choice("yes"), "ye")):
        with pytest.raises(OutputError) as caught:
            _ = spec.decode(text)
        assert caught.value.text == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (datetime.datetime, '"2026-01-02T03:04:05Z"'),
        (uuid.UUID, '"12345678-1234-5678-1234-567812345678"'),
        (tuple[int, str], '[1,"a"]'),
        (Annotated[str, Field(min_length=2000)], f'"{"a" * 2000}"'),
        (dict[str, list[int]], '{"a":[1]}'),
        (Literal["p", 3], "3"),
    ],
)
def test_everyday_types_have_a_grammar_and_decode(kind: Any, text: str) -> None:
    spec = Schema(kind)
    assert accepts(turn_grammar(output=spec), text)
    assert spec.decode(text) == TypeAdapter(kind).validate_json(text)


SMALL = Bounds(string_chars=6, array_items=3, map_entries=2, key_chars=4)
SHAPES: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "number"},
    {"type": "integer"},
    {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": [1, "x", None]}}, "required": ["b"]},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[ab]*$"}]},
    {"type": ["boolean", "number"]},
    {"type": "string", "format": "date"},
]


def written_by_chance(source: str, seed: int) -> str:
    """What the worst model writes: any byte that the grammar allows, the end only when nothing else is left."""
    draw = random.Random(seed)
    matcher = LLMatcher(TOKENIZER, source)
    written = bytearray()
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(256) if mask[token // 8] >> (token % 8) & 1]
        if not allowed:
            break
        token = draw.choice(allowed)
        assert matcher.consume_token(token)
        written.append(token)
        assert len(written) < 2000
    assert matcher.is_accepting()
    return written.decode()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: json.dumps(shape)[:50])
def test_a_writer_that_never_chooses_to_end_comes_to_an_end_with_valid_json(shape: dict[str, Any]) -> None:
    source = turn_grammar(output=Schema.json(shape, bounds=SMALL))
    assert source is not None
    for seed in range(4):
        _ = json.loads(written_by_chance(source, seed))


def test_what_the_grammar_lets_through_the_parser_reads_back() -> None:
    source = turn_grammar(tools=TOOLS, tool_choice="note", parallel_calls=2, bounds=SMALL)
    assert source is not None
    for seed in range(10):
        written = written_by_chance(source, seed)
        parser = TurnParser()
        pieces = [*parser.feed(written), *parser.finish()]
        calls = [piece for piece in pieces if isinstance(piece, CallReady)]
        assert len(calls) == 2
        for call in calls:
            _ = TOOLS[2].arguments.model_validate_json(call.arguments)


def test_a_grammar_is_checked_by_its_library_once_however_many_turns_use_it() -> None:
    source = turn_grammar(output=Schema.json({"type": "object", "properties": {"seen_once": {"type": "integer"}}}))
    assert source is not None
    before = check_grammar.cache_info()
    for _ in range(5):
        assert turn_grammar(output=Schema.json({"type": "object", "properties": {"seen_once": {"type": "integer"}}}))
    after = check_grammar.cache_info()
    assert after.misses == before.misses
    assert after.hits >= before.hits + 5
