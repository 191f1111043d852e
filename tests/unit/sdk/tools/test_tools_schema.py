"""What a model is told about a typed function, and what is refused at definition time."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import anyio
import pytest
from pydantic import BaseModel, Field

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools import Bounds, Tool, ToolContext, bounded, declared_tool, tool, tools_from


class Colour(enum.Enum):
    red = "red"
    blue = "blue"


class Point(BaseModel):
    x: int
    y: float = 1.0


@dataclass
class Order:
    item: str
    count: int


class Chain(BaseModel):
    next: list[Chain]


def find(query: str, most: Annotated[int, "how many at most"] = 3, kind: Literal["web", "file"] = "web") -> list[str]:
    """Find things.

    Args:
        query: what to look for,
            in plain words.
    """
    return [query] * most


def test_hints_defaults_and_docstrings_become_the_schema() -> None:
    made = tool(find)
    assert made.name == "find"
    assert made.description == "Find things."
    assert made.schema == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "what to look for, in plain words."},
            "most": {"type": "integer", "default": 3, "description": "how many at most"},
            "kind": {"type": "string", "enum": ["web", "file"], "default": "web"},
        },
        "required": ["query"],
    }


@pytest.mark.parametrize(
    "docstring",
    [
        "Add.\n\nArgs:\n    a: the first.\n    b: the second.",
        "Add.\n\n:param a: the first.\n:param b: the second.",
        "Add.\n\nParameters\n----------\na\n    the first.\nb\n    the second.",
    ],
)
def test_three_docstring_styles_say_the_same(docstring: str) -> None:
    def add(a: int, b: int) -> int:
        return a + b

    add.__doc__ = docstring
    made = tool(add)
    assert made.description == "Add."
    assert [made.schema["properties"][name]["description"] for name in "ab"] == ["the first.", "the second."]  # type: ignore[call-overload,index]


def test_models_dataclasses_and_enums_are_described_without_titles() -> None:
    def place(point: Point, order: Order, colour: Colour) -> str:
        return f"{point} {order} {colour}"

    # local functions see module-level types
    schema = tool(place).schema
    assert "title" not in str(schema)
    assert set(schema["$defs"]) == {"Point", "Order", "Colour"}  # type: ignore[arg-type]


def test_a_context_parameter_is_never_shown_to_the_model() -> None:
    def who(name: str, context: ToolContext[int]) -> str:
        return f"{name} {context.data}"

    assert list(tool(who).schema["properties"]) == ["name"]  # type: ignore[arg-type]


def no_hint(x) -> None: ...  # type: ignore[no-untyped-def]
def any_value(x: Any) -> None: ...
def bare_dict(x: dict) -> None: ...  # type: ignore[type-arg]
def not_json(x: anyio.Event) -> None: ...
def variadic(*x: int) -> None: ...
def positional(x: int, /) -> None: ...
def recursive(x: Chain) -> None: ...
def underscored(_x: int) -> None: ...


@pytest.mark.parametrize(
    "function", [no_hint, any_value, bare_dict, not_json, variadic, positional, recursive, underscored]
)
def test_what_cannot_be_described_is_a_type_error_that_names_the_parameter(function: Any) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\).*x"):
        _ = tools_from([function])


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two tools are named 'find'"):
        _ = tools_from([find, tool(name="find")(find)])


@pytest.mark.parametrize("name", ["auto", "none", "a b", ""])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="tool name"):
        _ = declared_tool({"name": name}, find)


@pytest.mark.parametrize("wrong", [3, "find", Point])
def test_what_is_not_a_function_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="is not a function"):
        _ = tools_from([wrong])


def test_a_decorated_function_is_still_callable_and_says_what_it_is() -> None:
    made = tool(timeout=5)(find)
    assert isinstance(made, Tool)
    assert made("a", most=2) == ["a", "a"]
    assert repr(made) == "<Tool find(query, most, kind)>"


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("inf")}, {"on_error": "ignore"}])
def test_an_option_out_of_range_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        _ = tool(**options)(find)


def test_a_bounded_schema_closes_strings_arrays_numbers_and_maps() -> None:
    class Everything(BaseModel):
        text: str
        many: list[int]
        ratio: float
        table: dict[str, bool]
        few: Annotated[list[int], Field(max_length=2)]

    closed = bounded(Everything.model_json_schema(), Bounds(string_chars=9, array_items=8, map_entries=7))
    shapes: Any = closed["properties"]
    assert shapes["text"]["maxLength"] == 9
    assert shapes["many"]["maxItems"] == 8
    assert shapes["many"]["items"]["maximum"] == 10**15 - 1
    assert shapes["ratio"]["multipleOf"] == 1e-6
    assert shapes["table"]["maxProperties"] == 7
    assert shapes["few"]["maxItems"] == 2
    assert closed["additionalProperties"] is False


def test_bounding_does_not_modify_its_argument() -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    _ = bounded(schema)
    assert schema == {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({}, r"\$ allows any"),
        ({"type": "object", "properties": {"a": {}}}, r"\$\.a allows any"),
        ({"type": "array"}, r"\$\[\] allows any"),
        ({"$ref": "#/$defs/T", "$defs": {"T": {"type": "array", "items": {"$ref": "#/$defs/T"}}}}, "T inside T"),
        ({"$ref": "http://elsewhere/T"}, "not in its"),
        ({"not": {"type": "string"}}, "cannot express"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_what_has_no_bound_is_refused_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(SchemaUnsupported, match=place):
        _ = bounded(schema)
