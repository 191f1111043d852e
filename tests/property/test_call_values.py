"""Arguments that are written one by one: whatever can be written is read back as what was meant."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from agentspeed.chat.calls import CallFormat, Keys
from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.key_values import ArgumentKinds, closing, is_bare
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.tags import Tags
from agentspeed.errors import SchemaUnsupported
from agentspeed.tools import Bounds, Tool, declared_tool
from tests.schema_texts import BYTES, is_instance, random_text, takes

SMALL = Bounds(string_chars=12, array_items=3, map_entries=3, key_chars=3, nesting=2)
CODER = Keys(
    key_open="<p=", text_open=">\n", json_open=">\n", value_close="\n</p>\n", joint="",
    words=(("true", "True"), ("false", "False"), ("null", "None")),
)  # fmt: skip
ALIKE = Keys(key_open="<key>", text_open="</key><value>", json_open="</key><value>", value_close="</value>", joint="")
TOLD = Keys(key_open="<p n=", text_open=" text>", json_open=" json>", value_close="</p>", joint="")
STRINGS = [
    "", "a", "5", "-1", "5.0", " 5 ", "05", "1e3", "1e400", "null", "None", "true", "True", "false", "NaN", "[1]", "[",
    "{}", '{"a": 1}', '"', '"a"', '"5"', '["', '"</p>"', "</value>", "a</p>b", "\n", "\n</p>\n", "\u00a05", "<",
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, 0, 5, 10**20, 0.5, 5.0, 1e22, [], [1], ["]"], {}, {"a": 1}]
TEXTS = st.one_of(st.sampled_from(STRINGS), st.text(max_size=4))
VALUES: st.SearchStrategy[Any] = st.one_of(
    TEXTS, st.none(), st.booleans(), st.integers(-3, 12), st.sampled_from([0.5, 1.0, -2.25, 1e22, 10**20]),
    st.lists(st.one_of(st.integers(0, 3), TEXTS), max_size=2),
    st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(st.integers(0, 3), TEXTS), max_size=2),
)  # fmt: skip
KINDS = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
PLAIN = st.one_of(
    st.builds(lambda kind: {"type": kind}, KINDS),
    st.builds(lambda kinds: {"type": kinds}, st.lists(KINDS, min_size=1, max_size=3, unique=True)),
    st.sampled_from(["^.", "^[0-9]+$", '^".*"$', "e"]).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(["date", "ipv4", "no-such"]).map(lambda name: {"type": "string", "format": name}),
    st.integers(0, 2).map(lambda most: {"type": "string", "maxLength": most}),
    st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
    st.sampled_from([{"$ref": f"#/$defs/{name}"} for name in ("text", "number", "mixed")]),
    st.just({}),
)  # fmt: skip
SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    PLAIN,
    lambda inner: st.builds(
        lambda how, several: {how: several},
        st.sampled_from(["anyOf", "anyOf", "oneOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=4,
)
DEFS = {"text": {"type": "string"}, "number": {"type": "number"}, "mixed": {"type": ["string", "null"]}}


def formed(keys: Keys) -> CallFormat:
    return CallFormat(
        kind="keys", call_open="<tool_call>", name_end="\n", call_close="</tool_call>", spaced=True, keys=keys
    )


FORMS = st.sampled_from([CODER, ALIKE, TOLD]).map(formed)


def act(schema: dict[str, Any]) -> Tool | None:
    """None for a schema of which there is no value."""
    parameters = {"type": "object", "properties": {"v": schema}, "required": ["v"], "$defs": DEFS}
    try:
        return declared_tool({"name": "act", "parameters": parameters}, print)
    except TypeError:
        return None


def matcher(form: CallFormat, made: Tool) -> LLMatcher | None:
    """None for a schema that no grammar holds."""
    try:
        source = turn_grammar(tools=[made], tool_choice="act", parallel_calls=1, tags=Tags(calls=form), bounds=SMALL)
    except SchemaUnsupported:
        return None
    return LLMatcher(BYTES, source, log_level=0)


def read(form: CallFormat, made: Tool, text: str) -> str:
    parser = TurnParser(Tags(calls=form), tools={made.name: made.schema})
    found = [piece for piece in [*parser.feed(text), *parser.finish()] if isinstance(piece, CallReady)]
    assert len(found) == 1, text
    return found[0].arguments


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, form=FORMS, seed=st.integers(0, 10**6))
def test_whatever_call_can_be_written_is_read_back_as_an_instance(
    schema: dict[str, Any], form: CallFormat, seed: int
) -> None:
    made = act(schema)
    grammar = None if made is None else matcher(form, made)
    if made is None or grammar is None:
        return
    text = random_text(grammar, random.Random(seed))
    arguments = read(form, made, text)
    assert is_instance(made.schema, arguments), (schema, text, arguments)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, form=FORMS, drawn=VALUES)
def test_every_value_that_the_grammar_lets_a_model_write_is_read_back(
    schema: dict[str, Any], form: CallFormat, drawn: Any
) -> None:
    made, keys = act(schema), form.keys
    grammar = None if made is None else matcher(form, made)
    if made is None or grammar is None or keys is None:
        return
    bare = is_bare(ArgumentKinds({"act": made.schema}).of("act", "v"), closing(keys))
    for value in [drawn, *STRINGS, *OTHERS]:
        told = json.dumps(value, ensure_ascii=False)
        if bare and not isinstance(value, str):
            continue
        said = value if bare else dict(keys.words).get(told, told)
        opened = keys.text_open if bare else keys.json_open
        text = f"<tool_call>act\n{keys.key_open}v{opened}{said}{keys.value_close}</tool_call>"
        if takes(grammar, text):
            event("bare" if bare else "JSON")
            assert read(form, made, text) == f'{{"v": {told}}}', (schema, text)
