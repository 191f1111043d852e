"""Which arguments a family that writes them one by one writes as bare text, and which as JSON.

Bare text has no quotes, so a reader could take `5` for a number. The grammar lets a model write bare text where the
schema allows nothing but text, and the parser reads it so by the same rule; everything else is JSON, quotes included.
"""

from __future__ import annotations

from typing import Final

from agentspeed.tools.schema import Json, Schema

_OF_BARE_TEXT: Final = frozenset({"type", "minLength", "maxLength"})
_FOR_PEOPLE: Final = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
     "$comment", "$schema", "$id", "$defs", "definitions", "contentEncoding", "contentMediaType", "contentSchema"}
)  # fmt: skip
"""Keywords that say nothing of a value, and definitions, which are read where they are referred to."""


def is_text(schema: Schema, close: str) -> bool:
    """Whether a value of `schema` is bare text. `close` ends a value, so no option may hold it."""
    rest = {key: value for key, value in schema.items() if key not in _FOR_PEOPLE and not key.startswith("x-")}
    options = texts(rest)
    if options is not None:
        return not close or not any(close in option for option in options)
    return rest.get("type") == "string" and rest.keys() <= _OF_BARE_TEXT


def texts(schema: Schema) -> list[str] | None:
    """The texts of which a value is one, if the schema says so and nothing else."""
    if not schema.keys() <= {"type", "enum", "const"} or schema.get("type", "string") != "string":
        return None
    options: Json = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        return None
    return [option for option in options if isinstance(option, str)]
