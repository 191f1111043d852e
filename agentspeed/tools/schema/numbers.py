"""Regular expressions of numbers within bounds, over their decimal digits: nothing goes through a float.

Comparison is that of the decimal text. A reader that takes the text as a float rounds it; rounding keeps order, so
inclusive bounds survive it. Exclusive bounds are moved to the next number that is still another float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from agentspeed.tools.schema.bounds import Bounds

_EXACT_DIGITS: Final = 15
"""So many decimal digits name different floats."""
_LARGEST_EXACT: Final = 1 << 53
"""Up to here every whole number is a float."""


@dataclass(frozen=True, slots=True)
class Span:
    """Numbers from `low` to `high`; None is no bound, and an open end is not itself one of them."""

    low: Fraction | None = None
    high: Fraction | None = None
    low_open: bool = False
    high_open: bool = False

    def meet(self, other: Span) -> Span:
        low, low_open = max((self._low(), other._low()))
        high, high_open = min((self._high(), other._high()))
        return Span(
            None if low == -math.inf else Fraction(low), None if high == math.inf else Fraction(high),
            low_open, not high_open,
        )  # fmt: skip

    def is_empty(self, whole: bool) -> bool:
        if self.low is None or self.high is None:
            return False
        if self.low > self.high or (self.low == self.high and (self.low_open or self.high_open)):
            return True
        if not whole:
            return False
        first, last = self.whole()
        return first is not None and last is not None and first > last

    def holds(self, value: Fraction) -> bool:
        above = self.low is None or value > self.low or (value == self.low and not self.low_open)
        return above and (self.high is None or value < self.high or (value == self.high and not self.high_open))

    def whole(self) -> tuple[int | None, int | None]:
        """The first and the last whole number of it."""
        low = high = None
        if self.low is not None:
            low = math.floor(self.low) + 1 if self.low_open else math.ceil(self.low)
        if self.high is not None:
            high = math.ceil(self.high) - 1 if self.high_open else math.floor(self.high)
        return low, high

    def _low(self) -> tuple[Fraction | float, bool]:
        return (-math.inf, False) if self.low is None else (self.low, self.low_open)

    def _high(self) -> tuple[Fraction | float, bool]:
        return (math.inf, True) if self.high is None else (self.high, not self.high_open)


def integers(span: Span, bounds: Bounds) -> str | None:
    """Whole numbers of the span, of `integer_digits` digits where it has no end; None when there is none."""
    first, last = span.whole()
    low = -(10 ** _digits(bounds.integer_digits, last) - 1) if first is None else first
    high = 10 ** _digits(bounds.integer_digits, first) - 1 if last is None else last
    if low > high:
        return None
    options = []
    if low < 0:
        options.append(f"-({_naturals(max(1, -high), -low)})")
    if high >= 0:
        options.append(_naturals(max(0, low), high))
    return "|".join(options)


def decimals(span: Span, bounds: Bounds, *, short: bool = False) -> tuple[list[str], list[str]]:
    """Numbers of the span: regular expressions that all hold of plain digits, and those of powers of ten, any of which
    may be it. `short` keeps to so few digits that different texts are different floats."""
    fraction = 6 if short else bounds.fraction_digits
    for end, is_open in ((span.low, span.low_open), (span.high, span.high_open)):
        if end is not None and is_open:
            fraction = min(fraction, max(1, _EXACT_DIGITS - len(str(int(abs(end))))))
    low, high = _closed(span, fraction)
    beyond = [end is not None and abs(end) > _LARGEST_EXACT for end in (low, high)]
    span = Span(low if beyond[0] else span.low, high if beyond[1] else span.high,
                span.low_open and not beyond[0], span.high_open and not beyond[1])  # fmt: skip
    for end in (low, high):
        fraction = max(fraction, 0 if end is None else _places(end))
    size = 9 if short else bounds.integer_digits
    size = _digits(size, max((int(abs(end)) for end in (low, high) if end is not None), default=0))
    plain = [f"-?(0|[1-9][0-9]{{0,{size - 1}}})(\\.[0-9]{{1,{fraction}}})?"]
    if low is not None:
        positive = _at_least(max(low, Fraction(0)), size, fraction)
        plain.append(positive if low > 0 else f"{positive}|-({_at_most(-low, fraction)})")
    if high is not None:
        negative = f"-({_at_least(max(-high, Fraction(0)), size, fraction)})"
        plain.append(negative if high < 0 else f"{negative}|{_at_most(high, fraction)}")
    return plain, [] if short else _powers(span, bounds.exponent)


def constant(value: int | float) -> str:
    """The ways to write one number: as Python would, and without its fraction when that is nothing."""
    if value == 0:
        return r"-?0(\.0)?"
    number = Fraction(value) if isinstance(value, int) else None
    if number is None and float(value).is_integer() and abs(value) < 1e16:
        return rf"{int(value)}(\.0)?"
    if number is not None and abs(number) <= _LARGEST_EXACT:
        return rf"{value}(\.0)?"
    return str(value).replace(".", r"\.").replace("+", r"\+")


def same_number(value: Fraction) -> str:
    """Every plain text of one number: what is denied when the number is."""
    whole, fraction = _split(abs(value))
    sign = "-" if value < 0 else "-?" if value == 0 else ""
    tail = rf"\.{fraction}0*" if fraction else r"(\.0*)?"
    return f"{sign}{whole}{tail}"


def _digits(usual: int, end: int | None) -> int:
    """Room beyond a bound that is itself as large as what is usual."""
    return usual if end is None or abs(end) < 10 ** (usual - 1) else len(str(abs(end))) + 1


def _closed(span: Span, fraction: int) -> tuple[Fraction | None, Fraction | None]:
    """Both ends, an open one moved inwards to the next number of so many places that is another float."""
    step = Fraction(1, 10**fraction)
    low = None if span.low is None else _inside(span.low, span.low_open, step)
    high = None if span.high is None else -_inside(-span.high, span.high_open, step)
    return low, high


def _inside(low: Fraction, is_open: bool, step: Fraction) -> Fraction:
    """The least number from `low` on that is still there when it is read as a float."""
    if abs(low) > _LARGEST_EXACT:
        try:
            number = float(low)
        except OverflowError:  # no float is as large, and every one is larger than a bound below them all
            return low if low > 0 else -(Fraction(10) ** 308)
        while math.isfinite(number) and (Fraction(number) < low or (is_open and Fraction(number) == low)):
            number = math.nextafter(number, math.inf)
        return Fraction(number) if math.isfinite(number) else low
    if not is_open:
        return low
    end = float(low)
    low = (math.floor(low / step) + 1) * step
    while float(low) <= end:
        low += step
    return low


def _places(value: Fraction) -> int:
    places = 0
    while value.denominator != 1:
        value *= 10
        places += 1
    return places


def _split(value: Fraction) -> tuple[int, str]:
    """The whole part, and the digits after the point without the zeros at their end."""
    whole = int(value)
    places = _places(value)
    return whole, str(int((value - whole) * 10**places)).zfill(places) if places else ""


def _naturals(low: int, high: int) -> str:
    """Numbers from `low` to `high`, both 0 or more."""
    options: list[str] = []
    whole: list[int] = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        if length > 1 and first == 10 ** (length - 1) and last == 10**length - 1:
            whole.append(length - 1)
        else:
            options.append(_same_length(str(first), str(last)))
    if whole:
        options.append(f"[1-9][0-9]{{{whole[0]},{whole[-1]}}}")
    return "(" + "|".join(options) + ")"


def _same_length(low: str, high: str) -> str:
    if low == high:
        return low
    shared = 0
    while low[shared] == high[shared]:
        shared += 1
    head, low, high = low[:shared], low[shared:], high[shared:]
    rest = len(low) - 1
    if not rest:
        return f"{head}[{low}-{high}]"
    first, last = int(low[0]), int(high[0])
    options = []
    if low[1:] != "0" * rest:
        options.append(low[0] + _same_length(low[1:], "9" * rest))
        first += 1
    if high[1:] != "9" * rest:
        options.append(high[0] + _same_length("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        options.append(f"[{first}-{last}][0-9]{{{rest}}}")
    return f"{head}({'|'.join(options)})"


def _at_least(value: Fraction, size: int, places: int) -> str:
    """Unsigned numbers from `value` on."""
    whole, fraction = _split(value)
    options = [rf"{_naturals(whole + 1, 10**size - 1)}(\.[0-9]{{1,{places}}})?"]
    if not fraction:
        options.append(rf"{whole}(\.[0-9]{{1,{places}}})?")
    else:
        tails = [
            rf"{fraction[:index]}[{int(digit) + 1}-9][0-9]{{0,{places - index - 1}}}"
            for index, digit in enumerate(fraction)
            if digit != "9"
        ]
        tails.append(rf"{fraction}[0-9]{{0,{places - len(fraction)}}}")
        options.append(rf"{whole}\.({'|'.join(tails)})")
    return "|".join(options)


def _at_most(value: Fraction, places: int) -> str:
    """Unsigned numbers up to `value`."""
    whole, fraction = _split(value)
    options = [rf"{_naturals(0, whole - 1)}(\.[0-9]{{1,{places}}})?"] if whole else []
    if not fraction:
        options.append(rf"{whole}(\.0{{1,{places}}})?")
    else:
        tails = [f"{fraction}0{{0,{places - len(fraction)}}}"]
        for index, digit in enumerate(fraction):
            if index:
                tails.append(fraction[:index])
            if digit != "0":
                tails.append(rf"{fraction[:index]}[0-{int(digit) - 1}][0-9]{{0,{places - index - 1}}}")
        options.append(rf"{whole}(\.({'|'.join(tails)}))?")
    return "|".join(options)


def _powers(span: Span, most: int) -> list[str]:
    """One digit, perhaps a fraction, and a power of ten: each power of which the span holds every such number."""
    options = []
    for sign, low, high, low_open, high_open in (
        ("", span.low, span.high, span.low_open, span.high_open),
        ("-", _minus(span.high), _minus(span.low), span.high_open, span.low_open),
    ):
        least = -most
        if low is not None and low > 0:
            least = max(least, _power(low, up=True))
            least += 1 if low_open and Fraction(10) ** least == low else 0
        last = most
        if high is not None:
            last = min(last, -most - 1 if high <= 0 else _power(high, up=False) - 1)
            last -= 1 if high_open and high > 0 and Fraction(10) ** (last + 1) == high else 0
        if least > last:
            continue
        exponents = []
        if least < 0:
            exponents.append(f"-0?{_naturals(max(1, -last), -least)}")
        if last >= 0:
            exponents.append(rf"\+?0?{_naturals(max(0, least), last)}")
        options.append(rf"{sign}[1-9](\.[0-9]{{1,16}})?[eE]({'|'.join(exponents)})")
    return options


def _minus(value: Fraction | None) -> Fraction | None:
    return None if value is None else -value


def _power(value: Fraction, *, up: bool) -> int:
    """The least power of ten from `value` on, or the largest up to it."""
    power = len(str(value.numerator)) - len(str(value.denominator)) - 1
    while Fraction(10) ** power < value:
        power += 1
    return power if up or Fraction(10) ** power == value else power - 1
