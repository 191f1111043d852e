"""Which functions become tools, under which parameter names, and what is refused at definition, by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Optional

import pytest
from pydantic import Field

from agentspeed.errors import BadArguments
from agentspeed.tools import ToolContext, declared_tool, execute, tool, tools_from

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def names_of(made: Any) -> list[str]:
    return list(made.schema["properties"])


OWNED = [
    "model_config",
    "model_dump",
    "model_fields",
    "model_x",
    "json",
    "schema",
    "copy",
    "dict",
    "validate",
    "construct",
    "mro",
    "register",
    "fields",
    "name",
    "fn",
    "self_",
    "context",
    "type",
    "args",
    "kwargs",
]


@pytest.mark.parametrize("name", OWNED)
async def test_a_parameter_may_have_any_ordinary_name(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def call({name}: int, other: int = 5): return [{name}, other]", scope)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = tool(scope["call"])
    assert names_of(made) == [name, "other"]
    assert made.schema["required"] == [name]
    assert (await execute(made, f'{{"{name}":3}}')).content == "[3,5]"
    wrong = await execute(made, f'{{"{name}":"x"}}')
    assert isinstance(wrong.error, BadArguments)
    assert f"wrong arguments: {name}: " in wrong.content


async def test_names_of_ones_own_for_the_model_are_kept() -> None:
    def send(json: Annotated[int, Field(alias="payload")], size: Annotated[int, Field(alias="copy")] = 1) -> list[int]:
        return [json, size]

    made = tool(send)
    assert names_of(made) == ["payload", "copy"]
    assert (await execute(made, '{"payload":3,"copy":4}')).content == "[3,4]"


async def test_a_predicate_is_given_the_parameters_names() -> None:
    def delete(copy: int) -> str:
        return "gone"

    made = tool(needs_approval=lambda arguments: arguments["copy"] > 1)(delete)
    assert (await execute(made, '{"copy":1}')).content == "gone"


async def test_a_context_is_given_however_it_is_written() -> None:
    def either(a: int, context: ToolContext[str] | None) -> str:
        return f"{a} {context.data if context else ''}"

    def optional(a: int, context: Optional[ToolContext] = None) -> str:  # type: ignore[type-arg]  # noqa: UP045
        return f"{a} {context.data if context else ''}"

    def annotated(a: int, context: Annotated[ToolContext[str], "the call"]) -> str:
        return f"{a} {context.data}"

    def both(a: int, context: Annotated[ToolContext[str] | None, "the call"] = None) -> str:
        return f"{a} {context.data if context else ''}"

    context = ToolContext(call_id="c", tool="t", session=None, data="mine")
    for function in (either, optional, annotated, both):
        made = tool(function)
        assert names_of(made) == ["a"]
        assert (await execute(made, '{"a":1}', context=context)).content == "1 mine"


class Shop:
    """A shop."""

    def __init__(self, town: str) -> None:
        self.town = town

    def find(self, item: str) -> str:
        """Find an item."""
        return f"{item} in {self.town}"

    async def order(self, item: str, context: ToolContext[str]) -> str:
        return f"{item} for {context.data}"

    @classmethod
    def named(cls, town: str) -> str:
        return cls(town).town

    @staticmethod
    def greet(name: str) -> str:
        return f"hello {name}"


async def test_a_bound_method_is_a_tool() -> None:
    shop = Shop("Oslo")
    find, order = tools_from([shop.find, shop.order])
    assert (find.name, find.description, names_of(find)) == ("find", "Find an item.", ["item"])
    assert (await execute(find, '{"item":"tea"}')).content == "tea in Oslo"
    context = ToolContext(call_id="c", tool="order", session=shop, data="me")
    assert (await execute(order, '{"item":"tea"}', context=context)).content == "tea for me"
    assert (await execute(tool(Shop.named), '{"town":"Bern"}')).content == "Bern"
    assert (await execute(tool(Shop.greet), '{"name":"you"}')).content == "hello you"


def test_a_method_without_its_object_says_what_to_do_instead() -> None:
    with pytest.raises(TypeError, match=r"find\(\): 'self' shows a method.*tool\(an_object\.find\)"):
        _ = tool(Shop.find)


async def test_what_a_partial_has_bound_is_neither_shown_to_the_model_nor_taken_from_it() -> None:
    def search(where: str, query: str, key: str, most: int = 3) -> str:
        """Search.

        Args:
            query: what for.
        """
        return f"{where} {query} {key} {most}"

    made = tool(functools.partial(functools.partial(search, "web", key="secret"), most=5))
    assert (made.name, made.description) == ("search", "Search.")
    assert made.schema == {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "what for."}},
        "required": ["query"],
    }
    assert (await execute(made, '{"query":"x"}')).content == "web x secret 5"
    assert not (await execute(made, '{"query":"x","key":"mine"}')).ok


async def test_a_partial_of_an_async_function_is_awaited() -> None:
    async def add(a: int, b: int) -> int:
        return a + b

    made = tool(functools.partial(add, 1))
    assert made.is_async
    assert (await execute(made, '{"b":2}')).content == "3"


def wrong_pattern(x: Annotated[str, Field(pattern="(?=a)b")]) -> None: ...
def wrong_limit(x: Annotated[int, Field(ge="a")]) -> None: ...  # type: ignore[arg-type]
def crossed_contents(
    x: Annotated[list[int], Field(json_schema_extra={"contains": {"const": "a"}})],
) -> None: ...
def crossed(x: Annotated[int, Field(ge=5, le=3)]) -> None: ...


@pytest.mark.parametrize("function", [wrong_pattern, wrong_limit, crossed_contents, crossed])
def test_what_no_turn_could_be_held_to_is_refused_at_definition_by_tool_and_parameter(function: Any) -> None:
    with pytest.raises(TypeError, match=rf"tool {function.__name__}\(\): parameter 'x'"):
        _ = tool(function)


def find(query: str) -> str:
    """Find."""
    return query


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: declared_tool(3, find), "tool definition 3: it must be a dict"),  # type: ignore[arg-type]
        (lambda: declared_tool({"name": "x"}, 3), "tool x: fn is 3"),  # type: ignore[arg-type]
        (lambda: declared_tool({"name": "x", "description": 3}, find), "tool x: description is 3"),
        (
            lambda: declared_tool({"name": "x", "parameters": {"type": "string"}}, find),
            "tool x: its parameters are not an object",
        ),
        (
            lambda: declared_tool(
                {"name": "x", "parameters": {"$ref": "#/$defs/A", "$defs": {"A": {"const": 1}}}}, find
            ),
            "tool x: its parameters are not an object",
        ),
        (
            lambda: declared_tool(
                {
                    "name": "x",
                    "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)"}}},
                },
                find,
            ),
            "tool x: .*look-ahead",
        ),
        (lambda: tool("find"), "tool: 'find' is not a function"),  # type: ignore[call-overload]
        (lambda: tool(Shop), "is not a function"),
        (lambda: tool(max), r"tool max\(\): Python has no signature of it"),
        (lambda: tool(name=3)(find), "tool name 3"),  # type: ignore[call-overload]
        (lambda: tools_from(find), "tools is <function find.*a list of functions"),  # type: ignore[arg-type]
        (lambda: tools_from(3), "tools is 3"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_definition_is_a_type_error_that_says_what_is_wrong(make: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        _ = make()


def test_parameters_declared_by_reference_are_an_object() -> None:
    parameters = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"type": "null"}}}}}
    either = {"anyOf": [{"type": "object"}, {"$ref": "#/$defs/A"}], "$defs": parameters["$defs"]}
    for schema in (parameters, either):
        made = declared_tool({"name": "far", "description": None, "parameters": schema}, find)
        assert made.description == ""


async def test_a_declared_tool_may_have_any_parameter_name() -> None:
    def far(**arguments: object) -> str:
        return str(arguments)

    made = declared_tool({"name": "far"}, far)
    assert (await execute(made, '{"model_config":1,"json":2,"self":3}')).content == str(
        {"model_config": 1, "json": 2, "self": 3}
    )


@pytest.mark.parametrize("options", [{"timeout": "5"}, {"timeout": True}, {"needs_approval": "yes"}])
def test_an_option_of_the_wrong_type_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        _ = tool(**options)(find)


def _pieces(text: str) -> Iterator[str]:
    yield text


async def _async_pieces(text: str) -> AsyncIterator[str]:
    yield text


MAKERS: list[Callable[[Any], Any]] = [
    tool,
    lambda function: tools_from([function]),
    lambda function: declared_tool({"name": "a"}, function),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("function", [_pieces, _async_pieces])
def test_a_generator_is_refused_when_the_tool_is_made(function: Any, make: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="is a generator, and a call has one result"):
        _ = make(function)
