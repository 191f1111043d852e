"""Closes every open end of a JSON schema, so that text made under it always comes to an end.

A grammar made from an ordinary schema lets a model write forever: strings, arrays, numbers and maps have no length.
`bounded` returns an equivalent schema in which each of them has one. What has no bound (anything goes, recursion) is
refused by name and never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from agentspeed.errors import SchemaUnsupported

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
Schema: TypeAlias = dict[str, Json]


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


DEFAULT_BOUNDS: Final = Bounds()
"""What applies unless you say otherwise."""

_NOT_FOR_THE_GRAMMAR: Final = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator", "$comment"}
)
_REFUSED: Final = frozenset(
    {"not", "if", "then", "else", "uniqueItems", "contains", "dependentRequired", "dependentSchemas", "propertyNames",
     "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "additionalItems"}
)
_FIXED_FORMATS: Final = frozenset({"date", "time", "duration", "ipv4", "ipv6", "uuid"})
_UNIONS: Final = ("anyOf", "oneOf", "allOf")


def bounded(schema: Mapping[str, Json], bounds: Bounds = DEFAULT_BOUNDS) -> Schema:
    """The same schema with every open end closed; does not modify its argument.

    Raises `SchemaUnsupported` naming the place and what to write instead."""
    raw = schema.get("$defs", schema.get("definitions", {}))
    definitions = raw if isinstance(raw, dict) else {}
    walk = _Walk(bounds, definitions)
    closed = walk.close({key: value for key, value in schema.items() if key not in ("$defs", "definitions")}, "$")
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
        if not isinstance(schema, dict) or not (rest := _for_the_grammar(schema)):
            raise _refuse(at, "allows any JSON value", "say what it may be, e.g. a type, an enum or a model")
        if refused := sorted(rest.keys() & _REFUSED):
            raise SchemaUnsupported(
                f"The schema at {at} uses {', '.join(refused)}, which a grammar cannot express.",
                remedy="Leave the keyword out and check the value afterwards.",
            )
        if "$ref" in rest:
            return self._ref(rest, at)
        if "const" in rest:
            return {"const": rest["const"]}
        if "enum" in rest:
            return {"enum": rest["enum"]}
        for union in _UNIONS:
            if union in rest:
                return self._union(rest, union, at)
        return self._typed(rest, at)

    def _ref(self, schema: Schema, at: str) -> Schema:
        ref = str(schema["$ref"])
        name = ref.rsplit("/", 1)[-1]
        if ref not in (f"#/$defs/{name}", f"#/definitions/{name}") or name not in self.definitions:
            raise _refuse(at, f"refers to {ref}, which is not in its $defs", "put the definition into $defs")
        if name in self.open:
            raise _refuse(at, f"contains {name} inside {name}", "limit the depth: write one model per level")
        if name not in self.closed:
            self.open.append(name)
            self.closed[name] = self.close(self.definitions[name], f"{at}<{name}>")
            _ = self.open.pop()
        return {"$ref": f"#/$defs/{name}"}

    def _union(self, schema: Schema, union: str, at: str) -> Schema:
        options = schema[union]
        if not isinstance(options, list) or not options:
            raise _refuse(at, f"has an empty {union}", "name at least one option")
        if union == "allOf":
            if len(options) > 1:
                raise _refuse(at, "joins several schemas with allOf", "write the joined schema out")
            return self.close({**_without(schema, "allOf"), **_mapping(options[0], at)}, at)
        if set(schema) - {union, "type"}:
            extra = ", ".join(sorted(set(schema) - {union, "type"}))
            raise _refuse(at, f"has {extra} beside {union}", f"move {extra} into each option")
        return {"anyOf": [self.close(option, f"{at}|{number}") for number, option in enumerate(options)]}

    def _typed(self, schema: Schema, at: str) -> Schema:
        kind = schema.get("type") or ("object" if "properties" in schema else None)
        match kind:
            case list():
                return {"anyOf": [self.close({**schema, "type": one}, at) for one in kind]}
            case "null" | "boolean":
                return {"type": kind}
            case "integer":
                return self._integer(schema)
            case "number":
                return self._number(schema)
            case "string":
                return self._string(schema)
            case "array":
                return self._array(schema, at)
            case "object":
                return self._object(schema, at)
            case _:
                raise _refuse(at, f"has no type (it says {kind!r})", "give it a type")

    def _integer(self, schema: Schema) -> Schema:
        limit = 10**self.bounds.integer_digits - 1
        return _with_limits(schema, -limit, limit)

    def _number(self, schema: Schema) -> Schema:
        closed = _with_limits(schema, -self.bounds.number_limit, self.bounds.number_limit)
        _ = closed.setdefault("multipleOf", self.bounds.number_step)
        return closed

    def _string(self, schema: Schema) -> Schema:
        if schema.get("format") in _FIXED_FORMATS and "maxLength" not in schema and "pattern" not in schema:
            return dict(schema)
        least = schema.get("minLength", 0)
        default = max(self.bounds.string_chars, least if isinstance(least, int) else 0)
        return {**schema, "maxLength": schema.get("maxLength", default)}

    def _array(self, schema: Schema, at: str) -> Schema:
        closed = dict(schema)
        first = schema.get("prefixItems")
        if isinstance(first, list):
            closed["prefixItems"] = [self.close(item, f"{at}[{number}]") for number, item in enumerate(first)]
            _ = closed.setdefault("items", False)
        if closed.get("items") is False:
            closed["maxItems"] = len(first) if isinstance(first, list) else 0
            return closed
        if closed.get("maxItems") == 0:
            return {"type": "array", "items": False, "maxItems": 0}
        least = schema.get("minItems", 0)
        default = max(self.bounds.array_items, least if isinstance(least, int) else 0)
        closed["items"] = self.close(schema.get("items"), f"{at}[]")
        closed["maxItems"] = schema.get("maxItems", default)
        return closed

    def _object(self, schema: Schema, at: str) -> Schema:
        properties = _mapping(schema.get("properties", {}), at)
        required = schema.get("required", [])
        closed: Schema = {
            "type": "object",
            "properties": {name: self.close(value, f"{at}.{name}") for name, value in properties.items()},
            "required": list(required) if isinstance(required, list) else [],
            "additionalProperties": False,
        }
        more = schema.get("additionalProperties", False)
        if "patternProperties" in schema:
            raise _refuse(at, "uses patternProperties", "use additionalProperties or a list of key and value")
        if more is False or (more is True and properties):
            return closed
        key = r'^[^"\\\x00-\x1f]{1,' + f"{self.bounds.key_chars}}}$"
        closed["patternProperties"] = {key: self.close({} if more is True else more, f"{at}.*")}
        closed["maxProperties"] = schema.get("maxProperties", self.bounds.map_entries + len(properties))
        if "minProperties" in schema:
            closed["minProperties"] = schema["minProperties"]
        return closed


def _for_the_grammar(schema: Schema) -> Schema:
    def speaks(key: str, value: Json) -> bool:
        says_nothing = key == "uniqueItems" and not value
        return not (says_nothing or key in _NOT_FOR_THE_GRAMMAR or key.startswith("x-"))

    return {key: value for key, value in schema.items() if speaks(key, value)}


def _without(schema: Schema, key: str) -> Schema:
    return {name: value for name, value in schema.items() if name != key}


def _mapping(value: Json, at: str) -> Schema:
    if not isinstance(value, dict):
        raise _refuse(at, "has something that is not an object where a schema is due", "check the schema")
    return value


def _with_limits(schema: Schema, least: float, most: float) -> Schema:
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
