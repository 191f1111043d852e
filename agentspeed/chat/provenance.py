"""Which characters of a rendered text are the template's own and which came from tool definitions.

A template writes definitions through loops and filters, so no single placeholder can stand for them as it does for a
message. They are rendered twice instead: as they are, and with a stand-in for each character of a definition's own
texts. Where both agree the template wrote; where the second has a stand-in, content stands.
"""

from __future__ import annotations

import re
from typing import Any, Final

_STAND_INS: Final = 0xF0000
"""A private plane: the stand-in of a character is this far above it, so order and length stay."""
_TYPES: Final = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_NAMING: Final = frozenset({"$defs", "definitions", "patternProperties", "properties"})
"""Keywords whose keys are names that the author of the definition chose."""
_DATA: Final = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords under which every text is the author's."""
_KEYWORD: Final = re.compile(r"\$?[A-Za-z][A-Za-z0-9_-]*")


def veiled(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition with stand-ins for all but what templates decide by: keywords, and the names of JSON's types."""
    return {_keyword(key): _veiled(value, key) for key, value in definition.items()}


def covered(text: str) -> str:
    """A text that is content as a whole: as long, and without a control token of its own."""
    return "".join(
        character if ord(character) > 0xFFFF or character.isspace() else chr(ord(character) + _STAND_INS)
        for character in text
    )


def unveiled(text: str) -> str:
    """What a text with stand-ins is without them."""
    return text.translate(_UNVEIL)


def is_content(text: str) -> bool:
    """Whether any of it is a stand-in."""
    return text != unveiled(text)


def _veiled(value: Any, keyword: str) -> Any:
    match value:
        case str() if keyword == "type" and value in _TYPES:
            return value
        case str():
            return value.translate(_VEIL)
        case list() | tuple():
            return [_veiled(item, keyword) for item in value]
        case dict() if keyword in _DATA:
            return {_veiled(key, ""): _veiled(item, keyword) for key, item in value.items()}
        case dict() if keyword in _NAMING:
            return {_veiled(key, ""): _veiled(item, "") for key, item in value.items()}
        case dict():
            return {_keyword(key): _veiled(item, key) for key, item in value.items()}
        case _:
            return value


def _keyword(key: str) -> str:
    return key if _KEYWORD.fullmatch(key) else str(_veiled(key, ""))


class _Veil(dict[int, int]):
    """A table for `str.translate` that fills itself. Space, and what JSON escapes, stay: templates strip, split and
    quote by them, and no control token has them."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        stays = code < 0x20 or code > 0xFFFF or character.isspace() or character in '"\\'
        self[code] = code if stays else code + _STAND_INS
        return self[code]


class _Unveil(dict[int, int]):
    """The way back."""

    def __missing__(self, code: int) -> int:
        self[code] = code - _STAND_INS if _STAND_INS <= code <= _STAND_INS + 0xFFFF else code
        return self[code]


_VEIL: Final = _Veil()
_UNVEIL: Final = _Unveil()
