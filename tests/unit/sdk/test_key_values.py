"""Values without a mark of what they are: read as the kinds say that the schema allows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from agentspeed.chat.calls import CallFormat, Keys
from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.tags import Tags
from agentspeed.tools import Tool, declared_tool
from tests.schema_texts import BYTES, takes

WORDS = (("true", "True"), ("false", "False"), ("null", "None"))
KEYS = Keys(key_open="<p=", text_open=">\n", json_open=">\n", value_close="\n</p>\n", joint="", words=WORDS)
FORM = CallFormat(
    kind="keys", call_open="<tool_call>", name_end="\n", call_close="</tool_call>", spaced=True, keys=KEYS
)
EITHER = {"type": ["string", "integer"]}
PATTERN = {"type": "string", "pattern": "^."}
REFERENCE = {"$ref": "#/$defs/text"}
NESTED = {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}, {"type": "array", "items": {"type": "integer"}}]}


def act(schema: dict[str, Any]) -> Tool:
    defs = {"text": {"type": "string"}}
    parameters = {"type": "object", "properties": {"v": schema}, "required": ["v"], "$defs": defs}
    return declared_tool({"name": "act", "parameters": parameters}, print)


def call(text: str) -> str:
    return f"<tool_call>act\n<p=v>\n{text}\n</p>\n</tool_call>"


def read(schema: dict[str, Any], text: str) -> Any:
    parser = TurnParser(Tags(calls=FORM), tools={"act": act(schema).schema})
    (found,) = (one for one in [*parser.feed(call(text)), *parser.finish()] if isinstance(one, CallReady))
    return json.loads(found.arguments)["v"]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (EITHER, "5", 5),
        (EITHER, "5.0", 5),
        (EITHER, "5.5", "5.5"),
        (EITHER, '"5"', "5"),
        (EITHER, " 5\t", 5),
        (EITHER, "\u00a05", "\u00a05"),
        (EITHER, "None", "None"),
        (EITHER, "true", "true"),
        (EITHER, "[1]", "[1]"),
        (EITHER, '{"a": "', '{"a": "'),
        (EITHER, "05", "05"),
        ({"type": ["string", "number"]}, "1e3", 1000),
        ({"type": ["string", "number"]}, "1e400", "1e400"),
        ({"type": ["string", "number"]}, "NaN", "NaN"),
        ({"type": ["string", "number"]}, "-Infinity", "-Infinity"),
        ({"oneOf": [{"type": "string"}, {"type": "boolean"}]}, "True", True),
        ({"oneOf": [{"type": "string"}, {"type": "boolean"}]}, "false", False),
        ({"oneOf": [{"type": "string"}, {"type": "boolean"}]}, "None", "None"),
        (NESTED, "null", None),
        (NESTED, "None", None),
        (NESTED, "[1]", [1]),
        (NESTED, "[1", "[1"),
        (NESTED, "5", "5"),
        (PATTERN, "5", "5"),
        (PATTERN, "null", "null"),
        (PATTERN, "[1]", "[1]"),
        (PATTERN, '"5"', "5"),
        (PATTERN, "", ""),
        (REFERENCE, "5", "5"),
        (REFERENCE, "True", "True"),
        (REFERENCE, '"5"', '"5"'),
        ({"type": "string", "format": "date"}, "2026-01-02", "2026-01-02"),
        ({"type": "string", "description": "any", "format": "of-our-own"}, '"5"', '"5"'),
        ({"enum": ["5", 5, None]}, "5", 5),
        ({"enum": ["a", "b\n</p>"]}, '"b\\n</p>"', "b\n</p>"),
        ({"type": "integer"}, "several", "several"),
        ({"type": "number"}, "1e400", "1e400"),
    ],
    ids=repr,
)
def test_a_value_is_read_as_its_schema_allows(schema: dict[str, Any], text: str, value: object) -> None:
    found = read(schema, text)
    assert (found, type(found) is str) == (value, type(value) is str)


@pytest.mark.parametrize("schema", [REFERENCE, {"allOf": [REFERENCE, {"minLength": 1}]}, {"const": "5"}], ids=repr)
def test_a_text_of_which_nothing_more_is_said_needs_no_quotes_wherever_that_is_said(schema: dict[str, Any]) -> None:
    source = turn_grammar(tools=[act(schema)], tool_choice="act", parallel_calls=1, tags=Tags(calls=FORM))
    grammar = LLMatcher(BYTES, source, log_level=0)
    assert takes(grammar, call("5"))
    assert read(schema, "5") == "5"


def test_what_no_schema_speaks_of_is_json_where_it_can_be() -> None:
    assert [read({}, text) for text in ("5", "five", "None", "[1")] == [5, "five", None, "[1"]
    parser = TurnParser(Tags(calls=FORM))
    pieces = [*parser.feed(call("5")), *parser.finish()]
    assert [piece.arguments for piece in pieces if isinstance(piece, CallReady)] == ['{"v": 5}']


MARKED = CallFormat(
    kind="keys",
    call_open="<invoke>",
    name_end="\n",
    call_close="</invoke>",
    spaced=True,
    keys=Keys(key_open="<p ", text_open=" text>", json_open=" json>", value_close="</p>", joint=""),
)


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, " text>hello</p>", "hello"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, " text>null</p>", "null"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, " json>null</p>", None),
        (EITHER, " text>5</p>", "5"),
        (EITHER, " json>5</p>", 5),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "array", "items": {"type": "integer"}}]}, " text>b</p>", "b"),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "array", "items": {"type": "integer"}}]}, " json>[1]</p>", [1]),
    ],
)
def test_a_text_among_other_values_is_bare_where_its_mark_says_that_it_is_one(
    schema: dict[str, Any], written: str, value: object
) -> None:
    """As DeepSeek-V3.2 writes an optional text."""
    raw = f"<invoke>act\n<p v{written}</invoke>"
    source = turn_grammar(tools=[act(schema)], tool_choice="required", tags=Tags(calls=MARKED))
    assert source is not None
    assert takes(LLMatcher(BYTES, source), raw)
    parser = TurnParser(Tags(calls=MARKED), tools={"act": act(schema).schema})
    (found,) = (one for one in [*parser.feed(raw), *parser.finish()] if isinstance(one, CallReady))
    assert json.loads(found.arguments) == {"v": value}
