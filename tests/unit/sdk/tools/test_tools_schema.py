"""What a model is told about a typed function, and what is refused at definition time."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import anyio
import pytest
from pydantic import BaseModel, Field

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools import Bounds, Tool, ToolContext, declared_tool, tool, tools_from
from agentspeed.tools.schema import compile_schema
from tests.schema_texts import accepts


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
def not_json(x: anyio.Event) -> None: ...
def variadic(*x: int) -> None: ...
def positional(x: int, /) -> None: ...
def underscored(_x: int) -> None: ...


@pytest.mark.parametrize("function", [no_hint, not_json, variadic, positional, underscored])
def test_what_cannot_be_described_is_a_type_error_that_names_the_parameter(function: Any) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\).*x"):
        _ = tools_from([function])


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two tools are named 'find'"):
        _ = tools_from([find, tool(name="find")(find)])


class Chain(BaseModel):
    next: list[Chain] = []


def test_any_json_free_objects_sets_and_recursive_models_are_parameters() -> None:
    def take(anything: Any, free: dict[str, Any], tags: set[str], chain: Chain) -> None: ...

    schema = tool(take).schema
    value = {"anything": [1, {"a": None}], "free": {"k": [True]}, "tags": [], "chain": {"next": [{"next": []}]}}
    with pytest.raises(SchemaUnsupported, match="uniqueItems"):
        _ = compile_schema(schema)  # what pydantic reads into a set may say a thing twice; a plain schema may not
    assert accepts({**schema, "properties": {**schema["properties"], "tags": {"type": "array"}}}, value)  # type: ignore[dict-item]


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


def test_strings_arrays_numbers_and_maps_without_a_bound_are_given_one() -> None:
    class Everything(BaseModel):
        text: str = ""
        many: list[int] = []
        ratio: float = 0
        table: dict[str, bool] = {}
        few: Annotated[list[int], Field(max_length=2)] = []

    schema = Everything.model_json_schema()
    bounds = Bounds(string_chars=9, array_items=8, map_entries=7, integer_digits=4, fraction_digits=3)
    entries = {f"{number}": True for number in range(8)}
    within = [{"text": "a" * 9}, {"many": [1] * 8}, {"many": [9999]}, {"ratio": 1.125}, {"ratio": 1e300},
              {"table": dict(list(entries.items())[:7])}, {"few": [1, 2]}]  # fmt: skip
    beyond = [{"text": "a" * 10}, {"many": [1] * 9}, {"many": [10000]}, {"ratio": 1.1255}, {"table": entries},
              {"few": [1, 2, 3]}, {"other": 1}]  # fmt: skip
    assert [value for value in within if not accepts(schema, value, bounds)] == []
    assert [value for value in beyond if accepts(schema, value, bounds)] == []


def test_compiling_does_not_modify_its_argument() -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    _ = compile_schema(schema)
    assert schema == {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def test_a_schema_that_was_read_once_does_not_speak_for_one_that_is_no_json() -> None:
    sound: dict[Any, Any] = {"type": "object", "properties": {"1": {"type": "integer"}}, "required": ["1"]}
    assert compile_schema(sound) == compile_schema(sound)
    with pytest.raises(SchemaUnsupported, match="a key that is not a text"):
        _ = compile_schema({**sound, "properties": {1: {"type": "integer"}}})  # type: ignore[dict-item]
    with pytest.raises(SchemaUnsupported, match="a set, which is not JSON"):
        _ = compile_schema({**sound, "required": {"1"}})  # type: ignore[dict-item]
