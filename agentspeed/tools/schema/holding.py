"""Whether a given value is what an atom says: for `enum` and `const` beside other keywords."""

from __future__ import annotations

import re
from collections.abc import Callable

from agentspeed.tools.schema.atoms import ANYTHING, Array, Atom, Number, Object, Plain, Shape, Term, Text
from agentspeed.tools.schema.formats import PATTERNS
from agentspeed.tools.schema.patterns import found_in
from agentspeed.tools.schema.values import Json, exact, key_of, kind_of


class Holding:
    """Three-valued: None where it depends on whose reading of a pattern or a format is taken."""

    def __init__(self, shape: Callable[[Term], Shape]) -> None:
        self._shape = shape

    def term(self, term: Term, value: Json) -> bool | None:
        if term == ANYTHING:
            return True
        return _any([self.atom(atom, value) for atom in self._shape(term).get(kind_of(value), ())])

    def atom(self, atom: Atom, value: Json) -> bool | None:
        """Of a value of the atom's kind."""
        if atom.values.only is not None and key_of(value) not in {key_of(one) for one in atom.values.only}:
            return False
        if key_of(value) in {key_of(one) for one in atom.values.never}:
            return False
        match atom, value:
            case Plain(), _:
                return True
            case Number(), int() | float():
                number = exact(value)
                whole = number.denominator == 1
                if not atom.span.holds(number) or (atom.whole is not None and whole != atom.whole):
                    return False
                return all((number / step).denominator == 1 for step in atom.multiples)
            case Text(), str():
                return self._text(atom, value)
            case Array(), list():
                return self._array(atom, value)
            case Object(), dict():
                return self._object(atom, value)
            case _:
                return False

    def of_name(self, atom: Object, name: str) -> Term:
        """What holds of an entry; a pattern that might match is taken to match."""
        found: Term = ANYTHING
        for entries in atom.entries:
            named = [term for one, term in entries.named if one == name]
            sure = bool(named)
            for pattern, term in entries.patterned:
                matches = found_in(pattern, name)
                named += [] if matches is False else [term]
                sure = sure or matches is True
            if not sure and entries.more is not None:
                named.append(entries.more)
            found = found.union(*named)
        return found

    def _text(self, atom: Text, value: str) -> bool | None:
        if len(value) < atom.least or (atom.most is not None and len(value) > atom.most):
            return False
        found = [found_in(pattern, value) for pattern in atom.patterns]
        found += [_not(found_in(pattern, value)) for pattern in atom.not_patterns]
        for name in atom.formats:
            if not re.fullmatch(PATTERNS[name], value):
                found.append(None)
        return _all(found)

    def _array(self, atom: Array, value: list[Json]) -> bool | None:
        if len(value) < atom.least or (atom.most is not None and len(value) > atom.most):
            return False
        if atom.unique and len({key_of(item) for item in value}) < len(value):
            return False
        found = [self.term(items.at(index), item) for items in atom.items for index, item in enumerate(value)]
        for contains in atom.contains:
            held = [self.term(contains.term, item) for item in value]
            sure, maybe = held.count(True), held.count(None)
            enough = True if sure >= contains.least else None if sure + maybe >= contains.least else False
            few = contains.most is None or sure + maybe <= contains.most
            found += [enough, True if few else None if sure <= (contains.most or 0) else False]
        return _all(found)

    def _object(self, atom: Object, value: dict[str, Json]) -> bool | None:
        if len(value) < atom.least or (atom.most is not None and len(value) > atom.most):
            return False
        if any(name not in value for name in atom.required):
            return False
        if any(name in value and needed not in value for name, needed in atom.needs):
            return False
        found = [self.term(self.of_name(atom, name), item) for name, item in value.items()]
        found += [self.term(atom.names, name) for name in value]
        return _all(found)


def _not(found: bool | None) -> bool | None:
    return None if found is None else not found


def _all(found: list[bool | None]) -> bool | None:
    return False if False in found else None if None in found else True


def _any(found: list[bool | None]) -> bool | None:
    return True if True in found else None if None in found else False
