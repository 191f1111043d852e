"""Plans as rules of the grammar library's language: whatever a rule lets be begun can also be ended.

Where how much was written decides what may follow (counts, what needs what), rules carry a number whose bits count;
an alternative is open only while the rest can still come to what is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final, TypeAlias

from agentspeed.tools.schema.atoms import Term
from agentspeed.tools.schema.patterns import literal
from agentspeed.tools.schema.plans import ArrayPlan, Distinct, Field, Leaf, ObjectPlan, Plan

Inside: TypeAlias = Callable[[Term], "str | None"]
"""The rule of a term that stands inside; None where none of its values can be written there."""

_TOTAL: Final = "[0:8]"
_ITEMS: Final = "[0:8]"
_FIRST_BIT: Final = 16
_NEVER: Final = '"" %if lt([0:8], 0)'
HEAD: Final = "%llguidance {}"


class Rules:
    """Collects rules under names of one prefix; the same body has one name."""

    def __init__(self, prefix: str, *, spaced: bool = False) -> None:
        self._prefix = prefix
        self.comma = '", "' if spaced else '","'
        self._colon = ": " if spaced else ":"
        self._names: dict[str, str] = {}
        self.bodies: dict[str, str] = {}
        self.uses: dict[str, frozenset[str]] = {}

    def add(self, body: str, *uses: str | None, terminal: bool = False, stateful: bool = False) -> str:
        """The name to refer to it by; `uses` are names that the body refers to."""
        body = _with_choice(body) if stateful else body
        key = f"{stateful}{body}"
        if (known := self._names.get(key)) is not None:
            return known
        name = f"{self._prefix.upper() if terminal else self._prefix}_{len(self._names)}"
        self._names[key] = name
        self.bodies[f"{name}::_" if stateful else name] = body
        self.uses[name] = frozenset(use for use in uses if use)
        return name

    def reached(self, start: str) -> list[tuple[str, str]]:
        """The rules that a start needs, by name and body."""
        seen, waiting = {start}, [start]
        while waiting:
            for use in self.uses[waiting.pop()] - seen:
                seen.add(use)
                waiting.append(use)
        return [(name, body) for name, body in self.bodies.items() if name.removesuffix("::_") in seen]

    def plan(self, plan: Plan, inside: Inside) -> str | None:
        """The rule of one plan; None where it has no value."""
        match plan:
            case Leaf(body):
                return self._leaf(body)
            case Distinct():
                return self._distinct(plan, inside)
            case ArrayPlan():
                return self._counted(plan, inside) if plan.counts or plan.count_least else self._array(plan, inside)
            case ObjectPlan():
                return self._object(plan, inside)

    def either(self, names: Iterable[str]) -> str | None:
        found = list(dict.fromkeys(names))
        if len(found) < 2:
            return found[0] if found else None
        return self.add(" | ".join(found), *found)

    def _leaf(self, body: str) -> str | None:
        if not _has_text(body):
            return None
        return self.add(body, terminal=not body.startswith("%json"))

    def _distinct(self, plan: Distinct, inside: Inside) -> str | None:
        values = [name for term in plan.values if (name := inside(term)) is not None]
        most = min(plan.most, len(values))
        if plan.least > most:
            return None
        if most == 0:
            return self.add('"[" "]"')
        if len(values) == 1:
            return self.add(f'"[" {values[0]} "]"' if plan.least else f'"[" ({values[0]})? "]"', values[0])
        ring = self.named_later()
        after = f"{ring}b"
        taken = [
            f"{name} {after}::set_bit({bit}) %if {_all([f'bit_clear({bit})', f'bit_count_lt(_, {most})'])}"
            for bit, name in enumerate(values)
        ]
        self.put(ring, " | ".join(taken), after, *values)
        goes_on = f"{self.comma} {ring}::_ %if bit_count_lt(_, {most})"
        self.put(after, f'"]" %if bit_count_ge(_, {plan.least}) | {goes_on}', ring)
        start = f'"[" {ring}::0' + (' | "[" "]"' if plan.least == 0 else "")
        return self.add(start, ring)

    def _array(self, plan: ArrayPlan, inside: Inside) -> str | None:
        first: list[str] = []
        most = plan.most
        for slot in plan.first:
            name = inside(slot.term)
            if name is None:
                most = min(most, len(first))
                break
            first.append(name)
        first = first[:most]
        rest = inside(plan.rest.term) if most > len(first) else None
        if rest is None:
            most = min(most, len(first))
        least = plan.least
        if least > most:
            return None
        if not first:
            if rest is None:
                return self.add('"[" "]"')
            more = f" ({self.comma} {rest}){{{max(0, least - 1)},{most - 1}}}" if most > 1 else ""
            return self.add(f'"[" {rest}{more} "]"' if least else f'"[" ({rest}{more})? "]"', rest)
        tail = ""
        if rest is not None:
            tail = self.add(f"({self.comma} {rest}){{{max(0, least - len(first))},{most - len(first)}}}", rest)
        for index in range(len(first) - 1, 0, -1):
            body = f"{self.comma} {first[index]} {tail}"
            tail = self.add(f"({body})?" if index >= least else body, first[index], tail)
        body = f"{first[0]} {tail}"
        return self.add(f'"[" ({body})? "]"' if least == 0 else f'"[" {body} "]"', first[0], tail)

    def _counted(self, plan: ArrayPlan, inside: Inside) -> str | None:
        """An array of which some items count: position by position, then any number of the rest."""
        due, most = plan.count_least, plan.most
        if plan.count_most is not None and due > plan.count_most:
            return None
        slots = [(inside(slot.term), None if slot.counted is None else inside(slot.counted)) for slot in plan.first]
        rest = plan.rest if most > len(slots) else None
        plain = None if rest is None else inside(rest.term)
        slots.append((plain, None if rest is None or rest.counted is None else inside(rest.counted)))
        for index, (plain, counted) in enumerate(slots):
            if plain is None and counted is None:
                most, slots = min(most, index), slots[: index + 1]
                break
        first, (plain, counted) = slots[:-1][:most], slots[-1]
        if plan.count_most is not None and (plain is None or any(one is None for one, _ in first)):
            if first or counted is None:
                return None if plan.least or due else self.add('"[" "]"')
            # Every item counts, so the array is no longer than that.
            least, most = max(plan.least, due), min(most, plan.count_most)
            if least > most or most < 1:
                return None if least else self.add('"[" "]"')
            body = f"{counted} ({self.comma} {counted}){{{max(0, least - 1)},{most - 1}}}"
            return self.add(f'"[" {body} "]"' if least else f'"[" ({body})? "]"', counted)
        return self._positions(plan, first, plain, counted, most)

    def _positions(
        self,
        plan: ArrayPlan,
        first: list[tuple[str | None, str | None]],
        plain: str | None,
        counted: str | None,
        most: int,
    ) -> str | None:
        """One set of rules for each number of items that have counted; those of the rest carry how many they are."""
        due, room, least = plan.count_least, most - len(first), plan.least
        top = due if plan.count_most is None else max(due, plan.count_most)
        after: dict[int, str | None] = {}
        loops = {count: self.named_later() for count in range(top + 1)}
        starts: dict[int, str | None] = {}
        for count in range(top + 1):
            missing = max(0, due - count)
            if missing > (room if counted is not None else 0):
                after[count] = None
                continue
            enough = f'"]" {_when([f"ge({_ITEMS}, {max(0, least - len(first))})"])}'
            options = [enough] if not missing else []
            if plain is not None and room > missing:
                when = _when([f"lt({_ITEMS}, {room - missing})"])
                options.append(f"{self.comma} {plain} {loops[count]}::incr({_ITEMS}) {when}")
            following = min(count + 1, top) if plan.count_most is None else count + 1
            if counted is not None and following <= top and room > 0:
                when = _when([f"lt({_ITEMS}, {room - max(0, missing - 1)})"])
                options.append(f"{self.comma} {counted} {loops[following]}::incr({_ITEMS}) {when}")
            uses = [plain, counted, loops[count], *([loops[following]] if following <= top else [])]
            self.put(loops[count], " | ".join(options), *uses)
            after[count] = f"{loops[count]}::0"
            if not first and count == 0:
                begin = self.named_later()
                self.put(begin, " | ".join(one.removeprefix(f"{self.comma} ") for one in options), *uses)
                starts[0] = f"{begin}::0"
        for index in range(len(first) - 1, -1, -1):
            one, other = first[index]
            comma = f"{self.comma} " if index else ""
            here: dict[int, str | None] = {}
            for count in range(top + 1):
                following = min(count + 1, top) if plan.count_most is None else count + 1
                options = ['"]"'] if index >= least and count >= due else []
                if one is not None and after[count] is not None:
                    options.append(f"{comma}{one} {after[count]}")
                if other is not None and after.get(following) is not None:
                    options.append(f"{comma}{other} {after[following]}")
                uses = [one, other, _named(after[count]), _named(after.get(following))]
                here[count] = self.add(" | ".join(options), *uses) if options else None
            after = starts = here
        start = starts.get(0)
        return None if start is None else self.add(f'"[" {start}', _named(start))

    def _object(self, plan: ObjectPlan, inside: Inside) -> str | None:
        fields: list[tuple[Field, str]] = []
        for field in plan.fields:
            name = inside(field.term)
            if name is not None:
                fields.append((field, name))
            elif field.required:
                return None
        fields, needs = _settled(fields, _closure(plan.needs))
        if any(not name for _, name in fields):
            return None
        while gone := _unmet([field for field, _ in fields], needs):
            if any(field.required for field in gone):
                return None
            fields = [one for one in fields if one[0] not in gone]
        needs = {field.name: needs[field.name] for field, _ in fields if field.name in needs}
        extras = [(extra, name) for extra in plan.extras if (name := inside(extra.term)) is not None]
        extras = [(extra, name) for extra, name in extras if _has_text(extra.key)] if plan.most_extras else []
        required = sum(field.required for field, _ in fields)
        if plan.least > len(fields) + bool(extras) or (plan.most is not None and required > plan.most):
            return None
        entries = [(self._entry(field.name, name), name) for field, name in fields]
        others = [self.add(f"{self.add(extra.key, terminal=True)} {name}", self.add(extra.key, terminal=True), name)
                  for extra, name in extras]  # fmt: skip
        extra = self.either(others)
        if plan.least > required or plan.most is not None or needs:
            body = _Counting(self, plan, [field for field, _ in fields], [one for one, _ in entries], extra, needs)
            start = body.write()
            return self.add(f'"{{" {start}::0 "}}"', start)
        return self._plain_object(fields, [one for one, _ in entries], extra, plan.most_extras)

    def _plain_object(
        self, fields: list[tuple[Field, str]], entries: list[str], extra: str | None, most_extras: int
    ) -> str:
        """After each field the rest follows behind a comma; up to the first written one there is none."""
        behind = self.add(f"({self.comma} {extra}){{0,{most_extras}}}", extra) if extra else ""
        fresh = ""
        if extra:
            more = f" ({self.comma} {extra}){{0,{most_extras - 1}}}" if most_extras > 1 else ""
            fresh = self.add(f"({extra}{more})?", extra)
        for (field, _), entry in zip(reversed(fields), reversed(entries), strict=True):
            if field.required:
                fresh = self.add(f"{entry} {behind}", entry, behind)
                behind = self.add(f"{self.comma} {entry} {behind}", entry, behind)
            else:
                other = f"| {fresh}" if fresh else '| ""'
                fresh = self.add(f"{entry} {behind} {other}", entry, behind, fresh)
                behind = self.add(f"({self.comma} {entry})? {behind}", entry, behind)
        return self.add(f'"{{" {fresh} "}}"', fresh)

    def _entry(self, name: str, value: str) -> str:
        key = self.add(f'/"({literal(name)})"{self._colon}/', terminal=True)
        return self.add(f"{key} {value}", key, value)

    def named_later(self) -> str:
        name = f"{self._prefix}_{len(self._names)}s"
        self._names[name] = name
        return name

    def put(self, name: str, body: str, *uses: str | None) -> None:
        """A rule that was named before it was written, because it refers to itself."""
        self.bodies[f"{name}::_"] = _with_choice(body)
        self.uses[name] = frozenset(use for use in uses if use)


class _Counting:
    """An object whose entries are counted, or need one another."""

    def __init__(
        self,
        rules: Rules,
        plan: ObjectPlan,
        fields: list[Field],
        entries: list[str],
        extra: str | None,
        needs: dict[str, frozenset[str]],
    ) -> None:
        self._rules = rules
        self._plan = plan
        self._fields = fields
        self._entries = entries
        self._extra = extra
        involved = [
            field.name for field in fields if any(field.name in {one, *all_of} for one, all_of in needs.items())
        ]
        self._bits = {name: _FIRST_BIT + index for index, name in enumerate(involved)}
        self._needs = needs
        self._place = {field.name: index for index, field in enumerate(fields)}
        required = sum(field.required for field in fields)
        self._least = max(0, plan.least - required)
        self._most = None if plan.most is None else plan.most - required

    def write(self) -> str:
        """What is required is not counted: a rule with one alternative changes no number."""
        behind = self._end(comma=f"{self._rules.comma} ")
        fresh = self._end(comma="")
        optional_after = 0
        for index in range(len(self._fields) - 1, -1, -1):
            field, entry = self._fields[index], self._entries[index]
            names = []
            if field.required:
                names = [self._rules.add(f"{comma}{entry} {behind}::_", entry, behind, stateful=True)
                         for comma in (f"{self._rules.comma} ", "")]  # fmt: skip
            else:
                takes = _when(self._may_take(field, index))
                skips = _when(self._may_skip(field, index, optional_after))
                for comma, rest in ((f"{self._rules.comma} ", behind), ("", fresh)):
                    body = f"{comma}{entry} {behind}::{self._change(field)} {takes} | {rest}::_ {skips}"
                    names.append(self._rules.add(body, entry, behind, rest, stateful=True))
                optional_after += 1
            behind, fresh = names
        return fresh

    def _end(self, *, comma: str) -> str:
        ends = '"" ' + _when([f"ge({_TOTAL}, {self._least})"])
        if not self._extra or self._most == 0:
            return self._rules.add(ends, stateful=True)
        last = [f"ge({_TOTAL}, {self._least - 1})"] if self._least else []
        if self._most is None:
            tail = self._rules.add(
                f"({self._rules.comma} {self._extra}){{0,{self._plan.most_extras - 1}}}", self._extra
            )
            return self._rules.add(
                f"{ends} | {comma}{self._extra} {tail} {_when(last)}", self._extra, tail, stateful=True
            )
        room = f"lt({_TOTAL}, {self._most})"
        loop = self._rules.named_later()
        self._rules.put(
            loop, f'"" | {self._rules.comma} {self._extra} {loop}::incr({_TOTAL}) {_when([room])}', self._extra
        )
        body = f"{ends} | {comma}{self._extra} {loop}::incr({_TOTAL}) {_when([room, *last])}"
        return self._rules.add(body, self._extra, loop, stateful=True)

    def _change(self, field: Field) -> str:
        if field.name in self._bits:
            return f"set_bit({self._bits[field.name]})"
        return f"incr({_TOTAL})" if self._least or self._most is not None else "_"

    def _may_take(self, field: Field, index: int) -> list[str]:
        found = [] if self._most is None else [f"lt({_TOTAL}, {self._most})"]
        for need in sorted(self._needs.get(field.name, ())):
            if self._place[need] < index:
                found.append(f"bit_set({self._bits[need]})")
        return found

    def _may_skip(self, field: Field, index: int, optional_after: int) -> list[str]:
        found = []
        left = optional_after + (self._extra is not None)
        if self._least > left:
            found.append(f"ge({_TOTAL}, {self._least - left})")
        for name, needed in self._needs.items():
            if field.name in needed and self._place[name] < index:
                found.append(f"bit_clear({self._bits[name]})")
        return found


def _settled(
    fields: list[tuple[Field, str]], needs: dict[str, frozenset[str]]
) -> tuple[list[tuple[Field, str]], dict[str, frozenset[str]]]:
    """What a required field needs is required too; what is left is among fields that may be missing."""
    sure = {field.name for field, _ in fields if field.required}
    sure |= {need for name in sure for need in needs.get(name, ())}
    known = {field.name for field, _ in fields}
    fields = [(Field(field.name, field.term, field.name in sure), name) for field, name in fields]
    missing = [(Field(name, frozenset(), True), "") for name in sure - known]
    left = {name: needed - sure for name, needed in needs.items() if name in known and name not in sure}
    return [*fields, *missing], {name: needed for name, needed in left.items() if needed}


def _unmet(fields: list[Field], needs: dict[str, frozenset[str]]) -> list[Field]:
    """The fields that need one which is not there."""
    known = {field.name for field in fields}
    return [field for field in fields if not needs.get(field.name, frozenset()) <= known]


def _named(reference: str | None) -> str | None:
    return None if reference is None else reference.partition("::")[0]


def _with_choice(body: str) -> str:
    """A rule that carries a number has two alternatives: the library folds one that has one into its users, and loses
    what it does to the number."""
    if "::_" in body and " | " not in body and "%if" not in body:
        return body
    return body if " | " in body else f"{body} | {_NEVER}"


def _closure(pairs: tuple[tuple[str, str], ...]) -> dict[str, frozenset[str]]:
    """All that a name needs, directly or through what it needs."""
    needs: dict[str, set[str]] = {}
    for name, need in pairs:
        if name != need:
            needs.setdefault(name, set()).add(need)
    grown = True
    while grown:
        grown = False
        for needed in needs.values():
            more = set().union(*(needs.get(one, set()) for one in needed)) - needed
            grown = grown or bool(more)
            needed |= more
    return {name: frozenset(needed - {name}) for name, needed in needs.items() if needed - {name}}


def _all(conditions: list[str]) -> str:
    found = conditions[-1]
    for condition in reversed(conditions[:-1]):
        found = f"and({condition}, {found})"
    return found


def _when(conditions: list[str]) -> str:
    return f"%if {_all(conditions)}" if conditions else ""


@lru_cache(maxsize=4096)
def _has_text(body: str) -> bool:
    """False where conditions that hold at once leave no text at all. The library's doubt counts as text."""
    if " & " not in body or body.startswith("%json"):
        return True
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), f"{HEAD}\nstart: T\nT: {body}\n", log_level=0)
    return matcher.is_error() or any(matcher.compute_bitmask()[:32])
