"""Whatever a schema's grammar lets be written is an instance of the schema: random schemas, random texts, one judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools import Bounds
from tests.schema_texts import is_instance, matcher, written

CHUNKS = 40
SMALL = Bounds(string_chars=6, array_items=3, map_entries=3, key_chars=3, nesting=2)
NAMES = st.sampled_from(["a", "b", "ab", "c"])
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.sampled_from([0.5, 1.0, 2.25, -1.5, 2**60 + 1, 10.0]),
    st.sampled_from(["", "a", "ab", "bb", 'q"', "é"]),
    st.sampled_from([[], [1], ["a", 1], {}, {"a": 1}, {"a": "b", "c": None}]),
)  # fmt: skip
PATTERNS = st.sampled_from(["^a", "b$", "^[ab]+$", "^a|b$", ".", "\\d", "^(?!a)", "^$", "[^a]", "^\\w{1,2}$", "\\S"])
SMALL_COUNTS = st.integers(0, 3)
NUMBERS = st.one_of(st.integers(-3, 12), st.sampled_from([0.5, -1.25, 3.75, 1e-7, 9007199254740993]))


def extended(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "type": st.one_of(
            st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"]),
            st.lists(st.sampled_from(["null", "integer", "string", "array", "object"]), min_size=1, unique=True),
        ),
        "enum": st.lists(VALUES, min_size=1, max_size=4),
        "const": VALUES,
        "minimum": NUMBERS, "maximum": NUMBERS, "exclusiveMinimum": NUMBERS, "exclusiveMaximum": NUMBERS,
        "multipleOf": st.sampled_from([1, 2, 3, 0.5, 0.01, 7]),
        "minLength": SMALL_COUNTS, "maxLength": SMALL_COUNTS, "pattern": PATTERNS,
        "format": st.sampled_from(["date", "ipv4", "no-such-format"]),
        "items": inner, "prefixItems": several, "minItems": SMALL_COUNTS, "maxItems": SMALL_COUNTS,
        "uniqueItems": st.booleans(), "contains": inner, "minContains": SMALL_COUNTS, "maxContains": SMALL_COUNTS,
        "unevaluatedItems": st.one_of(st.booleans(), inner),
        "properties": st.dictionaries(NAMES, inner, max_size=3),
        "patternProperties": st.dictionaries(PATTERNS, inner, min_size=1, max_size=2),
        "additionalProperties": st.one_of(st.booleans(), inner),
        "unevaluatedProperties": st.one_of(st.booleans(), inner),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "minProperties": SMALL_COUNTS, "maxProperties": SMALL_COUNTS,
        "propertyNames": st.builds(lambda pattern: {"pattern": pattern}, PATTERNS),
        "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2, unique=True), max_size=2),
        "dependentSchemas": st.dictionaries(NAMES, inner, max_size=1),
        "allOf": several, "anyOf": several, "oneOf": several, "not": inner,
        "if": inner, "then": inner, "else": inner,
        "$ref": st.sampled_from(["#", "#/$defs/one", "#/$defs/a~1b%20c"]),
        "x-vendor": VALUES,
    }  # fmt: skip
    return st.one_of(
        st.booleans(),
        *(st.fixed_dictionaries({}, optional={key: optional[key] for key in chosen}) for chosen in _GROUPS),
        st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True).flatmap(
            lambda keys: st.fixed_dictionaries({key: optional[key] for key in keys})
        ),
    )


_GROUPS = (
    ("type", "enum", "const", "minimum", "exclusiveMaximum", "multipleOf"),
    ("type", "minLength", "maxLength", "pattern", "format", "not"),
    ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains"),
    ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    ("properties", "required", "dependentRequired", "dependentSchemas", "propertyNames", "unevaluatedProperties"),
    ("type", "properties", "required", "oneOf", "allOf", "if", "then", "else", "$ref"),
)
SCHEMAS = st.recursive(st.one_of(st.builds(dict), st.builds(lambda v: {"const": v}, VALUES)), extended, max_leaves=10)


def without_lone_conditions(schema: Any) -> Any:
    """An `if` without `then` and `else` decides nothing, and may refer to its own schema, without end."""
    if isinstance(schema, list):
        return [without_lone_conditions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    lone = "then" not in schema and "else" not in schema and '"$ref": "#"' in json.dumps(schema.get("if"))
    return {key: without_lone_conditions(value) for key, value in schema.items() if not (lone and key == "if")}


def check(schema: Any, seed: int) -> None:
    root = {"$defs": {"one": {"type": "integer", "maximum": 5}, "a/b c": {"type": ["string", "null"]}}}
    root = {**root, **schema} if isinstance(schema, dict) else {**root, "allOf": [schema]}
    try:
        _ = matcher(root, SMALL)
    except SchemaUnsupported as refused:
        assert refused.remedy
        event("refused")
        return
    judged = without_lone_conditions(root)
    for turn in range(3):
        text = written(root, seed + turn, SMALL)
        assert is_instance(judged, text), (root, text)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 10**6))
def test_a_text_that_can_be_written_is_an_instance(schema: Any, seed: int) -> None:
    check(schema, seed)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_text_that_can_be_written_is_an_instance_of_many_schemas(chunk: int) -> None:
    """The same schemas for a chunk each time: one that failed, or took too long, is run again by its number."""

    @seed(chunk)
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(schema=SCHEMAS, seed=st.integers(0, 10**6))
    def holds(schema: Any, seed: int) -> None:
        check(schema, seed)

    holds()
