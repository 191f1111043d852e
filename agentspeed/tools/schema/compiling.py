"""A JSON schema as rules of a grammar: read, planned and written, recursion to a bounded depth.

An object can also be compiled entry by entry, for a format of calls that writes arguments one by one.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, TypeAlias

from agentspeed.errors import SchemaUnsupported
from agentspeed.tools.schema.atoms import Atom, Number, Term, Text, Values
from agentspeed.tools.schema.bounds import DEFAULT_BOUNDS, Bounds
from agentspeed.tools.schema.plans import Leaf, ObjectPlan, Plan, Planner, parts_of
from agentspeed.tools.schema.references import Document
from agentspeed.tools.schema.rules import Rules
from agentspeed.tools.schema.terms import MAX_TERMS, Terms
from agentspeed.tools.schema.values import Json

_MAX_RULES: Final = 100_000


@dataclass(frozen=True, slots=True)
class Compiled:
    """The rules of one value of a schema; `start` is the one to begin with."""

    start: str
    rules: tuple[tuple[str, str], ...]
    kinds: frozenset[str]
    """The kinds of values that there are: "object", "string" and so on."""
    unchecked: tuple[str, ...] = ()
    """What the grammar does not hold and a check of the whole text must, where that was asked for."""


@dataclass(frozen=True, slots=True)
class Wording:
    """Texts of `least` to `most` characters; where `only` is set, one of those instead."""

    least: int
    most: int
    only: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of an object, with the rules of its value as JSON."""

    name: str
    required: bool
    value: Compiled
    texts: Wording | None
    """What texts there are, where every value is a text and nothing is said but its length or which it may be."""
    among: Wording | None = None
    """The same of the texts among other values."""


@dataclass(frozen=True, slots=True)
class EntryKinds:
    """What the values of one entry may be, in every way that its object may be."""

    kinds: frozenset[str]
    """Of "null", "boolean", "integer", "number", "string", "array" and "object"."""
    texts: tuple[Wording, ...] | None
    """What texts there are, where every value is a text and nothing is said but its length or which it may be."""


Words: TypeAlias = tuple[tuple[str, str], ...]
"""(Word of JSON, how it is spelt instead)."""


def compile_schema(
    schema: Mapping[str, Json],
    bounds: Bounds = DEFAULT_BOUNDS,
    *,
    prefix: str = "json",
    lenient: bool = False,
    sets: bool = False,
    spaced: bool = False,
) -> Compiled:
    """Whatever text the rules let be written is JSON, compact, of a bounded length, and an instance of the schema.

    `prefix` begins the rules' names. `lenient` leaves to a later check what no grammar can hold; `sets` leaves out
    `uniqueItems` where it cannot be held, for a reader that drops duplicates; `spaced` puts one space after each comma
    and colon. Raises `SchemaUnsupported` with the place and the reason."""
    with _shallow():
        return _compiled(_source(schema, bounds), bounds, prefix, lenient, sets, spaced)


def compile_entries(
    schema: Mapping[str, Json],
    bounds: Bounds = DEFAULT_BOUNDS,
    *,
    prefix: str = "json",
    sets: bool = False,
    spaced: bool = False,
    words: Words = (),
) -> tuple[tuple[Entry, ...], ...]:
    """The entries of an object in the order of their properties; one list for each way the object may be. `words` says
    how a value is spelt that is true, false or null, where that is not JSON; inside of arrays and objects it is.

    Entries that no property names are left out. Raises `SchemaUnsupported` where entries alone do not make an instance
    of the schema: other values than objects, a count of entries, entries that need one another."""
    with _shallow():
        return _entries(_source(schema, bounds), bounds, prefix, sets, spaced, words)


def entry_kinds(schema: Mapping[str, Json]) -> Mapping[str, EntryKinds]:
    """What the values of each entry that the schema of an object names may be. Empty for a schema that cannot be
    read: nothing is known then."""
    try:
        with _shallow():
            return _entry_kinds(_source(schema, DEFAULT_BOUNDS))
    except SchemaUnsupported:
        return {}


@contextmanager
def _shallow() -> Iterator[None]:
    """The caller may stand deep in the stack already."""
    try:
        yield
    except RecursionError as error:
        raise SchemaUnsupported("The schema nests too deep to be read here.", remedy="Say less of it.") from error


def _source(schema: Mapping[str, Json], bounds: Bounds) -> str:
    if not isinstance(bounds, Bounds):
        raise SchemaUnsupported(f"bounds is {bounds!r}; it must be a Bounds.", remedy="Write Bounds(string_chars=40).")
    if not isinstance(schema, Mapping):
        raise SchemaUnsupported(
            f"The schema is {str(schema)[:200]}, which is not a JSON schema.",
            remedy='Pass a dict such as {"type": "integer"}.',
        )
    try:
        held = marshal.dumps(dict(schema), 2)
    except ValueError:  # what holds something else than JSON: the document says what
        return json.dumps(Document(dict(schema)).root)
    return _checked(held)


@lru_cache(maxsize=256)
def _checked(held: bytes) -> str:
    """Of a schema by its bytes, which tell 1 from "1" and from True: a turn asks for the schemas of all its tools, and
    to check one takes a hundred times as long as to write it so."""
    return json.dumps(Document(marshal.loads(held)).root)


@lru_cache(maxsize=256)
def _compiled(source: str, bounds: Bounds, prefix: str, lenient: bool, sets: bool, spaced: bool) -> Compiled:
    terms = Terms(Document(json.loads(source)), lenient=lenient)
    compiler = _Compiler(terms, Planner(terms, bounds, sets=sets, spaced=spaced), bounds, Rules(prefix, spaced=spaced))
    compiled = compiler.compile(terms.root())
    if compiled is None:
        raise compiler.impossible()
    return compiled


@lru_cache(maxsize=256)
def _entries(
    source: str, bounds: Bounds, prefix: str, sets: bool, spaced: bool, words: Words
) -> tuple[tuple[Entry, ...], ...]:
    terms = Terms(Document(json.loads(source)))
    compiler = _Compiler(terms, Planner(terms, bounds, sets=sets, spaced=spaced), bounds, Rules(prefix, spaced=spaced))
    found = [compiler.entries(plan, words) for plan in compiler.objects()]
    ways = tuple(way for way in found if way is not None)
    if not ways:
        raise compiler.impossible()
    return ways


@lru_cache(maxsize=256)
def _entry_kinds(source: str) -> Mapping[str, EntryKinds]:
    terms = Terms(Document(json.loads(source)))
    planner = Planner(terms, DEFAULT_BOUNDS, sets=True)
    try:
        return _Compiler(terms, planner, DEFAULT_BOUNDS, Rules("json")).entry_kinds()
    except SchemaUnsupported:  # kept, as it would be read again for every call
        return {}


class _Compiler:
    def __init__(self, terms: Terms, planner: Planner, bounds: Bounds, rules: Rules) -> None:
        self._terms = terms
        self._planner = planner
        self._bounds = bounds
        self._rules = rules
        self._plans: dict[Term, list[Plan]] = {}
        self._written: dict[Term, str | None] = {}

    def objects(self) -> list[ObjectPlan]:
        """The ways in which the root is an object whose entries can be written one by one."""
        plans = self._plans_of(self._terms.root())
        found = [plan for plan in plans if isinstance(plan, ObjectPlan)]
        if len(found) < len(plans):
            raise _not_by_entries("allows other values than objects")
        for plan in found:
            needed = sum(field.required for field in plan.fields)
            if plan.needs or plan.most is not None or plan.least > needed:
                raise _not_by_entries("counts its entries, or some of them need others")
            if plan.extras and not plan.fields:
                raise _not_by_entries("names no entries")
        return found

    def entries(self, plan: ObjectPlan, words: Words) -> tuple[Entry, ...] | None:
        """None where a required entry has no value."""
        found: list[Entry] = []
        for field in plan.fields:
            value = self.compile(field.term)
            if value is not None:
                spelt = self._spelt(field.term, value, words)
                texts, among = self._wording(field.term), self._wording(field.term, among=True)
                found.append(Entry(field.name, field.required, spelt, texts, among))
            elif field.required:
                return None
        return tuple(found)

    def entry_kinds(self) -> dict[str, EntryKinds]:
        """By name, over all ways in which the root is an object."""
        found: dict[str, EntryKinds] = {}
        for plan in self._plans_of(self._terms.root()):
            for field in plan.fields if isinstance(plan, ObjectPlan) else ():
                kinds = frozenset(_kind(atom) for atoms in self._planner.shape(field.term).values() for atom in atoms)
                wording = self._wording(field.term)
                texts: tuple[Wording, ...] | None = None if wording is None else (wording,)
                if (other := found.get(field.name)) is not None:
                    kinds |= other.kinds
                    texts = None if texts is None or other.texts is None else other.texts + texts
                found[field.name] = EntryKinds(kinds, texts)
        return found

    def _spelt(self, term: Term, value: Compiled, words: Words) -> Compiled:
        """The same value with other words for what is no text, number, array or object."""
        other = {json.dumps(word): Leaf(json.dumps(spelling)) for word, spelling in words}
        plans = self._plans_of(term)
        if not any(isinstance(plan, Leaf) and plan.body in other for plan in plans):
            return value
        spelt = [other.get(plan.body, plan) if isinstance(plan, Leaf) else plan for plan in plans]
        names = [self._rules.plan(plan, self._written.__getitem__) for plan in spelt]
        start = self._rules.either(name for name in names if name is not None)
        return value if start is None else replace(value, start=start, rules=tuple(self._rules.reached(start)))

    def _wording(self, term: Term, *, among: bool = False) -> Wording | None:
        """Of a term that has texts only, or `among` other values."""
        shape = self._planner.shape(term)
        atoms = shape.get("string", ())
        if (shape.keys() != {"string"} and not among) or len(atoms) != 1 or not isinstance(atoms[0], Text):
            return None
        atom = atoms[0]
        if atom.values.only is not None:
            bare = replace(atom, values=Values(None, atom.values.never))
            kept = [str(value) for value in atom.values.only if self._terms.holding.atom(bare, value)]
            return Wording(0, max(map(len, kept), default=0), tuple(kept)) if kept else None
        if atom.patterns or atom.not_patterns or atom.formats or atom.values.never:
            return None
        return Wording(atom.least, max(self._bounds.string_chars, atom.least) if atom.most is None else atom.most)

    def impossible(self) -> SchemaUnsupported:
        """The reason why nothing could be compiled."""
        within = f" within {self._bounds.nesting} levels" if any(self._plans.values()) else ""
        why = f": {self._terms.notes[0]}" if self._terms.notes else ""
        return SchemaUnsupported(
            f"No value is allowed by the schema{within}{why}.", remedy="Correct what stands side by side in it."
        )

    def compile(self, root: Term) -> Compiled | None:
        """None where there is no value."""
        written = self._written
        for group in self._groups(root):
            if group[0] in written:
                continue
            if len(group) == 1 and group[0] not in self._inside(group[0]):
                written[group[0]] = self._write(group[0], written)
                continue
            # The parts of a recursive group: each level is written over the one below it.
            below: dict[Term, str | None] = dict.fromkeys(group, None)
            for _ in range(self._bounds.nesting):
                below = {term: self._write(term, {**written, **below}) for term in group}
                if len(self._rules.bodies) > _MAX_RULES:
                    raise SchemaUnsupported(
                        "The schema comes to more rules than a grammar can hold.",
                        remedy="Say less of it, or lower Bounds(nesting=...).",
                    )
            written.update(below)
        start = written[root]
        if start is None:
            return None
        kinds = frozenset(kind for kind, atoms in self._planner.shape(root).items() if atoms)
        return Compiled(start, tuple(self._rules.reached(start)), kinds, tuple(dict.fromkeys(self._terms.dropped)))

    def _write(self, term: Term, inside: dict[Term, str | None]) -> str | None:
        found = [self._rules.plan(plan, inside.__getitem__) for plan in self._plans_of(term)]
        return self._rules.either(name for name in found if name is not None)

    def _plans_of(self, term: Term) -> list[Plan]:
        if term not in self._plans:
            if len(self._plans) >= MAX_TERMS:
                raise SchemaUnsupported("The schema has too many parts.", remedy="Say less of it.")
            self._plans[term] = self._planner.plans(term)
        return self._plans[term]

    def _inside(self, term: Term) -> list[Term]:
        return list(dict.fromkeys(part for plan in self._plans_of(term) for part in parts_of(plan)))

    def _groups(self, root: Term) -> list[list[Term]]:
        """The strongly connected parts of what stands in what, those inside first (Tarjan, without recursion)."""
        index: dict[Term, int] = {root: 0}
        low: dict[Term, int] = {root: 0}
        stack, on_stack = [root], {root}
        groups: list[list[Term]] = []
        waiting = [(root, iter(self._inside(root)))]
        while waiting:
            term, parts = waiting[-1]
            for part in parts:
                if part not in index:
                    index[part] = low[part] = len(index)
                    stack.append(part)
                    on_stack.add(part)
                    waiting.append((part, iter(self._inside(part))))
                    break
                if part in on_stack:
                    low[term] = min(low[term], index[part])
            else:
                _ = waiting.pop()
                if waiting:
                    low[waiting[-1][0]] = min(low[waiting[-1][0]], low[term])
                if low[term] == index[term]:
                    group: list[Term] = []
                    while not group or group[-1] != term:
                        group.append(stack.pop())
                        on_stack.discard(group[-1])
                    groups.append(group)
        return groups


def _kind(atom: Atom) -> str:
    return "integer" if isinstance(atom, Number) and atom.whole else atom.kind


def _not_by_entries(what: str) -> SchemaUnsupported:
    return SchemaUnsupported(
        f"The schema {what}, and entries are to be written one by one.", remedy="Name one property for each value."
    )
