"""The grammar of one tool call in its family's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Final, final

from agentspeed.chat.calls import CallFormat
from agentspeed.chat.key_values import is_text, texts
from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.bounds import Bounds, bounded
from agentspeed.tools.grammars import json_rule
from agentspeed.tools.keywords import Schema, for_the_grammar
from agentspeed.tools.tool import Tool

_NUMBER: Final = r"/:[0-9]{1,4}/"
_OF_OBJECTS: Final = frozenset({"type", "properties", "required", "additionalProperties", "$defs"})


@final
class Marks:
    """Literal text of a family as a rule: each control token by its id, the rest byte by byte."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        longest = sorted(ids, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(mark) for mark in longest)) if longest else None

    def rule(self, text: str) -> str:
        """Empty text is an empty rule."""
        rules: list[str] = []
        done = 0
        for found in self._special.finditer(text) if self._special is not None else ():
            if found.start() > done:
                rules.append(quoted(text[done : found.start()]))
            rules.append(f"<[{self._ids[found[0]]}]>")
            done = found.end()
        if done < len(text):
            rules.append(quoted(text[done:]))
        return " ".join(rules)

    def after(self, text: str) -> str:
        """The rule of a text that follows another rule."""
        return f" {self.rule(text)}" if text else ""

    def first_special(self, text: str) -> tuple[str, int | None]:
        """What stands before the first control token, and its id."""
        found = self._special.search(text) if self._special is not None else None
        return (text, None) if found is None else (text[: found.start()], self._ids[found[0]])


@final
class CallRules:
    """Adds the rules of calls; `add` takes a rule's name and text and gives the name to refer to it by."""

    def __init__(self, form: CallFormat, marks: Marks, add: Callable[[str, str], str]) -> None:
        self._form = form
        self._marks = marks
        self._add = add

    def body(self, number: int, tool: Tool, bounds: Bounds) -> str:
        """A call of `tool` from its name to its end."""
        form = self._form
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1]
        called = f"{quoted(f'functions.{name}')} {_NUMBER}" if form.numbered else quoted(name)
        arguments = self._arguments(number, tool, bounds)
        rule = f"{called}{self._marks.after(form.name_end)} {arguments}{self._marks.after(form.call_close)}"
        return self._add(f"call_{number}", rule)

    def _arguments(self, number: int, tool: Tool, bounds: Bounds) -> str:
        closed = bounded(tool.schema, bounds)
        if self._form.keys is None:
            return json_rule(closed, spaced=self._form.spaced)
        properties = closed.get("properties", {})
        if not isinstance(properties, dict) or closed.keys() - _OF_OBJECTS:
            raise SchemaUnsupported(
                f"The parameters of {tool.name} are no plain object, and this model writes arguments one by one.",
                remedy="Give the tool one parameter for each value.",
            )
        raw = tool.schema.get("properties", {})
        required = closed.get("required", [])
        definitions = closed.get("$defs")
        rules: list[str] = []
        for at, (key, schema) in enumerate(properties.items()):
            given = raw.get(key) if isinstance(raw, dict) else None
            value = self._value(f"{number}_{at}", given, schema, definitions)
            needed = isinstance(required, list) and key in required
            rules.append(self._add(f"key_{number}_{at}", f"{self._key(key)}{value}") + ("" if needed else "?"))
        return " ".join(rules)

    def _key(self, key: str) -> str:
        keys = self._form.keys
        return self._marks.rule(keys.key_open + key) if keys is not None else ""

    def _value(self, name: str, given: object, closed: object, definitions: object) -> str:
        """The rest of an argument after its key."""
        keys = self._form.keys
        if keys is None or not isinstance(closed, dict):
            return ""
        close = keys.value_close.rstrip()
        if isinstance(given, dict) and is_text(given, close):
            return f" {self._marks.rule(keys.text_open)} {self._text(name, for_the_grammar(given), closed)}"
        schema = dict(closed)
        if definitions is not None:
            schema["$defs"] = definitions
        end = self._marks.after(keys.value_close)
        return f" {self._marks.rule(keys.json_open)} {json_rule(schema, spaced=True)}{end}"

    def _text(self, name: str, given: Schema, closed: Schema) -> str:
        """Bare text and what closes it. A text may begin as its close does, so both are told apart in one lexeme."""
        close = "" if self._form.keys is None else self._form.keys.value_close
        options = texts(given)
        if options is not None:
            return f"({' | '.join(quoted(option) for option in options)}){self._marks.after(close)}"
        text = f"(?s:.){{{closed.get('minLength', 0)},{closed['maxLength']}}}"
        spelt, special = self._marks.first_special(close)
        if special is None:
            return self._add(f"value_{name}[lazy]", f"/{text}/ {quoted(close)}")
        rule = f"/{text}{literal(spelt)}/{without(close.rstrip()[len(spelt) :])}"
        return f"{self._add(f'VALUE_{name}', rule)}{self._marks.after(close[len(spelt) :])}"


def without(mark: str) -> str:
    """Text in which a mark is spelt out is forbidden even where the mark is a special token: who reads the text, the
    parser too, could not tell them apart."""
    return f" & ~/(?s:.*){literal(mark)}(?s:.*)/"


def ending(text: str) -> str:
    """Text that ends so; any text where it is empty."""
    return f" & /(?s:.*){literal(text)}/" if text else ""


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def literal(text: str) -> str:
    """A text as a pattern between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n").replace(r"\ ", " ")
