"""A JSON schema as a rule of the grammar library, and that library's verdict on a whole grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from agentspeed.errors import ExtraMissing, SchemaUnsupported
from agentspeed.tools.bounds import bounded
from agentspeed.tools.keywords import Json, Schema

HEAD: Final = "%llguidance {}"
"""The first line of every grammar in the library's own language."""
_COMPACT: Final[Schema] = {"whitespace_flexible": False}
_SPACED: Final[Schema] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_rule(closed: Schema, *, spaced: bool = False) -> str:
    """One value of a `bounded` schema, in compact JSON; `spaced` puts one space after each comma and colon."""
    style = _SPACED if spaced else _COMPACT
    return "%json " + json.dumps({**closed, "x-guidance": style}, ensure_ascii=False, separators=(",", ":"))


@lru_cache(maxsize=256)
def check_grammar(source: str) -> None:
    """Raises `SchemaUnsupported` with the grammar library's own reason when it cannot express the source."""
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ExtraMissing("Tools and output= need llguidance.", remedy="Install agentspeed[engine].") from error
    is_error, messages = LLMatcher.validate_grammar_with_warnings(source)
    if is_error:
        raise SchemaUnsupported(
            f"This cannot be expressed as a grammar: {_reason(messages)}.", remedy="Correct the schema or regex."
        )


def check_expressible(schema: Mapping[str, Json]) -> None:
    """Raises `SchemaUnsupported` for what no turn could be constrained to: known when a tool is made, not when a model
    is about to use it."""
    check_grammar(f"{HEAD}\nstart: {json_rule(bounded(schema))}\n")


def _reason(messages: Sequence[str]) -> str:
    """The library's first line says what, and one that begins with "error:" says why; between them is a picture."""
    lines = " ".join(messages).splitlines() or ["no reason was given"]
    why = [line.removeprefix("error:") for line in lines[1:] if line.startswith("error:")]
    return "".join([lines[0], *why[:1]]).rstrip(". ")
