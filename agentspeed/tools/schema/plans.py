"""What may be written for a term, decided piece by piece: leaves, arrays and objects, with the terms of their parts.

Nothing here knows the grammar's language; nothing after it knows JSON Schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, TypeAlias

from agentspeed.tools.schema.atoms import (
    ANYTHING,
    NOTHING,
    Array,
    Atom,
    Number,
    Object,
    Plain,
    Shape,
    Term,
    Text,
    Values,
    full,
)
from agentspeed.tools.schema.bounds import Bounds
from agentspeed.tools.schema.terminals import Unsayable, number_terminal, text_terminal
from agentspeed.tools.schema.terms import Terms
from agentspeed.tools.schema.values import KINDS, Json, key_of

_MAX_PATTERNS: Final = 5
_MAX_BITS: Final = 40
_MAX_UNIQUE: Final = 48
_COUNTED: Final = 255
_MOST_CONTAINED: Final = 24


@dataclass(frozen=True, slots=True)
class Leaf:
    """One terminal, or one rule of the grammar library's own."""

    body: str


@dataclass(frozen=True, slots=True)
class Slot:
    """An item, and the same item where it also counts for `contains`."""

    term: Term
    counted: Term | None = None


@dataclass(frozen=True, slots=True)
class ArrayPlan:
    first: tuple[Slot, ...]
    rest: Slot
    least: int
    most: int
    count_least: int = 0
    count_most: int | None = None

    @property
    def counts(self) -> bool:
        return self.rest.counted is not None or any(slot.counted is not None for slot in self.first)


@dataclass(frozen=True, slots=True)
class Distinct:
    """An array of some of these values, each at most once, in any order."""

    values: tuple[Term, ...]
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    term: Term
    required: bool


@dataclass(frozen=True, slots=True)
class Extra:
    """Entries whose key is no field's: the key's terminal, and what the value is."""

    key: str
    term: Term


@dataclass(frozen=True, slots=True)
class ObjectPlan:
    fields: tuple[Field, ...]
    extras: tuple[Extra, ...]
    most_extras: int
    least: int = 0
    most: int | None = None
    needs: tuple[tuple[str, str], ...] = ()


Plan: TypeAlias = Leaf | ArrayPlan | Distinct | ObjectPlan


def parts_of(plan: Plan) -> Iterator[Term]:
    """The terms that stand inside."""
    match plan:
        case Leaf():
            return
        case ArrayPlan():
            for slot in (*plan.first, *((plan.rest,) if plan.most > len(plan.first) else ())):
                yield slot.term
                if slot.counted is not None:
                    yield slot.counted
        case Distinct():
            yield from plan.values
        case ObjectPlan():
            yield from (field.term for field in plan.fields)
            yield from (extra.term for extra in plan.extras)


class Planner:
    """Decides for one document under one set of bounds."""

    def __init__(self, terms: Terms, bounds: Bounds, *, sets: bool = False, spaced: bool = False) -> None:
        self._terms = terms
        self._bounds = bounds
        self._colon = ": " if spaced else ":"
        self._sets = sets
        """Whether who reads the text drops what it names twice, so that `uniqueItems` is left out where it cannot be
        held."""

    def plans(self, term: Term) -> list[Plan]:
        """One for each way; none where no value is such. Raises `SchemaUnsupported` for what no grammar can hold."""
        at = self._terms.at(term)
        found: list[Plan] = []
        for atoms in self.shape(term).values():
            for atom in atoms:
                found += self._of_values(atom, at) if _is_listed(atom) else self._of(atom, at)
        return list(dict.fromkeys(found))

    def shape(self, term: Term) -> Shape:
        """The atoms that are written. A schema without a type that speaks of one kind only (`properties`, `minLength`)
        means that kind."""
        shape = self._terms.shape(term)
        silent = [kind for kind in KINDS if shape.get(kind) == (full(kind),)]
        if len(silent) == len(KINDS) - 1 and len(shape) == len(KINDS):
            return {kind: atoms for kind, atoms in shape.items() if kind not in silent}
        return shape

    def _of(self, atom: Atom, at: str) -> list[Plan]:
        match atom:
            case Plain():
                words = {"None": "null", "True": "true", "False": "false"}
                return [Leaf(f'"{words[str(value)]}"') for value in atom.values.only or ()]
            case Number():
                return self._number(atom, at)
            case Text():
                body = text_terminal(atom, usual=self._bounds.string_chars)
                return [Leaf(body)]
            case Array():
                return self._array(atom, at)
            case Object():
                return self._object(atom, at)

    def _of_values(self, atom: Atom, at: str) -> list[Plan]:
        """Constants, each checked against all that stands beside them."""
        bare = replace(atom, values=Values(None, atom.values.never))
        kept: list[Json] = []
        for value in atom.values.only or ():
            holds = self._terms.holding.atom(bare, value)
            if holds is None:
                self._terms.give_up(
                    at, f"has the value {str(value)[:60]!r} beside a pattern or format that readers take differently",
                    "Leave one of them out.",
                )  # fmt: skip
            if holds is not False:
                kept.append(value)
        if not kept:
            return []
        only = Values(tuple(kept))
        match atom:
            case Number():
                return [Leaf(number_terminal(Number(values=only, whole=atom.whole), self._bounds))]
            case Text():
                return [Leaf(text_terminal(Text(values=only), usual=0))]
            case _:
                return [self._constant(value, at) for value in kept]

    def _constant(self, value: Json, at: str) -> Plan:
        nothing = Slot(NOTHING)
        if isinstance(value, list):
            slots = tuple(Slot(self._terms.constant(item, at)) for item in value)
            return ArrayPlan(slots, nothing, len(value), len(value))
        assert isinstance(value, dict)
        fields = tuple(Field(name, self._terms.constant(item, at), True) for name, item in value.items())
        return ObjectPlan(fields, (), 0)

    def _number(self, atom: Number, at: str) -> list[Plan]:
        try:
            body = number_terminal(atom, self._bounds)
        except Unsayable as error:
            self._terms.give_up(at, str(error), "Leave one of them out.")
            body = number_terminal(replace(atom, multiples=frozenset(), values=Values()), self._bounds)
        return [Leaf(body)] if body else []

    def _array(self, atom: Array, at: str) -> list[Plan]:
        if any(self._terms.holding.atom(replace(atom, values=Values()), value) is not False
               for value in atom.values.never):  # fmt: skip
            self._terms.give_up(at, "excludes single arrays", "Say what there may be.")
        length = max((len(items.first) for items in atom.items), default=0)
        slots = [self._item(atom, index) for index in range(length + 1)]
        most = max(self._bounds.array_items, atom.least, length) if atom.most is None else atom.most
        for index, term in enumerate(slots):
            if not self._terms.is_possible(term):
                most, slots = min(most, index), slots[: index + 1]
                break
        if atom.most is not None and most == atom.most:
            # A wide bound is kept; counting to it is the grammar library's to refuse.
            most = atom.most
        if atom.least > most:
            return []
        first, rest = slots[:-1][:most], slots[-1]
        if atom.unique and most > 1:
            return self._unique(atom, first, rest, most, at)
        return self._counted(atom, first, rest, most, at)

    def _unique(self, atom: Array, first: list[Term], rest: Term, most: int, at: str) -> list[Plan]:
        values = None if first else self._finite(rest)
        contains = [one for one in atom.contains if one.least or one.most is not None]
        if values is None or len(values) > _MAX_UNIQUE or contains:
            if not self._sets:
                self._terms.give_up(at, "has uniqueItems over items that are not a short list of values",
                                    "Give the items an enum, or leave uniqueItems out.")  # fmt: skip
            return self._counted(atom, first, rest, most, at)
        if atom.least > len(values):
            return []
        constants = tuple(self._terms.constant(value, at) for value in values)
        return [Distinct(constants, atom.least, min(most, len(values)))]

    def _counted(self, atom: Array, first: list[Term], rest: Term, most: int, at: str) -> list[Plan]:
        contains = [one for one in atom.contains if one.least or one.most is not None]
        if len(contains) > 1:
            self._terms.give_up(at, "has contains in two places that hold at once", "Say one of them.")
            contains = []
        if not contains:
            return [ArrayPlan(tuple(Slot(term) for term in first), Slot(rest), atom.least, most)]
        one = contains[0]
        least, top = one.least, one.most
        if most > _COUNTED or least > _MOST_CONTAINED or (top or 0) > _MOST_CONTAINED:
            self._terms.give_up(at, f"counts beyond {_COUNTED} items, {_MOST_CONTAINED} of them", "Ask for fewer.")
            return [ArrayPlan(tuple(Slot(term) for term in first), Slot(rest), atom.least, most)]
        if not atom.items and atom.most is None and not atom.least:
            most = max(most, least)

        def slot(term: Term) -> Slot:
            counted = term | one.term
            other = term if top is None else term | self._terms.opposite(one.term)
            return Slot(other, counted if self._terms.is_possible(counted) else None)

        return [ArrayPlan(tuple(slot(term) for term in first), slot(rest), max(atom.least, least), most, least, top)]

    def _item(self, atom: Array, index: int) -> Term:
        return frozenset().union(*(items.at(index) for items in atom.items))

    def _finite(self, term: Term) -> list[Json] | None:
        """All values of a term, where they are listed."""
        found: dict[object, Json] = {}
        for atoms in self._terms.shape(term).values():
            for atom in atoms:
                if atom.values.only is None:
                    return None
                bare = replace(atom, values=Values(None, atom.values.never))
                for value in atom.values.only:
                    if isinstance(atom, Plain) or self._terms.holding.atom(bare, value):
                        found[key_of(value)] = value
        return list(found.values())

    def _object(self, atom: Object, at: str) -> list[Plan]:
        if any(self._terms.holding.atom(replace(atom, values=Values()), value) is not False
               for value in atom.values.never):  # fmt: skip
            self._terms.give_up(at, "excludes single objects", "Say what there may be.")
        names = dict.fromkeys(name for entries in atom.entries for name, _ in entries.named)
        names.update(dict.fromkeys(atom.required))
        if not any(entries.listed for entries in atom.entries):  # an open object: what it needs becomes a field of it
            names.update(dict.fromkeys(name for pair in atom.needs for name in pair))
        fields = []
        for name in names:
            term = self._terms.holding.of_name(atom, name)
            if term >= NOTHING or self._terms.holding.term(atom.names, name) is not True:
                if name in atom.required:
                    return []
                continue
            fields.append(Field(name, term, name in atom.required))
        extras = self._extras(atom, list(names), at)
        return self._sized(atom, tuple(fields), extras, at)

    def _extras(self, atom: Object, names: list[str], at: str) -> tuple[Extra, ...]:
        patterns = list(dict.fromkeys(pattern for entries in atom.entries for pattern, _ in entries.patterned))
        said = any(entries.more is not None for entries in atom.entries)
        is_open = said or not any(entries.listed or entries.patterned for entries in atom.entries)
        if len(patterns) > _MAX_PATTERNS:
            self._terms.give_up(at, f"has more than {_MAX_PATTERNS} patterns of names", "Name fewer.")
            patterns = []
        keys = self._key_atoms(atom)
        extras: list[Extra] = []
        for matched in product((True, False), repeat=len(patterns)):
            mine = {pattern for pattern, yes in zip(patterns, matched, strict=True) if yes}
            if not mine and not is_open:
                continue
            term: Term = ANYTHING
            for entries in atom.entries:
                inner = [one for pattern, one in entries.patterned if pattern in mine]
                if not inner and entries.more is not None:
                    inner = [entries.more]
                term = term.union(*inner)
            if term >= NOTHING:
                continue
            for key in keys:
                one = replace(
                    key,
                    patterns=key.patterns | mine,
                    not_patterns=key.not_patterns | (set(patterns) - mine),
                    values=key.values.meet(Values(None, tuple(names))),
                )
                if one.patterns & one.not_patterns:
                    continue
                body = self._key(one)
                if body:
                    extras.append(Extra(body, term))
        return tuple(extras)

    def _key(self, key: Text) -> str:
        if key.values.only is not None:
            bare = replace(key, values=Values())
            kept = tuple(value for value in key.values.only if self._terms.holding.atom(bare, value) is True)
            key = Text(values=Values(kept))
            if not kept:
                return ""
        return text_terminal(key, usual=self._bounds.key_chars, ending=self._colon)

    def _key_atoms(self, atom: Object) -> list[Text]:
        found = self._terms.shape(atom.names).get("string", ())
        return [one for one in found if isinstance(one, Text)]

    def _sized(self, atom: Object, fields: tuple[Field, ...], extras: tuple[Extra, ...], at: str) -> list[Plan]:
        required = sum(field.required for field in fields)
        usual = self._bounds.map_entries
        room = usual if atom.most is None else max(0, atom.most - required)
        needs = self._needs(atom, fields, extras, at)
        least = atom.least if atom.least > required else 0
        largest = len(fields) + (room if extras else 0)
        most = atom.most if atom.most is not None and atom.most < largest else None
        reachable = len(fields) + (1 if extras else 0)
        if least > reachable:
            if extras:
                self._terms.give_up(at, f"has minProperties {atom.least} over names that may be written twice",
                                    "Name the properties, or ask for at least one.")  # fmt: skip
                least = reachable
            else:
                return []
        if needs and (least or most is not None):
            self._terms.give_up(at, "counts properties of which some need others", "Leave the count out.")
            least, most = 0, None
        if ((least or most is not None) and len(fields) + room > _COUNTED) or len(needs) > _MAX_BITS // 2:
            self._terms.give_up(at, "counts more properties than a grammar can", "Ask for fewer.")
            least, most, needs = 0, None, ()
        return [ObjectPlan(fields, extras, room if extras else 0, least, most, needs)]

    def _needs(
        self, atom: Object, fields: tuple[Field, ...], extras: tuple[Extra, ...], at: str
    ) -> tuple[tuple[str, str], ...]:
        """What fields need; that an entry beyond the fields needs or is needed cannot be known."""
        known = {field.name for field in fields}
        if extras and any(name not in known and self._may_be_extra(atom, name) for pair in atom.needs for name in pair):
            self._terms.give_up(at, "has dependencies of names that are no properties", "Name them in properties.")
            return ()
        return tuple((name, one) for name, one in atom.needs if name in known)

    def _may_be_extra(self, atom: Object, name: str) -> bool:
        """Whether an entry of that name might be written as one of the rest."""
        if name in {one for entries in atom.entries for one, _ in entries.named}:
            return False
        is_named = self._terms.holding.term(atom.names, name)
        return is_named is not False and not self._terms.holding.of_name(atom, name) >= NOTHING


def _is_listed(atom: Atom) -> bool:
    return atom.values.only is not None and not isinstance(atom, Plain)
