"""Numbers and texts as terminals of a grammar: what an atom of either kind looks like as JSON."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Final

from agentspeed.tools.schema.atoms import Number, Text
from agentspeed.tools.schema.bounds import Bounds
from agentspeed.tools.schema.formats import ENDING, PATTERNS
from agentspeed.tools.schema.numbers import Span, constant, decimals, integers, same_number
from agentspeed.tools.schema.patterns import Pattern, any_text, literal, quoted, read_pattern
from agentspeed.tools.schema.values import Json, exact, is_number

COMPACT: Final[dict[str, Json]] = {"whitespace_flexible": False}
_PRINTABLE: Final = f"({quoted(((32, 126),))})*"


_LARGEST_STEP: Final = 1000


class Unsayable(Exception):
    """The reason why no terminal says it."""


def text_terminal(atom: Text, *, usual: int, ending: str = "") -> str:
    """A text in quotes, and what follows them. `usual`: characters at most where the atom names no bound."""
    if atom.values.only is not None:
        return " | ".join(_slashed(literal(str(value)), ending) for value in atom.values.only)
    patterns = [read_pattern(pattern) for pattern in sorted(atom.patterns)]
    patterns += [read_pattern(PATTERNS[name]) for name in sorted(atom.formats)]
    denied = [read_pattern(pattern) for pattern in sorted(atom.not_patterns)]
    most = atom.most
    if most is None and not atom.formats & ENDING:
        most = max([usual, atom.least, *(pattern.least for pattern in patterns)])
    parts = [] if most is None and atom.least == 0 else [_slashed(any_text(atom.least, most), ending)]
    parts += [_holds(pattern, ending) for pattern in patterns]
    if any(not pattern.complete for pattern in denied) or any(p.fails and not p.complete for p in patterns):
        parts.append(_slashed(_PRINTABLE, ending))  # where all readings of a pattern are one
    parts += [f"~({_holds(pattern, ending)})" for pattern in denied]
    if atom.values.never:
        parts.append(f"~{_slashed('|'.join(literal(str(value)) for value in atom.values.never), ending)}")
    if parts[0].startswith("~"):
        parts.insert(0, _slashed(any_text(0, None), ending))
    return " & ".join(parts)


def number_terminal(atom: Number, bounds: Bounds) -> str:
    """A number; empty where there is none, and a `%json` rule where the grammar library divides. Raises `Unsayable`."""
    if atom.values.only is not None:
        texts = [constant(value) for value in atom.values.only if is_number(value)]
        if atom.whole:
            texts = [str(int(value)) for value in atom.values.only if is_number(value)]
        return f"/{'|'.join(f'({text})' for text in texts)}/"
    steps = set(atom.multiples)
    if atom.whole and steps:
        steps = {step for step in steps if step.numerator != 1 or step.denominator != 1}
        steps = {step for step in steps if (1 / step).denominator != 1}
    if steps:
        return _multiples(atom, steps, bounds)
    denied = [exact(value) for value in atom.values.never if is_number(value)]
    denials = "".join(f" & ~/{same_number(value)}/" for value in denied)
    if atom.whole:
        whole = integers(atom.span, bounds)
        return "" if whole is None else f"/{whole}/{denials}"
    plain, powers = decimals(atom.span, bounds, short=bool(denied) or atom.whole is False)
    if atom.whole is False:
        plain.append(r"-?[0-9]+\.[0-9]*[1-9][0-9]*")
    body = " & ".join(f"/{part}/" for part in plain) + denials
    return body if not powers else f"({body}) | /{'|'.join(powers)}/"


def _multiples(atom: Number, steps: set[Fraction], bounds: Bounds) -> str:
    step = Fraction(math.lcm(*(one.numerator for one in steps)), math.gcd(*(one.denominator for one in steps)))
    if atom.whole:
        step = Fraction(step.numerator)
    if atom.values.never or atom.whole is False:
        raise Unsayable("divides numbers of which some are excluded")
    scaled = step
    while scaled.denominator != 1:
        scaled *= 10
    if scaled > _LARGEST_STEP:
        raise Unsayable(f"divides by {float(step):g}, a step of more than {_LARGEST_STEP} in its last place")
    limit = 10 ** min(bounds.integer_digits, 15) - 1
    span = atom.span.meet(Span(Fraction(-limit), Fraction(limit)))
    if span.is_empty(bool(atom.whole)):
        raise Unsayable("divides numbers beyond 15 digits")
    schema: dict[str, Json] = {"type": "integer" if atom.whole else "number", "multipleOf": _plain(step)}
    assert span.low is not None and span.high is not None
    schema["exclusiveMinimum" if span.low_open else "minimum"] = _plain(span.low)
    schema["exclusiveMaximum" if span.high_open else "maximum"] = _plain(span.high)
    return "%json " + json.dumps({**schema, "x-guidance": COMPACT})


def _plain(value: Fraction) -> int | float:
    if value.denominator == 1:
        if abs(value) >= 10**15:
            raise Unsayable("divides numbers beyond 15 digits")
        return int(value)
    number = float(value)
    if exact(number) != value or len(f"{number:f}".strip("-0.")) > 15:
        raise Unsayable("divides by, or bounds what it divides by, a number of more than 15 digits")
    return number


def _holds(pattern: Pattern, ending: str) -> str:
    parts = [_slashed(one, ending) for one in pattern.holds]
    parts += [f"~{_slashed(one, ending)}" for one in pattern.fails]
    return " & ".join(parts)


def _slashed(expression: str, ending: str) -> str:
    return f'/"({expression})"{ending}/'
