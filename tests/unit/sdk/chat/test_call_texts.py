"""Texts among the arguments of calls in a history: written so that they are read back as what they were."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed import Assistant, ToolCall, User, errors
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.key_values import ArgumentKinds
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.tools.schema import Schema
from tests.schema_texts import is_instance
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import folder_of

NAMES = ("qwen 3 coder", "glm 4.6", "deepseek v3.2", "qwen 3")
ALIKE = NAMES[:2]
SCHEMAS: dict[str, Any] = {
    "either": {"type": ["string", "integer"]},
    "any": True,
    "pattern": {"type": "string", "pattern": "."},
    "reference": {"$ref": "#/$defs/text"},
    "nullable": {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}, {"type": "boolean"}]},
    "listed": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "object"}]},
    "number": {"type": "number"},
}
TOOLS: dict[str, Schema] = {
    name: {"type": "object", "properties": {"v": schema}, "required": ["v"], "$defs": {"text": {"type": "string"}}}
    for name, schema in SCHEMAS.items()
}
MARKS = {"qwen 3 coder": "\n</parameter>", "glm 4.6": "</arg_value>", "deepseek v3.2": "</｜DSML｜parameter>"}
TEXTS = [
    "", "a", "5", "5.0", "-0", " 5 ", "\u00a05", "05", "1e3", "1e400", "null", "None", "true", "True", "NaN",
    "[1]", "[", "{}", "{", '"', '"a"', '"5"', '["', "a\n", "\nb", '{"a": "',
    *MARKS.values(), *(f'"{mark}' for mark in MARKS.values()),
]  # fmt: skip


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatCodec]:
    root = tmp_path_factory.mktemp("texts")
    made = {}
    for number, name in enumerate(NAMES):
        family = FAMILIES[name]
        folder = root / str(number)
        codec = ChatCodec(folder_of(folder, family.template, family.controls, plain=family.plain, end=family.end)).view(
            reasoning=None, history="template", variables=None, system=False, tools=True
        )
        made[name] = codec.with_tools(ArgumentKinds(TOOLS))
    return made


def written(codec: ChatCodec, tool: str, arguments: dict[str, Any]) -> str:
    call = ToolCall(id="c", name=tool, arguments=json.dumps(arguments, ensure_ascii=False))
    return codec.tokenizer.text(codec.append([User("a")], [Assistant("", (call,))])[0])


def read(codec: ChatCodec, text: str) -> str:
    parser = TurnParser(codec.tags, reasoning=True, tools=TOOLS)
    (found,) = (piece for piece in [*parser.feed(text), *parser.finish()] if isinstance(piece, CallReady))
    return found.arguments


def check(codec: ChatCodec, tool: str, value: Any) -> None:
    form = codec.tags.calls
    close = form.keys.value_close.rstrip() if form.keys is not None else None
    told = form.keys is not None and form.keys.text_open != form.keys.json_open
    carried = close is None or not isinstance(value, str) or close not in value
    if carried or not (told or tool == "reference"):
        back = json.loads(read(codec, written(codec, tool, {"v": value, "more": value})))
        assert json.dumps(back) == json.dumps({"v": value, "more": value})
    else:
        with pytest.raises(errors.InvalidRequest, match="ends a value") as refused:
            _ = written(codec, tool, {"v": value})
        assert refused.value.remedy


@pytest.mark.parametrize("value", TEXTS, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_a_history_is_read_back_as_it_was_or_refused(
    codecs: dict[str, ChatCodec], name: str, value: str
) -> None:
    for tool in TOOLS:
        check(codecs[name], tool, value)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    tool=st.sampled_from(sorted(TOOLS)),
    value=st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
            st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs", "Co"])),
        ),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
        max_leaves=4,
    ),
)  # fmt: skip
def test_whatever_a_history_holds_is_read_back_as_it_was_or_refused(
    codecs: dict[str, ChatCodec], name: str, tool: str, value: Any
) -> None:
    if isinstance(value, str) or is_instance(TOOLS[tool], json.dumps({"v": value})):
        check(codecs[name], tool, value)


@pytest.mark.parametrize("name", ALIKE)
def test_quotes_stand_only_around_a_text_that_would_be_read_as_another_value(
    codecs: dict[str, ChatCodec], name: str
) -> None:
    codec = codecs[name]
    assert ['"5"' in written(codec, tool, {"v": "5"}) for tool in ("either", "any", "number")] == [True] * 3
    assert ['"5"' in written(codec, tool, {"v": "5"}) for tool in ("pattern", "reference", "nullable")] == [False] * 3
    assert '"null"' in written(codec, "nullable", {"v": "null"})
    assert '"word"' not in written(codec, "either", {"v": "word"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NAMES[:3] for value in ("1e400", "-1e400", "NaN", "[1e999]")),
        ("qwen 3", "NaN"),  # it is given arguments as text, in which a number may have any digits
        ("qwen 3", "-Infinity"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(codecs: dict[str, ChatCodec], name: str, value: str) -> None:
    call = ToolCall(id="c", name="number", arguments=f'{{"v": {value}}}')
    with pytest.raises(errors.InvalidRequest, match="no finite number") as refused:
        _ = codecs[name].append([User("a")], [Assistant("", (call,))])
    assert "finite" in refused.value.remedy


def test_what_stands_in_a_log_is_not_refused_for_another_set_of_tools(codecs: dict[str, ChatCodec]) -> None:
    call = ToolCall(id="c", name="either", arguments=json.dumps({"v": MARKS["glm 4.6"]}))
    history = [User("a"), Assistant("", (call,))]
    other = codecs["glm 4.6"].with_tools(ArgumentKinds({"either": {"properties": {"v": {"type": "string"}}}}))
    assert other.append(history, [User("b")])
    with pytest.raises(errors.InvalidRequest, match="ends a value"):
        _ = other.append(history[:1], history[1:])
