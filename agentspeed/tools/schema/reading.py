"""Reads the keywords of one schema: what each says of which kind of value.

JSON Schema's rules hold: a keyword says nothing of values of other kinds, and an unknown one is for people only.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, Protocol

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.schema.atoms import (
    ANYTHING,
    NOTHING,
    Array,
    Atom,
    Contains,
    Entries,
    Items,
    Number,
    Object,
    Plain,
    Shape,
    Term,
    Text,
    Values,
    full,
    meet,
)
from agentspeed.tools.schema.formats import KNOWN
from agentspeed.tools.schema.numbers import Span
from agentspeed.tools.schema.patterns import UnknownPattern, read_pattern
from agentspeed.tools.schema.values import KINDS, Json, Schema, exact, is_count, is_number, key_of, kind_of


class Terms(Protocol):
    """What makes a term of a schema that stands inside another."""

    def term(self, schema: Json, base: str, at: str) -> Term: ...
    def give_up(self, at: str, what: str, remedy: str) -> None:
        """Refuses, or leaves it to the check afterwards and returns."""

    def note(self, at: str, what: str) -> None:
        """Keeps a reason why no value may be left."""


OWN: Final = frozenset(
    {"type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
     "maxLength", "pattern", "format", "items", "prefixItems", "additionalItems", "minItems", "maxItems",
     "uniqueItems", "contains", "minContains", "maxContains", "properties", "required", "additionalProperties",
     "patternProperties", "minProperties", "maxProperties", "propertyNames", "dependentRequired"}
)  # fmt: skip
"""Keywords that say something of the value itself; the others join schemas, or are for people."""


def own_shape(schema: Schema, base: str, at: str, terms: Terms) -> Shape:
    """What the keywords of `OWN` say together. Raises `SchemaUnsupported` for one that is wrong."""
    reader = _Keywords(schema, base, at, terms)
    readers: dict[str, Callable[[], Atom | None]] = {
        "null": lambda: full("null"),
        "boolean": lambda: full("boolean"),
        "number": reader.number,
        "string": reader.text,
        "array": reader.array,
        "object": reader.object,
    }
    kinds = reader.kinds()
    shape: Shape = {}
    for kind in KINDS:
        if kind not in kinds:
            continue
        if (atom := readers[kind]()) is None:
            terms.note(at, f"has bounds that no {kind} is within")
        else:
            if kinds[kind] and isinstance(atom, Number):
                whole = meet(atom, Number(whole=True))
                if whole is None:
                    continue
                atom = whole
            shape[kind] = (atom,)
    return reader.constants(shape)


class _Keywords:
    def __init__(self, schema: Schema, base: str, at: str, terms: Terms) -> None:
        self.schema = schema
        self.base = base
        self.at = at
        self.terms = terms

    def kinds(self) -> dict[str, bool]:
        """The kinds that `type` lets through, and of numbers whether only whole ones."""
        given = self.schema.get("type")
        if given is None and "type" not in self.schema:
            return dict.fromkeys(KINDS, False)
        listed = given if isinstance(given, list) else [given]
        found: dict[str, bool] = {}
        for kind in listed:
            if kind == "integer":
                _ = found.setdefault("number", True)
            elif isinstance(kind, str) and kind in KINDS:
                found[kind] = False
            else:
                raise self._wrong("type", "name a type of JSON")
        if not found:
            raise self._wrong("type", "name a type of JSON")
        return found

    def constants(self, shape: Shape) -> Shape:
        """`enum` and `const` over what the other keywords leave."""
        for keyword in ("enum", "const"):
            if keyword not in self.schema:
                continue
            given = self.schema[keyword]
            if keyword == "enum" and not isinstance(given, list):
                raise self._wrong("enum", "write a list of values")
            values = given if keyword == "enum" and isinstance(given, list) else [given]
            kept: Shape = {}
            for kind, atoms in shape.items():
                mine = tuple({key_of(value): value for value in values if kind_of(value) == kind}.values())
                met = [meet(atom, _of(kind, mine)) for atom in atoms] if mine else []
                if left := tuple(atom for atom in met if atom is not None):
                    kept[kind] = left
            shape = kept
        return shape

    def number(self) -> Number | None:
        low = self._number("minimum")
        high = self._number("maximum")
        span = Span(low, high)
        for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            given = self.schema.get(keyword)
            lower = keyword == "exclusiveMinimum"
            if isinstance(given, bool):  # up to draft 4 it says that the other keyword's bound is exclusive
                end = low if lower else high
                if given and end is not None:
                    span = span.meet(Span(low=end, low_open=True) if lower else Span(high=end, high_open=True))
            elif (end := self._number(keyword)) is not None:
                span = span.meet(Span(low=end, low_open=True) if lower else Span(high=end, high_open=True))
        step = self._number("multipleOf")
        if step is not None and step <= 0:
            raise self._wrong("multipleOf", "write a number above 0")
        if span.is_empty(False):
            return None
        return Number(span, multiples=frozenset() if step is None else frozenset({step}))

    def text(self) -> Text | None:
        least, most = self._count("minLength"), self._count("maxLength")
        named = self.schema.get("format")
        patterns: frozenset[str] = frozenset()
        if "pattern" in self.schema:
            pattern = self.schema["pattern"]
            if not isinstance(pattern, str):
                raise self._wrong("pattern", "write a regular expression")
            if self._readable(pattern):
                patterns = frozenset({pattern})
        if most is not None and (least or 0) > most:
            return None
        formats = frozenset({named}) if isinstance(named, str) and named in KNOWN else frozenset()
        return Text(least or 0, most, patterns, formats=formats)

    def array(self) -> Array | None:
        least, most = self._count("minItems"), self._count("maxItems")
        if most is not None and (least or 0) > most:
            return None
        first, rest = self.schema.get("prefixItems"), self.schema.get("items")
        where = "prefixItems"
        if isinstance(rest, list):  # up to draft 2019 the first few items stood in a list under items
            first, rest, where = rest, self.schema.get("additionalItems"), "items"
        if first is not None and not isinstance(first, list):
            raise self._wrong("prefixItems", "write a list of schemas")
        items: tuple[Items, ...] = ()
        if first or rest is not None:
            items = (
                Items(
                    tuple(self._term(item, f"{where}[{number}]") for number, item in enumerate(first or [])),
                    ANYTHING if rest is None else self._term(rest, "[]"),
                ),
            )
        contains: tuple[Contains, ...] = ()
        if "contains" in self.schema:
            fewest = self._count("minContains")
            contains = (
                Contains(
                    self._term(self.schema["contains"], "contains"),
                    1 if fewest is None else fewest,
                    self._count("maxContains"),
                ),
            )
        unique = self.schema.get("uniqueItems", False)
        if not isinstance(unique, bool):
            raise self._wrong("uniqueItems", "write true or false")
        return Array(items, least or 0, most, unique, contains)

    def object(self) -> Object | None:
        least, most = self._count("minProperties"), self._count("maxProperties")
        if most is not None and (least or 0) > most:
            return None
        named = self._mapping("properties")
        patterned = self._mapping("patternProperties")
        more = self.schema.get("additionalProperties")
        entries: tuple[Entries, ...] = ()
        if named or patterned or "additionalProperties" in self.schema or "properties" in self.schema:
            entries = (
                Entries(
                    tuple((name, self._term(value, name)) for name, value in named.items()),
                    tuple(
                        (pattern, self._term(value, f"/{pattern}/"))
                        for pattern, value in patterned.items()
                        if self._readable(pattern)
                    ),
                    self._term(more, "*") if "additionalProperties" in self.schema else None,
                    listed="properties" in self.schema,
                ),
            )
        required = self.schema.get("required", [])
        if isinstance(required, bool):  # draft 3 said it of the property itself
            required = []
        names = ANYTHING
        if "propertyNames" in self.schema:
            names = self._term(self.schema["propertyNames"], "propertyNames")
        needs = [
            (name, one)
            for name, needed in self._mapping("dependentRequired").items()
            for one in self._names("dependentRequired", needed)
        ]
        return Object(entries, self._names("required", required), least or 0, most, names, tuple(needs))

    def _readable(self, pattern: str) -> bool:
        try:
            _ = read_pattern(pattern)
        except UnknownPattern as error:
            self.terms.give_up(self.at, f"has the pattern {pattern!r}: {error}", "Write a simpler pattern.")
            return False
        return True

    def _term(self, schema: Json, below: str) -> Term:
        if schema is True:
            return ANYTHING
        return NOTHING if schema is False else self.terms.term(schema, self.base, f"{self.at}.{below}")

    def _number(self, keyword: str) -> Fraction | None:
        if keyword not in self.schema:
            return None
        given = self.schema[keyword]
        if not is_number(given):
            raise self._wrong(keyword, f"write a number as {keyword}")
        return exact(given)

    def _count(self, keyword: str) -> int | None:
        if keyword not in self.schema:
            return None
        given = self.schema[keyword]
        if is_count(given):
            return int(given)
        if is_number(given) and given == int(given) and given > 0 and keyword.startswith("max"):
            return None
        raise self._wrong(keyword, f"write a whole number, 0 or more, as {keyword}")

    def _mapping(self, keyword: str) -> Schema:
        given = self.schema.get(keyword, {})
        if not isinstance(given, dict):
            raise self._wrong(keyword, "write an object")
        return given

    def _names(self, keyword: str, given: Json) -> tuple[str, ...]:
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise self._wrong(keyword, "write a list of names")
        return tuple(dict.fromkeys(name for name in given if isinstance(name, str)))

    def _wrong(self, keyword: str, remedy: str) -> SchemaUnsupported:
        return wrong(self.at, f"has {keyword} {_shown(self.schema.get(keyword))}, which is no schema", remedy)


def wrong(at: str, what: str, remedy: str) -> SchemaUnsupported:
    return SchemaUnsupported(f"The schema at {at} {what}.", remedy=f"{remedy[0].upper()}{remedy[1:]}.")


def _shown(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _of(kind: str, values: tuple[Json, ...]) -> Atom:
    only = Values(values)
    match kind:
        case "number":
            return Number(values=only)
        case "string":
            return Text(values=only)
        case "array":
            return Array(values=only)
        case "object":
            return Object(values=only)
        case _:
            return Plain(kind, only)
