"""Arguments as families write them: whatever can be written is an instance of the schema, and read back as it is."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from llguidance import LLMatcher

from agentspeed.chat.calls import CallFormat, Keys
from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.tags import Tags
from agentspeed.errors import SchemaUnsupported
from agentspeed.tools import Bounds, Tool, declared_tool, tool
from agentspeed.tools.grammars import check_grammar, schema_source
from agentspeed.tools.schema import compile_schema
from tests.schema_texts import BYTES, is_instance, random_text, takes

SMALL = Bounds(string_chars=5, array_items=3, map_entries=3, key_chars=3, nesting=3)
ALIKE = Keys(key_open="<key>", text_open="</key><value>", json_open="</key><value>", value_close="</value>", joint="")
TOLD = Keys(key_open="<p n=", text_open=" text>", json_open=" json>", value_close="</p>", joint="")
FORMS = {
    "compact": CallFormat(),
    "spaced": CallFormat(call_open='<tool_call>{"name": "', name_end='", "arguments": ', spaced=True),
    "keys alike": CallFormat(
        kind="keys", call_open="<tool_call>", name_end="\n", call_close="</tool_call>", spaced=True, keys=ALIKE
    ),
    "keys told": CallFormat(
        kind="keys", call_open="<tool_call>", name_end="\n", call_close="</tool_call>", spaced=True, keys=TOLD
    ),
}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}}, "required": ["x"]}
NULLS = {
    "type": "object",
    "properties": {"p": {"type": "null"}, "q": {"type": "null"}, "r": {"type": "null"}},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "values": {
        "properties": {
            "word": {"type": "string"},
            "kind": {"enum": ["a b", "5", "null"]},
            "either": {"type": ["string", "integer", "null"]},
            "points": {"type": "array", "items": POINT},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["word"],
    },
    "references": {
        "properties": {"at": {"$ref": "#/$defs/point"}, "tree": {"$ref": "#/$defs/tree"}},
        "required": ["at"],
        "$defs": {
            "point": POINT,
            "tree": {"type": "object", "properties": {"below": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
        },
    },
    "joined": {
        "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b", "c"]}},
        "allOf": [{"required": ["n"], "properties": {"n": {"minimum": 3}, "s": {"not": {"const": "b"}}}}],
    },
    "a text in one place, and more of it in another": {
        "properties": {"a": {"type": "string"}},
        "allOf": [{"properties": {"a": {"pattern": '^[x"]'}}, "required": ["a"]}],
    },
    "other ways, other values": {
        "type": "object",
        "anyOf": [
            {"properties": {"v": {"type": "string"}}, "required": ["v"]},
            {"properties": {"v": {"enum": ["5", "</value>"]}, "w": {"$ref": "#/$defs/word"}}, "required": ["w"]},
        ],
        "$defs": {"word": {"type": "string", "maxLength": 2}},
    },
    "one of": {
        "properties": {"v": {"oneOf": [{"type": "integer", "minimum": 2}, {"type": "number", "maximum": 5}]}},
        "required": ["v"],
    },
    "inner counts": {
        "properties": {
            "m": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
            "a": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2},
            "c": {"type": "array", "items": {"type": "integer"}, "contains": {"const": 7}, "maxItems": 4},
            "d": {**NULLS, "minProperties": 1, "maxProperties": 2},
            "e": {**NULLS, "dependentRequired": {"p": ["q"]}},
        },
        "required": ["m", "a", "c"],
    },
    "any json": {"properties": {"any": True}, "required": ["any"]},
    "nothing": {"properties": {}},
}


def declared(schema: dict[str, Any]) -> Tool:
    return declared_tool({"name": "act", "parameters": {"type": "object", **schema}}, print)


def calls(form: CallFormat, made: Tool) -> LLMatcher:
    source = turn_grammar(tools=[made], tool_choice="act", parallel_calls=1, tags=Tags(calls=form), bounds=SMALL)
    matcher = LLMatcher(BYTES, source, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def read(form: CallFormat, made: Tool, text: str) -> str:
    parser = TurnParser(Tags(calls=form), tools={made.name: made.schema})
    pieces = [*parser.feed(text), *parser.finish()]
    found = [piece for piece in pieces if isinstance(piece, CallReady)]
    assert len(found) == 1, (text, pieces)
    return found[0].arguments


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_whatever_arguments_can_be_written_are_read_back_as_an_instance(schema: Any, form: CallFormat) -> None:
    made = declared(schema)
    grammar = calls(form, made)
    for seed in range(12):
        text = random_text(grammar.deep_copy(), random.Random(seed))
        arguments = read(form, made, text)
        assert is_instance(made.schema, arguments), (text, arguments)
        if form.keys is None:
            assert arguments in text


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_spaced_grammar_is_the_compact_one_with_spaces(schema: Any) -> None:
    compact, spaced = (
        LLMatcher(BYTES, schema_source(compile_schema({"type": "object", **schema}, SMALL, spaced=yes)), log_level=0)
        for yes in (False, True)
    )
    for seed in range(12):
        text = random_text(spaced.deep_copy(), random.Random(seed))
        strings = re.compile(r'"(?:[^"\\]|\\.)*"')
        bare = strings.sub('""', text)
        assert re.findall(r"[,:](?! )|(?<![,:]) |  ", bare) == [], text
        pieces = re.split(r'("(?:[^"\\]|\\.)*")', text)
        tight = "".join(piece if number % 2 else piece.replace(" ", "") for number, piece in enumerate(pieces))
        assert takes(compact, tight), (text, tight)
        assert tight == text or not takes(spaced, tight)


@pytest.mark.parametrize("form", [FORMS["keys alike"], FORMS["keys told"]], ids=["alike", "told"])
def test_a_json_value_in_which_the_close_of_a_value_is_spelt_out_is_read_whole(form: CallFormat) -> None:
    made = declared({"properties": {"v": {"type": ["string", "integer"]}, "w": {"type": "integer"}}, "required": ["v"]})
    assert form.keys is not None
    close = form.keys.value_close
    said = json.dumps(f'{close}\\"')
    text = f"<tool_call>act\n{form.keys.key_open}v{form.keys.json_open}{said}{close}</tool_call>"
    source = turn_grammar(tools=[made], tool_choice="act", tags=Tags(calls=form))
    assert takes(LLMatcher(BYTES, source, log_level=0), text)
    assert json.loads(read(form, made, text)) == {"v": json.loads(said)}


@pytest.mark.parametrize("form", [FORMS["keys alike"], FORMS["keys told"]], ids=["alike", "told"])
@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "minProperties": 1}, "counts its entries"),
        ({"properties": {"a": {"type": "null"}, "b": {}}, "dependentRequired": {"a": ["b"]}}, "need others"),
        ({}, "names no entries"),
    ],
)
def test_what_cannot_be_written_entry_by_entry_is_refused_by_tool_and_reason(
    form: CallFormat, schema: Any, told: str
) -> None:
    with pytest.raises(SchemaUnsupported, match=told) as refused:
        _ = calls(form, declared(schema))
    assert "act" in str(refused.value)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_several_tools_with_the_same_parameters_keep_their_rules_apart(form: CallFormat) -> None:
    def find(tags: set[str], deep: dict[str, list[int]], most: int = 3) -> None: ...
    def put(tags: list[int], deep: dict[str, list[str]], most: str = "") -> None: ...

    tools = [tool(find), tool(put), tool(name="again")(find)]
    source = turn_grammar(tools=tools, tool_choice="required", parallel_calls=2, tags=Tags(calls=form), bounds=SMALL)
    assert source is not None
    names = [line.partition(":")[0] for line in source.splitlines()[1:]]
    assert len(set(names)) == len(names)
    grammar = LLMatcher(BYTES, source, log_level=0)
    schemas = {one.name: one.schema for one in tools}
    for seed in range(20):
        text = random_text(grammar.deep_copy(), random.Random(seed))
        parser = TurnParser(Tags(calls=form), tools=schemas)
        found = [piece for piece in [*parser.feed(text), *parser.finish()] if isinstance(piece, CallReady)]
        assert found, text
        for call in found:
            schema = json.loads(json.dumps(schemas[call.name]).replace('"uniqueItems": true', '"uniqueItems": false'))
            assert is_instance(schema, call.arguments), text


def test_a_grammar_that_names_tokens_of_a_large_vocabulary_is_checked_too() -> None:
    check_grammar('%llguidance {}\nstart: "a" <[151657]> B <[151658]>\nB: /[0-9]{2}/\n')
    with pytest.raises(SchemaUnsupported):
        check_grammar('%llguidance {}\nstart: "a" <[151657]> B <[151658]>\nB: /(/\n')
