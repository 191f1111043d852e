"""The grammar of one tool call in its family's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, final

from agentspeed.chat.calls import CallFormat
from agentspeed.chat.key_values import ArgumentKinds, closing, is_bare
from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.schema import Bounds, Compiled, Entry, EntryKinds, Wording, compile_entries, compile_schema
from agentspeed.tools.tool import Tool

_NUMBER: Final = r"/:[0-9]{1,4}/"


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
        prefix = f"call_{number}"
        if self._form.keys is None:
            spaced = self._form.spaced
            return self._json(compile_schema(tool.schema, bounds, prefix=prefix, sets=True, spaced=spaced))
        try:
            words = self._form.keys.words
            ways = compile_entries(tool.schema, bounds, prefix=prefix, sets=True, spaced=True, words=words)
        except SchemaUnsupported as error:
            raise SchemaUnsupported(
                f"The parameters of {tool.name} cannot be written one by one, as this model writes them: {error}",
                remedy="Give the tool one parameter for each value.",
            ) from error
        kinds = ArgumentKinds({tool.name: tool.schema})
        of = partial(kinds.of, tool.name)
        options = [self._keys(f"{number}_{way}", entries, of) for way, entries in enumerate(ways)]
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def _json(self, compiled: Compiled) -> str:
        for name, body in compiled.rules:
            _ = self._add(name, body)
        return compiled.start

    def _keys(self, name: str, entries: Sequence[Entry], kinds: Callable[[str], EntryKinds]) -> str:
        """One argument after another; `kinds` tells of each what it may be, as who reads the call knows it."""
        rules: list[str] = []
        for at, entry in enumerate(entries):
            value = self._value(f"{name}_{at}", entry, kinds(entry.name))
            rule = self._add(f"key_{name}_{at}", f"{self._key(entry.name)}{value}")
            rules.append(rule if entry.required else f"{rule}?")
        return " ".join(rules) or '""'

    def _key(self, key: str) -> str:
        keys = self._form.keys
        return self._marks.rule(keys.key_open + key) if keys is not None else ""

    def _value(self, name: str, entry: Entry, kinds: EntryKinds) -> str:
        """The rest of an argument after its key."""
        keys = self._form.keys
        if keys is None:
            return ""
        if entry.texts is not None and is_bare(kinds, closing(keys)):
            return f" {self._marks.rule(keys.text_open)} {self._text(name, entry.texts)}"
        end = self._marks.after(keys.value_close)
        value = f"{self._marks.rule(keys.json_open)} {self._json(entry.value)}{end}"
        if entry.among is None or keys.text_open == keys.json_open or not _holds_no(entry.among, closing(keys)):
            return f" {value}"
        # The family marks a text as one, so it needs no quotes beside other values either.
        return f" ({self._marks.rule(keys.text_open)} {self._text(name, entry.among)} | {value})"

    def _text(self, name: str, texts: Wording) -> str:
        """Bare text and what closes it. A text may begin as its close does, so both are told apart in one lexeme."""
        close = "" if self._form.keys is None else self._form.keys.value_close
        if texts.only is not None:
            return f"({' | '.join(quoted(option) for option in texts.only)}){self._marks.after(close)}"
        text = f"(?s:.){{{texts.least},{texts.most}}}"
        spelt, special = self._marks.first_special(close)
        if special is None:
            return self._add(f"value_{name}[lazy]", f"/{text}/ {quoted(close)}")
        rule = f"/{text}{literal(spelt)}/{without(close.rstrip()[len(spelt) :])}"
        return f"{self._add(f'VALUE_{name}', rule)}{self._marks.after(close[len(spelt) :])}"


def _holds_no(texts: Wording, close: str) -> bool:
    """Whether none of the texts, where they are named, has in it what ends a value."""
    return not any(close in text for text in texts.only or ())


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
