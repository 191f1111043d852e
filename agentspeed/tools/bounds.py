"""Closes every open end of a JSON schema, so that text made under it always comes to an end.

A grammar made from an ordinary schema lets a model write forever: strings, arrays, numbers and maps have no length.
`bounded` returns an equivalent schema in which each of them has one. What has no bound (anything goes, recursion) and
every keyword that a grammar would pass over is refused by name, and never guessed or dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.formats import ENDING, OF_THE_GRAMMAR, PATTERNS, PLAIN
from agentspeed.tools.joining import joined, values_allowed
from agentspeed.tools.keywords import KINDS, KNOWN, for_the_grammar, is_number
from agentspeed.tools.keywords import Json as Json
from agentspeed.tools.keywords import Schema as Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a schema gets where it names no bound itself; a tighter bound of its own is kept."""

    string_chars: int = 1024
    array_items: int = 32
    map_entries: int = 16
    key_chars: int = 64
    integer_digits: int = 15
    number_limit: float = 1e12
    number_step: float = 1e-6

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            whole = isinstance(bound.default, int)
            if not is_number(value) or not 0 < value < math.inf or (whole and not isinstance(value, int)):
                kind = "a whole number" if whole else "a number"
                raise SchemaUnsupported(f"Bounds {bound.name} is {value!r}; it must be {kind} above 0.")


DEFAULT_BOUNDS: Final = Bounds()
"""What applies unless you say otherwise."""

_UNIONS: Final = ("allOf", "anyOf", "oneOf")


def bounded(schema: Mapping[str, Json], bounds: Bounds = DEFAULT_BOUNDS) -> Schema:
    """The same schema with every open end closed; does not modify its argument.

    Raises `SchemaUnsupported` naming the place and what to write instead."""
    if not isinstance(bounds, Bounds):
        raise SchemaUnsupported(f"bounds is {bounds!r}; it must be a Bounds.", remedy="Write Bounds(string_chars=40).")
    if not isinstance(schema, Mapping):
        raise SchemaUnsupported(
            f"The schema is {schema!r}, which is not a JSON schema.", remedy='Pass a dict such as {"type": "integer"}.'
        )
    raw = schema.get("$defs", schema.get("definitions", {}))
    definitions = raw if isinstance(raw, dict) else {}
    walk = _Walk(bounds, definitions)
    closed = walk.close(dict(schema), "$")
    if walk.closed:
        closed["$defs"] = dict(walk.closed)
    return closed


class _Walk:
    """One pass over a schema: each definition is closed once and a definition inside itself is refused."""

    def __init__(self, bounds: Bounds, definitions: Mapping[str, Json]) -> None:
        self.bounds = bounds
        self.definitions = definitions
        self.closed: dict[str, Json] = {}
        self.open: list[str] = []

    def close(self, schema: Json, at: str) -> Schema:
        if not isinstance(schema, dict) or not (rest := for_the_grammar(schema)):
            raise _refuse(at, "allows any JSON value", "say what it may be, e.g. a type, an enum or a model")
        if unknown := sorted(rest.keys() - KNOWN):
            raise _inexpressible(
                at, f"uses {', '.join(unknown)}", "Leave the keyword out and check the value afterwards."
            )
        if "$ref" in rest:
            return self._ref(rest, at)
        for union in _UNIONS:
            if union in rest:
                return self._union(rest, union, at)
        if "enum" in rest:
            return {"enum": values_allowed(rest, at)}
        if "const" in rest:
            return {"const": values_allowed(rest, at)[0]}
        return self._typed(rest, at)

    def _ref(self, schema: Schema, at: str) -> Schema:
        ref = str(schema["$ref"])
        name = ref.rsplit("/", 1)[-1]
        if ref not in (f"#/$defs/{name}", f"#/definitions/{name}") or name not in self.definitions:
            raise _refuse(at, f"refers to {ref}, which is not in its $defs", "put the definition into $defs")
        if name in self.open:
            raise _refuse(at, f"contains {name} inside {name}", "limit the depth: write one model per level")
        beside = _without(schema, "$ref")
        if name in self.closed and not beside:
            return {"$ref": f"#/$defs/{name}"}
        definition = self.definitions[name]
        self.open.append(name)
        if beside:  # what is said here holds here only: the definition is written out for this one place
            definition = joined(beside, for_the_grammar(_mapping(definition, at)), at)
        closed = self.close(definition, f"{at}<{name}>")
        _ = self.open.pop()
        if beside:
            return closed
        self.closed[name] = closed
        return {"$ref": f"#/$defs/{name}"}

    def _union(self, schema: Schema, union: str, at: str) -> Schema:
        options, beside = schema[union], _without(schema, union)
        if not isinstance(options, list) or not options:
            raise _refuse(at, f"has an empty {union}", "name at least one option")
        if union == "allOf":
            for option in options:
                beside = joined(beside, for_the_grammar(_mapping(option, at)), at)
            return self.close(beside, at)
        if beside:
            options = [joined(beside, for_the_grammar(_mapping(option, at)), at) for option in options]
        return {"anyOf": [self.close(option, f"{at}|{number}") for number, option in enumerate(options)]}

    def _typed(self, schema: Schema, at: str) -> Schema:
        kind = schema.get("type") or ("object" if "properties" in schema else None)
        if isinstance(kind, list):
            return {"anyOf": [self.close({**schema, "type": one}, at) for one in kind]}
        if isinstance(kind, str) and kind in KINDS:
            schema = {"type": kind, **{key: value for key, value in schema.items() if key in KINDS[kind]}}
        match kind:
            case "null" | "boolean":
                return schema
            case "integer":
                limit = 10**self.bounds.integer_digits - 1
                return _with_limits(schema, -limit, limit, at)
            case "number":
                limits = self.bounds.number_limit
                return {"multipleOf": self.bounds.number_step, **_with_limits(schema, -limits, limits, at)}
            case "string":
                return self._string(schema, at)
            case "array":
                return self._array(schema, at)
            case "object":
                return self._object(schema, at)
            case _:
                raise _refuse(at, f"has no type (it says {kind!r})", "give it a type")

    def _string(self, schema: Schema, at: str) -> Schema:
        least, named = schema.get("minLength", 0), str(schema.get("format"))
        default = max(self.bounds.string_chars, least if isinstance(least, int) else 0)
        closed: Schema = dict(schema) if named in ENDING else {"maxLength": default, **schema}
        if "format" not in schema or named in OF_THE_GRAMMAR:
            return closed
        del closed["format"]
        if named in PLAIN:
            return closed
        if named not in PATTERNS:
            raise _inexpressible(
                at, f"has the format {named!r}", "Say its shape as a pattern, or check a plain string afterwards."
            )
        if "pattern" in schema:
            return {"allOf": [closed, {"type": "string", "pattern": PATTERNS[named]}]}
        return {**closed, "pattern": PATTERNS[named]}

    def _array(self, schema: Schema, at: str) -> Schema:
        closed = dict(schema)
        first = schema.get("prefixItems")
        if isinstance(first, list):
            closed["prefixItems"] = [self.close(item, f"{at}[{number}]") for number, item in enumerate(first)]
            _ = closed.setdefault("items", False)
        if closed.get("items") is False:
            length = len(first) if isinstance(first, list) else 0
            most = schema.get("maxItems", length)
            closed["maxItems"] = min(most, length) if is_number(most) else most
            return closed
        if closed.get("maxItems") == 0:
            return {**closed, "items": False}
        least = schema.get("minItems", 0)
        default = max(self.bounds.array_items, least if isinstance(least, int) else 0)
        closed["items"] = self.close(schema.get("items"), f"{at}[]")
        closed["maxItems"] = schema.get("maxItems", default)
        return closed

    def _object(self, schema: Schema, at: str) -> Schema:
        if "patternProperties" in schema:
            raise _refuse(at, "uses patternProperties", "use additionalProperties or a list of key and value")
        required, more = schema.get("required", []), schema.get("additionalProperties", False)
        named = _mapping(schema.get("properties", {}), at)
        properties: Schema = {name: self.close(value, f"{at}.{name}") for name, value in named.items()}
        closed: Schema = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        if more is False or (more is True and properties):
            _check_count(schema, at)
            return closed
        value = self.close({} if more is True else more, f"{at}.*")
        known = required if isinstance(required, list) else []
        if any(name not in known or one != value for name, one in properties.items()):
            raise _inexpressible(
                at, "has properties beside additionalProperties", "Put the further entries into one property."
            )
        key = r'^[^"\\\x00-\x1f]{1,' + f"{self.bounds.key_chars}}}$"
        closed["patternProperties"] = {key: value}
        least = schema.get("minProperties", 0)
        default = max(self.bounds.map_entries + len(properties), least if isinstance(least, int) else 0)
        return {**closed, "minProperties": least, "maxProperties": schema.get("maxProperties", default)}


def _check_count(schema: Schema, at: str) -> None:
    """A grammar counts no optional properties: a count is kept only where it is true of every such object."""
    named, required = schema.get("properties"), schema.get("required")
    fewest = len(required) if isinstance(required, list) else 0
    most = len(named) if isinstance(named, dict) else 0
    least, limit = schema.get("minProperties", 0), schema.get("maxProperties", most)
    unmet = [] if is_number(least) and least <= fewest else [f"minProperties {least}"]
    unmet += [] if is_number(limit) and limit >= most else [f"maxProperties {limit}"]
    if unmet:
        raise _inexpressible(
            at, f"has {' and '.join(unmet)} over optional properties", "Name them in required, or leave the count out."
        )


def _without(schema: Schema, key: str) -> Schema:
    return {name: value for name, value in schema.items() if name != key}


def _mapping(value: Json, at: str) -> Schema:
    if not isinstance(value, dict):
        raise _refuse(at, "has something that is not an object where a schema is due", "check the schema")
    return value


def _with_limits(schema: Schema, least: float, most: float, at: str) -> Schema:
    for key, limit in schema.items():
        if key != "type" and not is_number(limit):
            raise _inexpressible(at, f"has {key} {limit!r}", f"Write a number as {key}.")
    closed = dict(schema)
    if "exclusiveMinimum" not in closed:
        _ = closed.setdefault("minimum", least)
    if "exclusiveMaximum" not in closed:
        _ = closed.setdefault("maximum", most)
    return closed


def _refuse(at: str, what: str, remedy: str) -> SchemaUnsupported:
    return SchemaUnsupported(
        f"The schema at {at} {what}, so output under it might never end.", remedy=f"{remedy[0].upper()}{remedy[1:]}."
    )


def _inexpressible(at: str, what: str, remedy: str) -> SchemaUnsupported:
    return SchemaUnsupported(f"The schema at {at} {what}, which a grammar cannot express.", remedy=remedy)
