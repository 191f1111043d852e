"""JSON values: their kinds and their equality, as JSON Schema means them."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Final, TypeAlias, TypeGuard

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
Schema: TypeAlias = dict[str, Json]

KINDS: Final = ("null", "boolean", "number", "string", "array", "object")
"""The six kinds of a value; an integer is a number that happens to be whole."""


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value says how many: a whole number, 0 or more, that an index can hold."""
    return is_number(value) and math.isfinite(value) and value == int(value) and 0 <= value < 1 << 31


def kind_of(value: Json) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def exact(number: int | float) -> Fraction:
    """The number as it was written in decimal: 0.1 is a tenth, not the nearest binary fraction."""
    return Fraction(number) if isinstance(number, int) else Fraction(Decimal(repr(number)))


def key_of(value: Json) -> object:
    """Hashable, and equal for values that are equal as JSON: 1 is 1.0, and True is not 1."""
    match value:
        case bool() | None | str():
            return (kind_of(value), value)
        case int() | float():
            return ("number", exact(value))
        case list():
            return ("array", tuple(key_of(item) for item in value))
        case dict():
            return ("object", frozenset((name, key_of(item)) for name, item in value.items()))
