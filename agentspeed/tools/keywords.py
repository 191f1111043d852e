"""The keywords of a JSON schema: which are kept, to what type of value each belongs, which are for people only."""

from __future__ import annotations

from typing import Final, TypeAlias, TypeGuard

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
Schema: TypeAlias = dict[str, Json]

_OF_NUMBERS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
KINDS: Final[dict[str, frozenset[str]]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": _OF_NUMBERS,
    "number": _OF_NUMBERS,
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset(
        {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}
    ),
}
"""The keywords of each type. JSON schema says that they mean nothing for values of the others."""
AT_LEAST: Final = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
AT_MOST: Final = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"})
KNOWN: Final = frozenset({"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}).union(*KINDS.values())
"""All that is kept; what is neither here nor an annotation is refused by name."""

_ANNOTATIONS: Final = frozenset(
    {
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "$comment",
        "$schema",
        "$id",
        "$defs",
        "definitions",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
    }
)


def for_the_grammar(schema: Schema) -> Schema:
    """Without what is said to people, and without definitions, which are read where they are referred to."""

    def speaks(key: str, value: Json) -> bool:
        says_nothing = key == "uniqueItems" and not value
        return not (says_nothing or key in _ANNOTATIONS or key.startswith("x-"))

    return {key: value for key, value in schema.items() if speaks(key, value)}


def is_number(value: Json) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
