"""The algebra of schemas: terms joined, united and complemented until each is a union of atoms.

`not`, `oneOf`, `if` and the dependencies all come down to complements of atoms. Where the complement of a part cannot
be said, an alternative is left out, which makes fewer texts possible and none of them wrong; where nothing is left
of a kind of value, the schema is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.schema.atoms import (
    ANYTHING,
    NOTHING,
    Array,
    Atom,
    Contains,
    Entries,
    Items,
    Object,
    Plain,
    Shape,
    Term,
    Values,
    full,
    full_shape,
    meet,
    simple_complement,
)
from agentspeed.tools.schema.holding import Holding
from agentspeed.tools.schema.reading import OWN, own_shape, wrong
from agentspeed.tools.schema.references import Document
from agentspeed.tools.schema.values import KINDS, Json, Schema

MAX_CASES: Final = 160
"""Atoms of one kind in one union."""
MAX_TERMS: Final = 20_000
MAX_MEETINGS: Final = 60_000
"""Pairs of atoms that are joined for one schema: a bound of the time it takes."""
_MAX_LEVEL: Final = 40
_DEPTH_OF_PROOF: Final = 4
_SINCE_2019: Final = frozenset(
    {"minContains", "maxContains", "dependentRequired", "dependentSchemas", "unevaluatedProperties",
     "unevaluatedItems", "prefixItems"}
)  # fmt: skip
_SINCE_6: Final = frozenset({"const", "contains", "propertyNames", "if"})


@dataclass(frozen=True, slots=True)
class _Node:
    schema: Json
    base: str
    at: str
    opposite: Term | None = None


class _Undecided(Exception):
    """A proof came to a schema that is still being read."""


class Terms:
    """Interns the schemas of a document and knows what each comes to."""

    def __init__(self, document: Document, *, lenient: bool = False) -> None:
        self.document = document
        self.lenient = lenient
        self.dropped: list[str] = []
        """What is left to a check of the whole text, where that is asked for."""
        self.notes: list[str] = []
        """Why there may be no value at all."""
        self.holding = Holding(self.shape)
        self._nodes: list[_Node] = [_Node(None, "", ""), _Node(True, "", "")]
        self._known: dict[object, int] = {}
        self._shapes: dict[Term, Shape] = {}
        self._read: dict[tuple[int, bool], Shape] = {}
        self._open: set[tuple[int, bool]] = set()
        self._proofs = 0
        self._proved: dict[tuple[Term, int], bool] = {}
        self._meetings = 0
        declared = str(document.root.get("$schema", ""))
        self._unknown: frozenset[str] = frozenset()
        if document.lone_references:
            self._unknown = _SINCE_2019 | (_SINCE_6 if "draft-03" in declared or "draft-04" in declared else set())
        self._legacy = document.lone_references or "$schema" not in document.root or "2019-09" in declared

    def root(self) -> Term:
        return self.term(self.document.root, "", "$")

    def term(self, schema: Json, base: str, at: str) -> Term:
        if isinstance(schema, bool):
            return ANYTHING if schema else NOTHING
        if not isinstance(schema, dict):
            raise wrong(at, f"is {str(schema)[:60]!r}, where a schema is due", "write an object, true or false")
        place = self.document.place(schema, base)
        return frozenset({self._intern((id(schema), place.base), _Node(schema, place.base, at))})

    def constant(self, value: Json, at: str) -> Term:
        return self.term({"const": value}, "", at)

    def opposite(self, term: Term) -> Term:
        if not term:
            return NOTHING
        if term == NOTHING:
            return ANYTHING
        if len(term) == 1:
            return frozenset({-next(iter(term))})
        return frozenset({self._intern(("opposite", term), _Node(None, "", self.at(term), term))})

    def at(self, term: Term) -> str:
        """Where in the schema it stands."""
        return next((self._nodes[abs(number)].at for number in sorted(term, key=abs)), "$")

    def give_up(self, at: str, what: str, remedy: str) -> None:
        if not self.lenient:
            raise SchemaUnsupported(
                f"The schema at {at} {what}, which a grammar cannot express.",
                remedy=f"{remedy} As an output it can be checked once it is whole: Schema(..., check_after=True).",
            )
        self.dropped.append(f"{at} {what}")

    def note(self, at: str, what: str) -> None:
        self.notes.append(f"the schema at {at} {what}")

    def shape(self, term: Term) -> Shape:
        """The union of atoms that a term comes to."""
        if (known := self._shapes.get(term)) is not None:
            return known
        shape = full_shape()
        for number in sorted(term, key=abs):
            shape = self._join(shape, self._shape_of(number), self.at(term))
        if len(self._shapes) >= MAX_TERMS:
            raise _too_large(self.at(term))
        self._shapes[term] = shape
        return shape

    def is_possible(self, term: Term, depth: int = _DEPTH_OF_PROOF) -> bool:
        """False where plainly no value is such; True is no promise."""
        if depth == 0 or term == ANYTHING or self._proofs >= _DEPTH_OF_PROOF:
            return True
        known = self._proved.get((term, depth))
        if known is not None:
            return known
        self._proofs += 1
        try:
            possible = any(self._may_be(atom, depth) for atoms in self.shape(term).values() for atom in atoms)
        except _Undecided:
            return True
        except SchemaUnsupported:  # refused where it is needed, not where it would help to know
            if self._meetings > MAX_MEETINGS:
                raise
            possible = True
        finally:
            self._proofs -= 1
        self._proved[term, depth] = possible
        return possible

    def _intern(self, key: object, node: _Node) -> int:
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = len(self._nodes)
            self._nodes.append(node)
        return number

    def _shape_of(self, number: int) -> Shape:
        node = self._nodes[abs(number)]
        if node.schema is True:
            return full_shape() if number > 0 else {}
        if node.opposite is not None:
            if number < 0:
                return self.shape(node.opposite)
            return self._union([self._shape_of(-one) for one in sorted(node.opposite)], node.at)
        shape = self._of(abs(number), negated=number < 0)
        return shape if number > 0 else self._complement(shape, KINDS, node.at)

    def _of(self, number: int, *, negated: bool) -> Shape:
        key = (number, negated)
        if (known := self._read.get(key)) is not None:
            return known
        node = self._nodes[number]
        if key in self._open:
            if self._proofs:
                raise _Undecided
            raise wrong(node.at, "refers to itself and to nothing else", "give it something of its own")
        if len(self._open) > _MAX_LEVEL:
            raise wrong(node.at, f"joins more than {_MAX_LEVEL} schemas, one in the other", "write less of it")
        self._open.add(key)
        try:
            assert isinstance(node.schema, dict)
            shape = self._keywords(node.schema, node.base, node.at, negated)
        finally:
            self._open.discard(key)
        self._read[key] = shape
        return shape

    def _inner(self, schema: Json, base: str, at: str, negated: bool) -> Shape:
        term = self.term(schema, base, at)
        if not term or term == NOTHING:
            return self.shape(term)
        return self._of(next(iter(term)), negated=negated)

    def _keywords(self, schema: Schema, base: str, at: str, negated: bool) -> Shape:
        if "$ref" in schema and self.document.lone_references:
            return self._reference(schema["$ref"], base, at, negated)
        for unsaid in ("$dynamicRef", "$recursiveRef"):
            if unsaid in schema:
                self.give_up(at, f"uses {unsaid}", "Write a plain $ref.")
        read = {key: value for key, value in schema.items() if key not in self._unknown}
        own = own_shape({key: value for key, value in read.items() if key in OWN}, base, at, self)
        shape, placed = full_shape(), False
        for key in read:
            if key in OWN:
                if not placed:
                    shape, placed = self._join(shape, own, at), True
            else:
                part = self._part(key, read, base, at, negated, tuple(own))
                if part is not None:
                    shape = self._join(shape, part, at)
        return self._unevaluated(shape, read, base, at)

    def _part(self, key: str, schema: Schema, base: str, at: str, negated: bool, kinds: Sequence[str]) -> Shape | None:
        """What one keyword that joins schemas comes to; None for one that is for people."""
        value = schema[key]
        match key:
            case "$ref":
                return self._reference(value, base, at, negated)
            case "allOf":
                shape = full_shape()
                for number, one in enumerate(_listed(value, key, at)):
                    shape = self._join(shape, self._inner(one, base, f"{at}&{number}", negated), at)
                return shape
            case "anyOf":
                options = _listed(value, key, at)
                return self._union([self._inner(one, base, f"{at}|{n}", negated) for n, one in enumerate(options)], at)
            case "oneOf":
                options = _listed(value, key, at)
                both_ways = [self._inner(one, base, f"{at}|{n}", True) for n, one in enumerate(options)]
                return self._one_of(both_ways, kinds, at)
            case "not":
                return self._complement(self._inner(value, base, f"{at}.not", not negated), kinds, at)
            case "if":
                return self._condition(schema, base, at, negated, kinds)
            case "dependentSchemas":
                return self._dependencies(value, base, at, negated)
            case "dependencies" if self._legacy and not (negated and not self.document.lone_references):
                return self._dependencies(value, base, at, negated)
            case _:
                return None

    def _reference(self, reference: Json, base: str, at: str, negated: bool) -> Shape:
        place = self.document.target(reference, base) if isinstance(reference, str) else None
        if place is None:
            raise wrong(
                at, f"refers to {str(reference)[:200]!r}, which is not in this schema",
                "put the definition into its $defs",
            )  # fmt: skip
        name = str(reference).rsplit("/", 1)[-1]
        return self._inner(place.schema, place.base, f"{at}<{name}>", negated)

    def _condition(self, schema: Schema, base: str, at: str, negated: bool, kinds: Sequence[str]) -> Shape | None:
        if "then" not in schema and "else" not in schema:
            return None
        condition = self._inner(schema["if"], base, f"{at}.if", True)  # used both ways
        holds, fails = condition, self._complement(condition, kinds, at)
        if "then" in schema:
            holds = self._join(condition, self._inner(schema["then"], base, f"{at}.then", negated), at)
        if "else" in schema:
            fails = self._join(fails, self._inner(schema["else"], base, f"{at}.else", negated), at)
        return self._union([holds, fails], at)

    def _dependencies(self, given: Json, base: str, at: str, negated: bool) -> Shape:
        if not isinstance(given, dict):
            raise wrong(at, "has dependencies that are no object", "write an object")
        shape = full_shape()
        for name, needed in given.items():
            if isinstance(needed, list | str):
                names = [needed] if isinstance(needed, str) else needed
                pairs = tuple((name, str(one)) for one in names)
                part: Shape = {**full_shape(), "object": (Object(needs=pairs),)}
            else:
                present: Shape = {**full_shape(), "object": (Object(required=(name,)),)}
                absent: Shape = {"object": (_without(name),)}
                inner = self._inner(needed, base, f"{at}.{name}", negated)
                part = {**full_shape(), "object": ()}
                part["object"] = self._union([self._join(present, inner, at), absent], at).get("object", ())
            shape = self._join(shape, part, at)
        return shape

    def _unevaluated(self, shape: Shape, schema: Schema, base: str, at: str) -> Shape:
        """What `unevaluated...` says of all that the schema's other keywords did not name, case by case."""
        if "unevaluatedProperties" in schema:
            rest = self.term(schema["unevaluatedProperties"], base, f"{at}.unevaluated")
            atoms: list[Atom] = []
            for atom in shape.get("object", ()):
                assert isinstance(atom, Object)
                said = [entries for entries in atom.entries if not entries.derived]
                if not any(entries.more is not None for entries in said):
                    named = dict.fromkeys(name for entries in said for name, _ in entries.named)
                    patterned = dict.fromkeys(name for entries in said for name, _ in entries.patterned)
                    seal = Entries(
                        tuple((name, ANYTHING) for name in named), tuple((name, ANYTHING) for name in patterned), rest
                    )
                    atom = replace(atom, entries=(*atom.entries, seal))
                atoms.append(atom)
            shape = {**shape, "object": tuple(atoms)} if atoms else shape
        if "unevaluatedItems" in schema:
            rest = self.term(schema["unevaluatedItems"], base, f"{at}.unevaluated")
            atoms = []
            for atom in shape.get("array", ()):
                assert isinstance(atom, Array)
                told = [items for items in atom.items if not items.derived]
                if not any(items.rest != ANYTHING for items in told):
                    length = max((len(items.first) for items in told), default=0)
                    atom = replace(atom, items=(*atom.items, Items((ANYTHING,) * length, rest)))
                atoms.append(atom)
            shape = {**shape, "array": tuple(atoms)} if atoms else shape
        return shape

    def _join(self, one: Shape, other: Shape, at: str) -> Shape:
        joined: Shape = {}
        for kind in KINDS:
            mine, theirs = one.get(kind, ()), other.get(kind, ())
            if mine == (full(kind),):
                met = list(theirs)
            elif theirs == (full(kind),):
                met = list(mine)
            else:
                self._meetings += len(mine) * len(theirs)
                if len(mine) * len(theirs) > 4 * MAX_CASES or self._meetings > MAX_MEETINGS:
                    raise _too_large(at)
                found = [meet(a, b) for a in mine for b in theirs]
                met = _different([atom for atom in found if atom is not None])
            if len(met) > 1 and len(mine) * len(theirs) > max(len(mine), len(theirs)):
                met = [atom for atom in met if self._may_be(atom, 1)]
            if len(met) > MAX_CASES:
                raise _too_large(at)
            if met:
                joined[kind] = tuple(met)
        return joined

    def _union(self, shapes: Sequence[Shape], at: str) -> Shape:
        united: Shape = {}
        for kind in KINDS:
            atoms = _different([atom for shape in shapes for atom in shape.get(kind, ())])
            if len(atoms) > MAX_CASES:
                raise _too_large(at)
            if full(kind) in atoms:
                atoms = [full(kind)]
            if atoms:
                united[kind] = tuple(atoms)
        return united

    def _one_of(self, shapes: list[Shape], kinds: Collection[str], at: str) -> Shape:
        """Each option without what any other lets through too."""
        apart: list[Shape] = []
        for number, shape in enumerate(shapes):
            mine = shape
            for index, other in enumerate(shapes):
                if index == number:
                    continue
                shared = [
                    kind
                    for kind in kinds
                    if any(self._may_be(atom, _DEPTH_OF_PROOF) for atom in self._join_of(mine, other, kind))
                ]
                if not shared:
                    continue
                if self.lenient and self._is_unsaid(other, shared):
                    self.dropped.append(f"{at} has oneOf with options that overlap")
                    continue
                outside = self._complement(other, shared, f"{at}|{index}")
                outside = {kind: outside.get(kind, ()) if kind in shared else (full(kind),) for kind in KINDS}
                mine = self._join(mine, outside, at)
            apart.append(mine)
        return self._union(apart, at)

    def _join_of(self, one: Shape, other: Shape, kind: str) -> list[Atom]:
        found = [meet(a, b) for a in one.get(kind, ()) for b in other.get(kind, ())]
        return [atom for atom in found if atom is not None]

    def _is_unsaid(self, shape: Shape, kinds: Collection[str]) -> bool:
        return any(not self._opposites(atom)[0] for kind in kinds for atom in shape.get(kind, ()))

    def _complement(self, shape: Shape, kinds: Collection[str], at: str) -> Shape:
        """All that the shape is not, among these kinds of values."""
        outside: Shape = {}
        for kind in kinds:
            left: list[Atom] = [full(kind)]
            for atom in shape.get(kind, ()):
                opposites, unsaid = self._opposites(atom)
                if not opposites and unsaid:
                    self.give_up(at, f"excludes values by {', '.join(sorted(set(unsaid)))}", "Say what there may be.")
                    continue
                met = [meet(one, other) for one in left for other in opposites]
                left = [one for one in _different([one for one in met if one is not None]) if self._may_be(one, 2)]
                if len(left) > MAX_CASES:
                    raise _too_large(at)
            if left:
                outside[kind] = tuple(left)
        return outside

    def _opposites(self, atom: Atom) -> tuple[list[Atom], list[str]]:
        found = simple_complement(atom)
        atoms, unsaid = found.atoms, found.unsaid
        if isinstance(atom, Array):
            unsaid += ["uniqueItems"] if atom.unique else []
            for items in atom.items:
                for index, term in enumerate(items.first):
                    if term != ANYTHING:
                        other = Items((*(ANYTHING,) * index, self.opposite(term)), derived=True)
                        atoms.append(Array((other,), least=index + 1))
                if items.rest == NOTHING:
                    atoms.append(Array(least=len(items.first) + 1))
                elif items.rest != ANYTHING:
                    if items.first:
                        unsaid.append("items")
                    else:
                        atoms.append(Array(contains=(Contains(self.opposite(items.rest)),)))
            for one in atom.contains:
                if one.least == 1:
                    atoms.append(Array((Items((), self.opposite(one.term), derived=True),)))
                elif one.least > 1:
                    atoms.append(Array(contains=(Contains(one.term, 0, one.least - 1),)))
                if one.most is not None:
                    atoms.append(Array(contains=(Contains(one.term, one.most + 1),)))
        if isinstance(atom, Object):
            atoms += [_without(name) for name in atom.required]
            for entries in atom.entries:
                for name, term in entries.named:
                    if term != ANYTHING:
                        opposite = Entries(((name, self.opposite(term)),), derived=True)
                        atoms.append(Object((opposite,), (name,)))
                unsaid += ["patternProperties"] if any(term != ANYTHING for _, term in entries.patterned) else []
                unsaid += ["additionalProperties"] if entries.more not in (None, ANYTHING) else []
            unsaid += ["propertyNames"] if atom.names != ANYTHING else []
            for name, needed in atom.needs:
                atoms.append(replace(_without(needed), required=(name,)))
        return atoms, unsaid

    def _may_be(self, atom: Atom, depth: int) -> bool:
        if atom.values.only is not None and not isinstance(atom, Plain):
            bare = replace(atom, values=Values(None, atom.values.never))
            return any(self.holding.atom(bare, value) is not False for value in atom.values.only)
        if isinstance(atom, Array) and depth > 1:
            for index in range(min(atom.least, 8)):
                if not self.is_possible(frozenset().union(*(items.at(index) for items in atom.items)), depth - 1):
                    return False
        if isinstance(atom, Object):
            for name in atom.required:
                term = self.holding.of_name(atom, name)
                if term >= NOTHING or (depth > 1 and not self.is_possible(term, depth - 1)):
                    return False
        return True


def _without(name: str) -> Object:
    return Object((Entries(((name, NOTHING),), derived=True),))


def _different(atoms: list[Atom]) -> list[Atom]:
    kept: list[Atom] = []
    for atom in atoms:
        if atom not in kept:
            kept.append(atom)
    return kept


def _listed(value: Json, key: str, at: str) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise wrong(at, f"has an empty {key}", "name at least one option")
    return value


def _too_large(at: str) -> SchemaUnsupported:
    return SchemaUnsupported(
        f"The schema at {at} comes to more cases than a grammar can hold.", remedy="Say it with fewer alternatives."
    )
