"""The pieces a schema is taken apart into: each is one kind of value with everything that holds of it at once.

A schema is a union of atoms; joining schemas meets their atoms pairwise, and `not` complements them. What stands
inside an array or an object is a term: signed numbers of schema nodes that hold at once (`-3`: node 3 does not).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Final, TypeAlias, TypeVar

from agentspeed.tools.schema.numbers import Span
from agentspeed.tools.schema.values import KINDS, Json, key_of

T = TypeVar("T")
Term: TypeAlias = frozenset[int]
ANYTHING: Final[Term] = frozenset()
NOTHING: Final[Term] = frozenset({-1})
"""Node 1 is the schema `true`."""


@dataclass(frozen=True, slots=True)
class Values:
    """Constants that are all there may be, or that may not be; kept with their keys, for JSON's own equality."""

    only: tuple[Json, ...] | None = None
    never: tuple[Json, ...] = ()

    def meet(self, other: Values) -> Values:
        never = _distinct((*self.never, *other.never))
        if self.only is None or other.only is None:
            only = self.only if other.only is None else other.only
        else:
            known = {key_of(value) for value in other.only}
            only = tuple(value for value in self.only if key_of(value) in known)
        if only is not None:
            gone = {key_of(value) for value in never}
            return Values(tuple(value for value in only if key_of(value) not in gone))
        return Values(None, never)

    def complements(self) -> Iterator[Values]:
        if self.only is not None:
            yield Values(None, self.only)
        if self.never:
            yield Values(self.never)


@dataclass(frozen=True, slots=True)
class Plain:
    """null, or a truth value."""

    kind: str
    values: Values = Values()


NO_END: Final = Span()


@dataclass(frozen=True, slots=True)
class Number:
    span: Span = NO_END
    whole: bool | None = None
    multiples: frozenset[Fraction] = frozenset()
    values: Values = Values()
    kind: str = "number"


@dataclass(frozen=True, slots=True)
class Text:
    least: int = 0
    most: int | None = None
    patterns: frozenset[str] = frozenset()
    not_patterns: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset()
    values: Values = Values()
    kind: str = "string"


@dataclass(frozen=True, slots=True)
class Items:
    """What one schema says of an array's items: the first few each, then all the rest."""

    first: tuple[Term, ...] = ()
    rest: Term = ANYTHING
    derived: bool = False
    """Said by a complement, not by the schema: it names no item for `unevaluatedItems`."""

    def at(self, index: int) -> Term:
        return self.first[index] if index < len(self.first) else self.rest


@dataclass(frozen=True, slots=True)
class Contains:
    term: Term
    least: int = 1
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Array:
    items: tuple[Items, ...] = ()
    least: int = 0
    most: int | None = None
    unique: bool = False
    contains: tuple[Contains, ...] = ()
    values: Values = Values()
    kind: str = "array"


@dataclass(frozen=True, slots=True)
class Entries:
    """What one schema says of an object's entries: by name, by pattern, and of all that are neither.

    `more` None says nothing about the rest; `listed` tells that the schema names what there is; `derived` that a
    complement says it, which names no entry for `unevaluatedProperties`."""

    named: tuple[tuple[str, Term], ...] = ()
    patterned: tuple[tuple[str, Term], ...] = ()
    more: Term | None = None
    listed: bool = False
    derived: bool = False


@dataclass(frozen=True, slots=True)
class Object:
    entries: tuple[Entries, ...] = ()
    required: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None
    names: Term = ANYTHING
    needs: tuple[tuple[str, str], ...] = ()
    values: Values = Values()
    kind: str = "object"


Atom: TypeAlias = Plain | Number | Text | Array | Object
Shape: TypeAlias = dict[str, tuple[Atom, ...]]

_FULL: Final[dict[str, Atom]] = {
    "null": Plain("null", Values((None,))),
    "boolean": Plain("boolean", Values((True, False))),
    "number": Number(),
    "string": Text(),
    "array": Array(),
    "object": Object(),
}


def full(kind: str) -> Atom:
    return _FULL[kind]


def full_shape() -> Shape:
    return {kind: (_FULL[kind],) for kind in KINDS}


def meet(one: Atom, other: Atom) -> Atom | None:
    """What both hold; None where that is plainly nothing."""
    values = one.values.meet(other.values)
    if values.only is not None and not values.only:
        return None
    match one, other:
        case Plain(), Plain():
            return replace(one, values=values)
        case Number(), Number():
            whole = one.whole if other.whole is None else other.whole
            span = one.span.meet(other.span)
            if (one.whole is not None and one.whole != whole) or span.is_empty(whole is True):
                return None
            return Number(span, whole, one.multiples | other.multiples, values)
        case Text(), Text():
            least, most = max(one.least, other.least), _less(one.most, other.most)
            denied = one.not_patterns | other.not_patterns
            patterns = one.patterns | other.patterns
            if (most is not None and least > most) or patterns & denied:
                return None
            return Text(least, most, patterns, denied, one.formats | other.formats, values)
        case Array(), Array():
            least, most = max(one.least, other.least), _less(one.most, other.most)
            if most is not None and least > most:
                return None
            contains = _distinct_of((*one.contains, *other.contains))
            items = _distinct_of((*one.items, *other.items))
            return Array(items, least, most, one.unique or other.unique, contains, values)
        case Object(), Object():
            least, most = max(one.least, other.least), _less(one.most, other.most)
            if most is not None and least > most:
                return None
            return Object(
                _distinct_of((*one.entries, *other.entries)),
                tuple(dict.fromkeys((*one.required, *other.required))),
                least,
                most,
                one.names | other.names,
                tuple(dict.fromkeys((*one.needs, *other.needs))),
                values,
            )
        case _:
            raise AssertionError(f"{one.kind} meets {other.kind}")


@dataclass(slots=True)
class Complement:
    """The atoms of what an atom is not, and the parts of it whose opposite no grammar can say."""

    atoms: list[Atom] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)


def simple_complement(atom: Atom) -> Complement:
    """All but what is said of items and entries, which needs the terms' own opposites."""
    found = Complement([replace(full(atom.kind), values=values) for values in atom.values.complements()])
    if isinstance(atom, Plain):
        universe = full(atom.kind).values.only or ()
        known = {key_of(value) for value in atom.values.only or ()}
        left = tuple(value for value in universe if key_of(value) not in known)
        found.atoms = [Plain(atom.kind, Values(left))] if left else []
        return found
    if isinstance(atom, Number):
        span = atom.span
        if span.low is not None:
            found.atoms.append(Number(Span(high=span.low, high_open=not span.low_open)))
        if span.high is not None:
            found.atoms.append(Number(Span(low=span.high, low_open=not span.high_open)))
        if atom.whole is not None:
            found.atoms.append(Number(whole=not atom.whole))
        if atom.multiples:
            found.unsaid.append("multipleOf")
        return found
    if isinstance(atom, Text):
        found.atoms += [Text(not_patterns=frozenset({pattern})) for pattern in sorted(atom.patterns)]
        found.atoms += [Text(patterns=frozenset({pattern})) for pattern in sorted(atom.not_patterns)]
        found.unsaid += ["format"] if atom.formats else []
    sized = type(atom)
    if atom.least > 0:
        found.atoms.append(sized(most=atom.least - 1))
    if atom.most is not None:
        found.atoms.append(sized(least=atom.most + 1))
    return found


def _less(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def _distinct(values: tuple[Json, ...]) -> tuple[Json, ...]:
    return tuple({key_of(value): value for value in values}.values())


def _distinct_of(parts: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(parts))
