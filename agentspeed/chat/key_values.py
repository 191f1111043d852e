"""How a family that writes arguments one by one carries each value: as bare text or as JSON.

Bare text has no quotes, so `5` may be a text or a number: the kinds of values that the schema allows decide. Where it
allows texts and says nothing more of them than their length or which they may be, every value is bare. Elsewhere a
value is JSON, and what is no JSON of an allowed kind is a text as it stands: the grammar writes quotes around texts
there, a template writes none, and both are read back as what they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, final

from agentspeed.chat.calls import Keys, finite
from agentspeed.tools.schema import EntryKinds, Schema, entry_kinds

ANYTHING: Final = EntryKinds(
    frozenset({"null", "boolean", "integer", "number", "string", "array", "object"}), texts=None
)
"""What an argument is of which no schema says anything."""
TEXT: Final = EntryKinds(frozenset({"string"}), texts=())
NO_TEXT: Final = EntryKinds(ANYTHING.kinds - {"string"}, texts=None)
_SPACE: Final = " \t\r\n"
_STARTS: Final = {"string": '"', "array": "[", "object": "{"}


@final
class ArgumentKinds:
    """What the arguments of tools may be, of each tool's parameters by its name."""

    def __init__(self, tools: Mapping[str, Schema]) -> None:
        self._tools = tools
        self._known: dict[str, Mapping[str, EntryKinds]] = {}

    def of(self, tool: str, key: str) -> EntryKinds:
        """Anything where no schema says more."""
        if tool not in self._known:
            self._known[tool] = entry_kinds(self._tools[tool]) if tool in self._tools else {}
        return self._known[tool].get(key, ANYTHING)


def is_bare(kinds: EntryKinds, close: str) -> bool:
    """Whether every value is bare text. `close` ends a value, so no text that the schema names may hold it."""
    if kinds.texts is None:
        return False
    return not close or not any(close in text for wording in kinds.texts for text in wording.only or ())


def end_of(raw: str, start: int, kinds: EntryKinds, close: str) -> int:
    """Where `close` ends the value that begins at `start`; -1 while it does not. In JSON, strings may hold it."""
    first = re.compile(rf"[{_SPACE}]*(.?)", re.DOTALL).match(raw, start)
    if first is None or is_bare(kinds, close) or not first[1] or first[1] not in _starts(kinds):
        return raw.find(close, start)
    return _after_strings(raw, start, close)


def read_value(text: str, kinds: EntryKinds, keys: Keys) -> str:
    """A value as JSON. What should be JSON and is none is a text: so a model that writes it there means it."""
    if is_bare(kinds, closing(keys)):
        return _quoted(text)
    bare = text.strip(_SPACE)
    told = next((word for word, spelling in keys.words if spelling == bare), bare)
    kind = _kind(told)
    if kind is None or ("string" in kinds.kinds and not _allows(kinds, kind, told)):
        return _quoted(text)
    return told


def write_text(text: str, kinds: EntryKinds, keys: Keys) -> str | None:
    """What a template that writes a text as it stands is given for it, so that it is read back: the text, or its JSON
    where the text would be read as something else. None where neither is."""
    if keys.text_open != keys.json_open:  # the template says that it is a text
        kinds = TEXT
    for said in (text, _quoted(text)):
        ends = end_of(said + keys.value_close, 0, kinds, closing(keys)) == len(said)
        if ends and read_value(said, kinds, keys) == _quoted(text):
            return said
    return None


def closing(keys: Keys) -> str:
    """What ends a value for who reads it: the space after it may be any."""
    return keys.value_close.rstrip()


def _allows(kinds: EntryKinds, kind: str, told: str) -> bool:
    """Whether a value of this kind may be meant where a text may be, too."""
    if kind == "integer":
        return not kinds.kinds.isdisjoint({"integer", "number"})
    return kind in kinds.kinds or (kind == "number" and "integer" in kinds.kinds and float(told).is_integer())


def _kind(text: str) -> str | None:
    """The kind of a JSON text; None for one that is not JSON, or holds a number that is too large for one."""
    try:
        value = json.loads(text, parse_int=_Whole, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        return None
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case _Whole():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case _:
            return "array" if isinstance(value, list) else "object"


class _Whole(str):
    """A whole number as it was written: Python reads none of more than some thousand digits."""

    __slots__ = ()


def _starts(kinds: EntryKinds) -> str:
    """What JSON in which a string may stand begins with here."""
    if "string" not in kinds.kinds:
        return "".join(_STARTS.values())
    return "".join(start for kind, start in _STARTS.items() if kind in kinds.kinds)


def _after_strings(text: str, start: int, close: str) -> int:
    """Where `close` stands outside of JSON strings; -1 where it does not, or a string is still open."""
    for found in re.finditer(rf'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|{re.escape(close)}', text[start:], re.DOTALL):
        if found[0] == close:
            return start + found.start()
    return -1


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
