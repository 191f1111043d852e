"""What a value may be at most where its schema names no bound: output under a grammar always comes to an end."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from agentspeed.errors import SchemaUnsupported

_MOST: Final = {"integer_digits": 300, "fraction_digits": 300, "exponent": 300, "nesting": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a schema gets where it names no bound itself; a tighter bound of its own is kept, and so is a wider one.

    `nesting` is how deep a value goes into itself: a recursive model, or any JSON. `exponent` bounds the power of ten
    of a number without bounds."""

    string_chars: int = 1024
    array_items: int = 32
    map_entries: int = 16
    key_chars: int = 64
    integer_digits: int = 18
    fraction_digits: int = 17
    exponent: int = 300
    nesting: int = 6

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            most = _MOST.get(bound.name, 1 << 20)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
                raise SchemaUnsupported(
                    f"Bounds {bound.name} is {value!r}; it must be a whole number from 1 to {most}."
                )


DEFAULT_BOUNDS: Final = Bounds()
"""What applies unless you say otherwise."""
