"""A schema's `pattern` as a regular expression of the grammar: anchored, and over the text as JSON writes it.

The pattern is read as ECMAScript and Python both understand it. Where they differ (`\\d`, `\\w`, `\\s` beyond ASCII), a
class takes what both take: a text that matches here matches under either. `complete` says whether the classes are the
same under both, so that the complement may be used too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Code points, inclusive, in order and apart."""

_TOP: Final = 0x10FFFF
_ALL: Final[Ranges] = ((0, 0xD7FF), (0xE000, _TOP))
_DIGIT: Final[Ranges] = ((48, 57),)
_WORD: Final[Ranges] = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Final[Ranges] = ((9, 13), (32, 32))
_LINE_ENDS: Final[Ranges] = ((10, 10), (13, 13), (0x2028, 0x2029))
_ESCAPED: Final = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
_CONTROLS: Final = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_MOST_REPEATS: Final = 5000


class UnknownPattern(ValueError):
    """The pattern holds what no regular expression of the grammar can say."""


@dataclass(frozen=True, slots=True)
class Chars:
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Anchor:
    start: bool


@dataclass(frozen=True, slots=True)
class Lookaround:
    negative: bool
    inside: Node


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    inside: Node
    least: int
    most: int | None


Node: TypeAlias = "Chars | Anchor | Lookaround | Sequence | Either | Repeat"


@dataclass(frozen=True, slots=True)
class Pattern:
    """The text matches all of `holds` and none of `fails`, each a regular expression of the whole text as JSON."""

    holds: tuple[str, ...]
    fails: tuple[str, ...]
    complete: bool
    least: int
    """Characters of the shortest text that may match."""


@lru_cache(maxsize=1024)
def read_pattern(source: str) -> Pattern:
    """Raises `UnknownPattern` with the reason."""
    reader = _Reader(source)
    try:
        tree = reader.read()
        holds, fails = _looks(tree)
        whole = [_whole(node, "both") for node in holds]
        return Pattern(
            tuple(_text(node) for node in whole),
            tuple(_text(_whole(node, "both")) for node in fails),
            reader.complete,
            max(_least(node) for node in whole),
        )
    except RecursionError as error:
        raise UnknownPattern("it nests too deep") from error


@lru_cache(maxsize=4096)
def found_in(source: str, text: str) -> bool | None:
    """Whether a text matches; None when that depends on whose reading of the pattern is taken."""
    try:
        tree = _Reader(source)
        _ = tree.read()
        if not tree.complete and not (text.isascii() and text.isprintable()):
            return None
        return re.search(_for_python(source), text) is not None
    except (UnknownPattern, re.error, RecursionError, OverflowError):
        return None


def any_text(least: int, most: int | None) -> str:
    """Any text of so many characters, as JSON."""
    return f"({quoted(_ALL)}){{{least},{'' if most is None else most}}}"


def quoted(ranges: Ranges) -> str:
    """One character of a class as JSON writes it: controls, quotes and backslashes are escaped, nothing else is."""
    plain = _minus(ranges, ((0, 31), (34, 34), (92, 92), (0xD800, 0xDFFF)))
    options = [_class(plain)] if plain else []
    if ranges[0] == _ALL[0]:  # all that is escaped
        return rf"({options[0]}|\\([bfnrt\"\\]|u00(0[0-7bBeEfF]|1[0-9a-fA-F])))"
    for code in (*range(32), 34, 92):
        if any(low <= code <= high for low, high in ranges):
            options.append(rf"\\{re.escape(_ESCAPED[code])}" if code in _ESCAPED else rf"\\u00{_hex(code)}")
    if not options:
        raise UnknownPattern("it has a class of no character")
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"


def literal(text: str) -> str:
    """The regular expression of exactly this text, as JSON."""
    return "".join(char if char.isascii() and char.isalnum() else _one(char) for char in text)


@lru_cache(maxsize=4096)
def _one(char: str) -> str:
    return quoted(((ord(char), ord(char)),))


@lru_cache(maxsize=3)
def _beyond_ascii(name: str) -> Ranges:
    """What a class holds under one reading only: Python's, and for blanks ECMAScript's, which differ by a few."""
    belongs = {"d": str.isdecimal, "w": str.isalnum, "s": str.isspace}[name]
    codes = [code for code in (*range(28, 32), *range(128, _TOP + 1)) if belongs(chr(code)) or code == 0xFEFF]
    return _union(tuple((code, code) for code in codes))


def _hex(code: int) -> str:
    return "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in f"{code:02x}")


def _for_python(source: str) -> str:
    """`$` of Python matches before a last line end as well; that of JSON Schema does not."""
    out, inside, at = [], False, 0
    while at < len(source):
        char = source[at]
        if char == "\\":
            out.append(source[at : at + 2])
            at += 2
            continue
        inside = char == "[" or (inside and char != "]")
        out.append(r"\Z" if char == "$" and not inside else char)
        at += 1
    return "".join(out)


def _class(ranges: Ranges) -> str:
    def one(code: int) -> str:
        char = chr(code)
        return char if char.isascii() and char.isalnum() else f"\\x{{{code:x}}}"

    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return one(ranges[0][0])
    return "[" + "".join(one(low) if low == high else f"{one(low)}-{one(high)}" for low, high in ranges) + "]"


def _union(*given: Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(one for ranges in given for one in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def _minus(ranges: Ranges, taken: Ranges) -> Ranges:
    left = list(ranges)
    for low, high in taken:
        split: list[tuple[int, int]] = []
        for first, last in left:
            if last < low or first > high:
                split.append((first, last))
                continue
            if first < low:
                split.append((first, low - 1))
            if last > high:
                split.append((high + 1, last))
        left = split
    return tuple(left)


class _Reader:
    """Reads the syntax that ECMAScript and Python share."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.complete = True

    def read(self) -> Node:
        tree = self._either()
        if self.at < len(self.source):
            raise UnknownPattern("it has an unbalanced )")
        return tree

    def _peek(self) -> str:
        return self.source[self.at : self.at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise UnknownPattern("it ends too soon")
        self.at += 1
        return char

    def _take(self, text: str) -> bool:
        found = self.source.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def _either(self) -> Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Either(tuple(options))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return Sequence(tuple(parts))

    def _repeated(self, node: Node) -> Node:
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        while True:
            if self._peek() in counts and self._peek():
                least, most = counts[self._next()]
            elif found := re.compile(r"\{(\d{1,9})(,?)(\d{0,9})\}").match(self.source, self.at):
                self.at = found.end()
                least = int(found[1])
                most = least if not found[2] else int(found[3]) if found[3] else None
            elif self.source.startswith("{,", self.at):
                raise UnknownPattern("it has a {, which ECMAScript and Python read in different ways")
            else:
                return node
            if isinstance(node, Anchor | Lookaround) or least > _MOST_REPEATS or (most or 0) > _MOST_REPEATS:
                raise UnknownPattern("it repeats what cannot be repeated, or too often")
            if most is not None and most < least:
                raise UnknownPattern("it repeats from more to fewer")
            if self._peek() == "+":
                raise UnknownPattern("it repeats possessively")
            _ = self._take("?")
            node = Repeat(node, least, most)

    def _atom(self) -> Node:
        char = self._next()
        match char:
            case "^" | "$":
                return Anchor(char == "^")
            case "(":
                return self._group()
            case "[":
                return Chars(self._class())
            case ".":
                return Chars(_minus(_ALL, _LINE_ENDS) if self._narrow() else _ALL)
            case "\\":
                return Chars(self._escape(in_class=False))
            case "*" | "+" | "?":
                raise UnknownPattern(f"nothing stands before its {char}")
            case _:
                return Chars(((ord(char), ord(char)),))

    def _narrow(self) -> bool:
        self.complete = False
        return True

    def _group(self) -> Node:
        if self._take("?="):
            look: bool | None = False
        elif self._take("?!"):
            look = True
        elif self._take("?:") or re.compile(r"\?P?<[A-Za-z_]\w*>").match(self.source, self.at):
            if found := re.compile(r"\?P?<[A-Za-z_]\w*>").match(self.source, self.at):
                self.at = found.end()
            look = None
        elif self._peek() == "?":
            raise UnknownPattern("it looks behind, or sets a flag")
        else:
            look = None
        inside = self._either()
        if not self._take(")"):
            raise UnknownPattern("a ( of it is not closed")
        return inside if look is None else Lookaround(look, inside)

    def _class(self) -> Ranges:
        negative = self._take("^")
        ranges: list[Ranges] = []
        first = True
        while first or self._peek() != "]":
            if not self._peek():
                raise UnknownPattern("a [ of it is not closed")
            if first and self._peek() == "]":
                raise UnknownPattern("it has an empty class")
            first = False
            low = self._class_item(negative)
            if self._peek() == "-" and self.source[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._class_item(negative)
                if len(low) != 1 or low[0][0] != low[0][1] or len(high) != 1 or high[0][0] != high[0][1]:
                    ranges += [low, ((45, 45),), high]
                    continue
                if low[0][0] > high[0][0]:
                    raise UnknownPattern("a range of it goes backwards")
                low = ((low[0][0], high[0][0]),)
            ranges.append(low)
        self.at += 1
        return _minus(_ALL, _union(*ranges)) if negative else _union(*ranges)

    def _class_item(self, negative: bool) -> Ranges:
        char = self._next()
        return self._escape(in_class=True, outer=negative) if char == "\\" else ((ord(char), ord(char)),)

    def _escape(self, *, in_class: bool, outer: bool = False) -> Ranges:
        char = self._next()
        shared = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
        if char.lower() in shared:
            self.complete = False
            ascii_class, excluded = shared[char.lower()], char.isupper()
            # Beyond ASCII only Python's class has members: neither the class nor its complement takes them.
            taken = _union(ascii_class, _beyond_ascii(char.lower())) if excluded != outer else ascii_class
            return _minus(_ALL, taken) if excluded else taken
        if char in _CONTROLS and not (char == "0" and self._peek().isdigit()):
            return ((_CONTROLS[char], _CONTROLS[char]),)
        if char == "b" and in_class:
            return ((8, 8),)
        for mark, length in (("x", 2), ("u", 4)):
            if char == mark:
                digits = self.source[self.at : self.at + length]
                if not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", digits) or 0xD800 <= int(digits, 16) <= 0xDFFF:
                    raise UnknownPattern(f"its \\{mark} names no character")
                self.at += length
                return ((int(digits, 16), int(digits, 16)),)
        if char.isalnum():
            raise UnknownPattern(f"it uses \\{char}")
        return ((ord(char), ord(char)),)


def _looks(tree: Node) -> tuple[list[Node], list[Node]]:
    """What must match and what must not, where look-aheads stand at the very start of the pattern."""
    holds: list[Node] = []
    fails: list[Node] = []
    if not isinstance(tree, Sequence):
        return [tree], fails
    parts = list(tree.parts)
    start = bool(parts) and isinstance(parts[0], Anchor) and parts[0].start
    rest = parts[1:] if start else parts
    while start and rest and isinstance(rest[0], Lookaround):
        look = rest.pop(0)
        assert isinstance(look, Lookaround)
        (fails if look.negative else holds).append(Sequence((Anchor(True), look.inside)))
    return [*holds, Sequence(tuple([*parts[:1], *rest] if start else rest))], fails


_ANY: Final = Repeat(Chars(_ALL), 0, None)


def _whole(node: Node, ends: str) -> Node:
    """The pattern of the whole text: any text stands where an end is not anchored. `ends`: which of them are free."""
    match node:
        case Either(options):
            return Either(tuple(_whole(option, ends) for option in options))
        case Sequence(parts):
            left, right = ends in ("both", "left"), ends in ("both", "right")
            inner = list(parts)
            before: list[Node] = []
            after: list[Node] = []
            while left and inner and isinstance(inner[0], Anchor) and inner[0].start:
                _ = inner.pop(0)
                before = [Sequence(())]
            while right and inner and isinstance(inner[-1], Anchor) and not inner[-1].start:
                _ = inner.pop()
                after = [Sequence(())]
            left, right = left and not before, right and not after
            if len(inner) == 1 and isinstance(inner[0], Either | Sequence):
                return _whole(inner[0], _ends(left, right))
            if left and inner and isinstance(inner[0], Either | Sequence) and _anchored(inner[0]):
                inner[0] = _whole(inner[0], "left")
                left = False
            if right and inner and isinstance(inner[-1], Either | Sequence) and _anchored(inner[-1]):
                inner[-1] = _whole(inner[-1], "right")
                right = False
            if any(_anchored(part) for part in inner):
                raise UnknownPattern("it has an anchor or a look-ahead in its middle")
            return Sequence((*([_ANY] if left else []), *inner, *([_ANY] if right else [])))
        case _:
            return _whole(Sequence((node,)), ends) if not isinstance(node, Repeat) else _plain(node, ends)


def _plain(node: Repeat, ends: str) -> Node:
    if _anchored(node):
        raise UnknownPattern("it repeats an anchor")
    left, right = ends in ("both", "left"), ends in ("both", "right")
    return Sequence((*([_ANY] if left else []), node, *([_ANY] if right else [])))


def _ends(left: bool, right: bool) -> str:
    return {(True, True): "both", (True, False): "left", (False, True): "right"}.get((left, right), "none")


def _anchored(node: Node) -> bool:
    match node:
        case Anchor() | Lookaround():
            return True
        case Sequence(parts):
            return any(_anchored(part) for part in parts)
        case Either(options):
            return any(_anchored(option) for option in options)
        case Repeat(inside):
            return _anchored(inside)
        case _:
            return False


def _least(node: Node) -> int:
    match node:
        case Chars():
            return 1
        case Sequence(parts):
            return sum(_least(part) for part in parts)
        case Either(options):
            return min(_least(option) for option in options)
        case Repeat(inside, least):
            return least * _least(inside)
        case _:
            return 0


def _text(node: Node) -> str:
    match node:
        case Chars(ranges):
            return quoted(ranges)
        case Sequence(parts):
            return "".join(_text(part) if not isinstance(part, Either) else f"({_text(part)})" for part in parts)
        case Either(options):
            return "(" + "|".join(_text(option) for option in options) + ")"
        case Repeat(inside, least, most):
            return f"({_text(inside)}){{{least},{'' if most is None else most}}}"
        case _:
            raise UnknownPattern("it has an anchor or a look-ahead in its middle")
