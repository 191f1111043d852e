"""Schemas as outputs: what pydantic's types need, what is checked afterwards, and what is no schema at all."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Annotated, Any, Literal

import pytest
from llguidance import LLMatcher
from pydantic import BaseModel, Field

from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.output import Schema
from agentspeed.errors import OutputError, SchemaUnsupported
from agentspeed.testing import ScriptedEngine
from agentspeed.tools import Bounds, declared_tool
from tests.schema_texts import BYTES, accepts, takes

NAMES = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


def can_write(spec: Schema[Any], text: str) -> bool:
    return takes(LLMatcher(BYTES, turn_grammar(output=spec), log_level=0), text)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (set[int], "[3,1,3]", {1, 3}),
        (dict[Literal["a", "b"], int], '{"b":2}', {"b": 2}),
        (Decimal, '"1.50"', Decimal("1.50")),
        (Any, '{"a":[1,{"b":null}]}', {"a": [1, {"b": None}]}),
        (dict, '{"a":1}', {"a": 1}),
        (tuple[int, str], '[1,"x"]', (1, "x")),
        (Literal[9007199254740993], "9007199254740993", 9007199254740993),
        (Annotated[int, Field(ge=10**16)], "10000000000000000", 10**16),
        (Annotated[float, Field(gt=0, lt=1e-7)], "5.5e-9", 5.5e-9),
    ],
)
def test_types_of_pydantic_are_written_and_read(kind: Any, text: str, value: object) -> None:
    spec: Schema[Any] = Schema(kind)
    assert can_write(spec, text)
    assert spec.decode(text) == value


def test_a_recursive_model_goes_as_deep_as_the_bounds_say() -> None:
    def nested(levels: int) -> str:
        return '{"value":1,"children":[' + (nested(levels - 1) if levels > 1 else "") + "]}"

    spec = Schema(Tree, bounds=Bounds(nesting=4))
    depths = [levels for levels in range(1, 8) if can_write(spec, nested(levels))]
    assert depths == list(range(1, depths[-1] + 1))
    assert 2 <= depths[-1] <= 4


@pytest.mark.parametrize("value", [2**53 + 1, 1234567890123456789, -(2**63) - 1, 123456789.12345679, 0.1, 1e22, -0.0])
def test_a_constant_is_the_number_it_says(value: float) -> None:
    text = json.dumps(value)
    assert accepts({"const": value}, value)
    for near in (value + 1, value - 1, value + 2):
        if near != value:
            assert not accepts({"const": value}, near), text


@pytest.mark.parametrize(
    ("kind", "low", "inside", "outside"),
    [
        ("integer", {"minimum": 2**60 + 1}, [2**60 + 1, 2**61], [2**60, 0]),
        ("number", {"exclusiveMinimum": 0.1}, [0.11, 0.1000001, 1e5], [0.1, 0.0999]),
        ("number", {"maximum": 9.75}, [9.75, 9.7, -1e300], [9.76, 10, 1e300]),
        ("number", {"exclusiveMaximum": 1}, [0.999999999], [1, 1.0, 1e0]),
    ],
)
def test_bounds_are_compared_by_their_digits(kind: str, low: Any, inside: list[float], outside: list[float]) -> None:
    schema = {"type": kind, **low}
    assert [value for value in inside if not accepts(schema, value)] == []
    assert [value for value in outside if accepts(schema, value)] == []


def test_an_exclusive_bound_holds_for_who_reads_a_float() -> None:
    schema = {"type": "number", "exclusiveMaximum": 1}
    grammar = LLMatcher(BYTES, turn_grammar(output=Schema.json(schema)), log_level=0)
    assert not takes(grammar, "0.99999999999999999")  # reads as 1.0


def test_what_no_grammar_holds_is_checked_afterwards_where_that_is_asked_for() -> None:
    with pytest.raises(SchemaUnsupported, match="uniqueItems") as refused:
        _ = Schema.json(NAMES)
    assert "check_after=True" in refused.value.remedy
    spec = Schema.json(NAMES, check_after=True)
    assert any("uniqueItems" in one for one in spec.unchecked)
    assert spec.decode('["a","b"]') == ["a", "b"]
    with pytest.raises(OutputError, match="non-unique"):
        _ = spec.decode('["a","a"]')
    assert Schema.json({"type": "integer"}, check_after=True).unchecked == ()


def test_a_check_that_would_never_end_says_so() -> None:
    """An `if` alone decides nothing, so the grammar does not read it; the check does."""
    spec = Schema.json({**NAMES, "if": {"$ref": "#"}}, check_after=True)
    for _ in range(2):
        with pytest.raises(OutputError, match="refers to itself and to nothing else"):
            _ = spec.decode('["a","b"]')


@pytest.mark.anyio
async def test_a_run_asks_again_for_a_text_that_the_check_refuses() -> None:
    async with ScriptedEngine(['["a","a"]', '["a","b"]']) as engine, engine.session() as s:
        result = await s.run("Names.", output=Schema.json(NAMES, check_after=True))
        assert result.output == ["a", "b"]


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, "{", "nul"])
def test_a_text_that_cannot_be_read_is_an_output_error(text: str) -> None:
    spec = Schema.json({})
    assert not spec.is_whole(text)
    with pytest.raises(OutputError):
        _ = spec.decode(text)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        deep(5000),
        {"const": 10**5000},
        {"allOf": [{"$ref": "#/$defs/d0"}],
         "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(3000)}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"const": "\ud800"},
        {"const": float("nan")},
        {"properties": {1: {}}},
        {"type": "object", "properties": 3},
        {"anyOf": [{"enum": [object()]}]},
    ],
)  # fmt: skip
def test_what_is_too_deep_too_large_or_no_json_is_refused_by_name(schema: Any) -> None:
    with pytest.raises(SchemaUnsupported):
        _ = Schema.json(schema)


def test_a_chain_of_definitions_as_long_as_any_is_no_recursion_error() -> None:
    chain = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(1500)}
    assert accepts({"$ref": "#/$defs/d0", "$defs": {**chain, "d1500": {"type": "null"}}}, [[[]]])


def test_a_tool_with_a_free_form_object_can_be_given_one() -> None:
    fields = {"type": "object", "properties": {"fields": {"type": "object"}}, "required": ["fields"]}
    made = declared_tool({"name": "update", "parameters": fields}, lambda fields: str(fields))
    assert accepts(made.schema, {"fields": {"a": 1, "b": [None]}})


@pytest.mark.parametrize("parameters", [{"type": ["object", "null"]}, {"type": "string"}, {"anyOf": [{}, {}]}])
def test_parameters_that_may_be_no_object_are_refused(parameters: Any) -> None:
    with pytest.raises(TypeError, match="not an object"):
        _ = declared_tool({"name": "update", "parameters": parameters}, lambda: "")
