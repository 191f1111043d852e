"""Joins schemas that hold at once (what stands beside a `$ref`, an `allOf` or an `anyOf`) and filters an `enum` by what
stands beside it: nothing a schema says is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.keywords import AT_LEAST, AT_MOST, KINDS, Json, Schema, is_number

_READ_TOGETHER: Final = (
    frozenset({"properties", "additionalProperties", "patternProperties"}),
    frozenset({"items", "prefixItems"}),
)
"""Keywords whose meaning depends on their neighbours: they stay with these."""


def joined(one: Schema, other: Schema, at: str) -> Schema:
    """What holds when both hold. Raises `SchemaUnsupported` naming the keyword that cannot be said as one."""
    for together in _READ_TOGETHER:
        mine, theirs = one.keys() & together, other.keys() & together
        if mine and theirs and {key: one[key] for key in mine} != {key: other[key] for key in theirs}:
            raise _twice(", ".join(sorted(mine | theirs)), at)
    result = {**one, **other}
    for key in sorted(one.keys() & other.keys()):
        if not _same(one[key], other[key]):
            result[key] = _both(key, one[key], other[key], at)
    return result


def values_allowed(schema: Schema, at: str) -> list[Json]:
    """The values of `enum` or `const` that everything beside it allows."""
    given = schema.get("enum", [schema.get("const")])
    values = given if isinstance(given, list) else []
    if "enum" in schema and "const" in schema:
        values = [value for value in values if _same(value, schema["const"])]
    for key, limit in schema.items():
        if key not in ("enum", "const"):
            values = [value for value in values if _allows(key, limit, value, at)]
    if not values:
        raise SchemaUnsupported(
            f"The schema at {at} has an enum or const of which no value is allowed by what stands beside it.",
            remedy="Correct it, or the keywords beside it.",
        )
    return values


def _both(key: str, one: Json, other: Json, at: str) -> Json:
    if key in AT_LEAST and is_number(one) and is_number(other):
        return max(one, other)
    if key in AT_MOST and is_number(one) and is_number(other):
        return min(one, other)
    if key == "type":
        return _types(_listed(one), _listed(other), at)
    if key == "required" and isinstance(one, list) and isinstance(other, list):
        return [*one, *(name for name in other if name not in one)]
    if key == "enum" and isinstance(one, list) and isinstance(other, list):
        return [value for value in one if any(_same(value, known) for known in other)]
    raise _twice(key, at)


def _types(one: list[Json], other: list[Json], at: str) -> Json:
    kinds = [kind for kind in one if kind in other or (kind == "integer" and "number" in other)]
    kinds += [kind for kind in other if kind == "integer" and "number" in one and kind not in kinds]
    if not kinds:
        raise SchemaUnsupported(
            f"The schema at {at} must be {one} and {other} at once, which no value is.", remedy="Correct its type."
        )
    return kinds[0] if len(kinds) == 1 else kinds


def _allows(key: str, limit: Json, value: Json, at: str) -> bool:
    if key == "type":
        return any(_is_kind(kind, value) for kind in _listed(limit))
    if not any(key in KINDS[kind] and _is_kind(kind, value) for kind in KINDS):
        return True  # a keyword says nothing about values of other types
    size = len(value) if isinstance(value, str | list | dict) else value
    if key not in _COMPARED or not is_number(limit) or not is_number(size):
        raise SchemaUnsupported(
            f"The schema at {at} has {key} beside enum or const, which is not compared with its values.",
            remedy=f"Leave out {key}, and the values that it forbids.",
        )
    return _COMPARED[key](size, limit)


_COMPARED: Final[dict[str, Callable[[float, float], bool]]] = {
    **dict.fromkeys(("minimum", "minLength", "minItems", "minProperties"), lambda size, limit: size >= limit),
    **dict.fromkeys(("maximum", "maxLength", "maxItems", "maxProperties"), lambda size, limit: size <= limit),
    "exclusiveMinimum": lambda size, limit: size > limit,
    "exclusiveMaximum": lambda size, limit: size < limit,
}


def _is_kind(kind: Json, value: Json) -> bool:
    match kind:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return is_number(value) and value == int(value)
        case "number":
            return is_number(value)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case _:
            return False


def _listed(kind: Json) -> list[Json]:
    return kind if isinstance(kind, list) else [kind]


def _same(one: Json, other: Json) -> bool:
    """Equal as JSON: True is not 1."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _twice(keys: str, at: str) -> SchemaUnsupported:
    return SchemaUnsupported(
        f"The schema at {at} says {keys} in two places that hold at once.", remedy="Write the joined schema out."
    )
