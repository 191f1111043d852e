"""Nothing that a schema says is lost on the way to the grammar: it is enforced, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field, Json

from agentspeed.chat.output import Schema
from agentspeed.errors import SchemaUnsupported
from agentspeed.tools import Bounds
from agentspeed.tools.schema import compile_schema
from tests.schema_texts import accepts

SMALL = {"A": {"type": "integer", "minimum": 0}, "B": {"$ref": "#/$defs/A", "maximum": 50}}
PAIR = {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "allowed", "forbidden"),
    [
        ({"type": "integer", "enum": [1, 20], "maximum": 5}, [1], [20]),
        ({"type": ["string", "null"], "enum": ["a", "long", 3, None], "maxLength": 1}, ["a", None], ["long", 3]),
        ({"enum": [1, True, "x"], "const": 1}, [1], [True, "x"]),
        ({"type": "boolean", "enum": [True, 1]}, [True], [1]),
        ({"enum": [[1], [1, 2], "ab"], "minItems": 2}, [[1, 2], "ab"], [[1]]),
        ({"$ref": "#/$defs/A", "maximum": 5, "$defs": SMALL}, [0, 5], [6, 99, -1]),
        ({"$ref": "#/$defs/B", "minimum": 7, "$defs": SMALL}, [7, 50], [6, 51]),
        ({"$ref": "#/$defs/A", "enum": [-1, 4], "$defs": SMALL}, [4], [-1]),
        ({"allOf": [{"$ref": "#/$defs/A"}], "maximum": 5, "$defs": SMALL}, [5], [6]),
        ({"allOf": [{"type": "integer", "maximum": 9}, {"minimum": 3}], "maximum": 5}, [3, 5], [2, 6]),
        ({"type": "integer", "anyOf": [{"maximum": 1}, {"minimum": 9}]}, [1, 9], [5]),
        ({"type": ["integer", "null"], "anyOf": [{"type": "number"}, {"type": "null"}]}, [1, None], ["a"]),
        ({**PAIR, "minProperties": 1}, [{"a": None}, {"b": None}, {"a": None, "b": None}], [{}]),
        ({**PAIR, "maxProperties": 1}, [{"a": None}, {"b": None}, {}], [{"a": None, "b": None}]),
        ({**PAIR, "additionalProperties": {"type": "string"}}, [{"a": None, "x": ""}], [{"a": ""}, {"x": None}]),
        ({"type": "array", "contains": {"const": 1}}, [[1], [2, 1, 2]], [[], [2]]),
        ({"enum": ["a", "b", "ab"], "pattern": "a"}, ["a", "ab"], ["b"]),
        ({"enum": [4, 5], "multipleOf": 2}, [4], [5]),
        ({"allOf": [PAIR, {"additionalProperties": False}]}, [{}], [{"a": None}]),
        ({"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b"}]}, ["ab", "bca"], ["a", "b"]),
        ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, [6], [5]),
        ({**PAIR, "required": ["a"], "minProperties": 1, "maxProperties": 2}, [{"a": None}], [{}, {"b": None}]),
        ({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1}, [{"k": None}], [{}]),
        ({"type": "array", "prefixItems": [{"type": "null"}] * 2, "maxItems": 1}, [[], [None]], [[None, None]]),
    ],
)
def test_what_stands_beside_another_keyword_holds(schema: Any, allowed: list[Any], forbidden: list[Any]) -> None:
    assert [value for value in allowed if not accepts(schema, value)] == []
    assert [value for value in forbidden if accepts(schema, value)] == []


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({**PAIR, "minProperties": "1"}, "minProperties '1'"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2}, "minProperties 2"),
        ({"type": "array", "contains": {"const": 1}, "allOf": [{"contains": {"const": 2}}]}, "contains in two places"),
        ({"type": "integer", "not": {"multipleOf": 2}}, "excludes values by multipleOf"),
        ({"const": 3, "minimum": 5}, "No value is allowed"),
        ({"enum": []}, "No value is allowed"),
        ({"$ref": "#/$defs/A", "type": "string", "$defs": SMALL}, "No value is allowed"),
        ({"oneOf": [{"type": "null"}, {"type": "null"}]}, "No value is allowed"),
        ({"type": "string", "pattern": "(?<=a)b"}, "looks behind"),
        ({"type": "string", "pattern": r"a\bb"}, r"it uses \\b"),
        ({"type": "strin"}, "type 'strin'"),
        ({"type": "integer", "minimum": "5"}, "minimum '5'"),
        ({"$ref": "#"}, "refers to itself"),
        (
            {"$ref": "#/$defs/T", "$defs": {"T": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/T"}}}},
            "within 6 levels",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name_with_a_remedy(schema: Any, told: str) -> None:
    with pytest.raises(SchemaUnsupported, match=told) as refused:
        _ = Schema.json(schema)
    assert refused.value.remedy


def test_what_is_said_to_people_goes_on_working_everywhere() -> None:
    class Inner(BaseModel):
        x: int = Field(1, title="X", description="a number", examples=[1], deprecated=False)

    class Outer(BaseModel):
        inner: Inner = Field(Inner(), description="beside a reference")
        more: Json[int] = Field(2, description="a text that holds JSON")
        kind: str = Field("a", json_schema_extra={"x-order": 1, "example": "a", "readOnly": True, "$comment": "c"})

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "o", **Outer.model_json_schema()}
    assert accepts(schema, {"inner": {"x": 5}, "more": "3", "kind": "b"})


@pytest.mark.parametrize("keyword", ["maxLength", "items", "properties", "format"])
def test_a_keyword_of_another_type_means_nothing(keyword: str) -> None:
    assert accepts({"type": "integer", keyword: 3}, 12345)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: compile_schema(3), "The schema is 3"),  # type: ignore[arg-type]
        (lambda: Schema(list[int], bounds=3), "bounds is 3; it must be a Bounds"),  # type: ignore[arg-type]
        (lambda: Bounds(string_chars=0), "Bounds string_chars is 0; it must be a whole number from 1 to"),
        (lambda: Bounds(array_items=1.5), "Bounds array_items is 1.5"),  # type: ignore[arg-type]
        (lambda: Bounds(nesting=100), "Bounds nesting is 100; it must be a whole number from 1 to 32"),
    ],
)
def test_a_wrong_schema_or_bound_is_named(make: Any, told: str) -> None:
    with pytest.raises(SchemaUnsupported, match=told):
        _ = make()
