"""Tools a model can be offered and the requests that call them, in many surface forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tools.nano.answers import answer
from tools.nano.forms import (
    HELD_ARGUMENTS,
    HELD_CLOSINGS,
    HELD_HEADS,
    HELD_NAMELESS,
    HELD_OPENINGS,
    argument,
    closing,
    head,
    invented_operator,
    invented_tool,
    joint,
    opening,
)
from tools.nano.spoken import HELD_TOOLS, TRAIN_TOOLS, SpokenTool
from tools.nano.words import Pool, code, made_up, noun, person, phrase, place, verb


@dataclass(frozen=True)
class NamedTool:
    """A tool as it is offered, with what is needed to ask for it."""

    definition: dict[str, Any]
    verb: str
    noun: str
    spoken: SpokenTool | None = None

    @property
    def name(self) -> str:
        return str(self.definition["name"])

    @property
    def properties(self) -> dict[str, Any]:
        found: dict[str, Any] = self.definition["parameters"]["properties"]
        return found


@dataclass(frozen=True)
class ToolPool:
    """The tools of one conversation."""

    tools: list[NamedTool]


@dataclass(frozen=True)
class Call:
    """What a request asks for. `subject`: what the answer is about; `form`: the same with slots for the values."""

    name: str
    values: dict[str, Any]
    form: str

    @property
    def subject(self) -> str:
        return self.form.format(**self.values)

    @property
    def message(self) -> dict[str, Any]:
        """The call as it stands in a conversation."""
        return {"name": self.name, "arguments": self.values}


_STRINGS: dict[str, Callable[[Random, Pool], str]] = {
    "city": place,
    "place": place,
    "country": place,
    "person": person,
    "name": person,
    "guest": person,
    "owner": person,
    "title": phrase,
    "topic": phrase,
    "query": phrase,
    "subject": phrase,
    "color": phrase,
    "text": phrase,
    "code": code,
    "id": code,
    "reference": code,
}
_HELD_STRINGS: dict[str, Callable[[Random, Pool], str]] = {
    "town": place,
    "region": place,
    "client": person,
    "sender": person,
    "label": phrase,
    "theme": phrase,
    "key": code,
}
_INTEGERS = ("count", "days", "amount", "age", "hour", "year", "size", "level", "pages", "seats", "number", "minutes")
_HELD_INTEGERS = ("nights", "floor", "weeks", "points")
_NUMBERS = ("price", "weight", "rate", "length")
_HELD_NUMBERS = ("width", "cost")
_QUESTIONS = ("What", "How", "When", "Where", "Is ")
_CHOICES = ("unit", "mode", "kind", "style", "format", "class")
_HELD_CHOICES = ("type", "grade")


# ---- tools --------------------------------------------------------------------------------------------------------
def make_pool(rng: Random, words: Pool, *, held: bool, count: int) -> ToolPool:
    """Tools with different names; now and then two share a noun or a verb."""
    tools: list[NamedTool] = []
    while len(tools) < count:
        used = {tool.noun for tool in tools}
        near = rng.choice(tools) if tools and rng.random() < 0.15 else None
        if near is not None and near.spoken is None:
            made = _worded_tool(rng, words, held, _other_verb(rng, words, near.verb), near.noun)
        else:
            made = random_tool(rng, words, held=held, avoid=used, verbs=_verbs_of(rng, tools, held))
        if made.name not in {tool.name for tool in tools}:
            tools.append(made)
    rng.shuffle(tools)
    return ToolPool(tools)


def stranger_to(rng: Random, words: Pool, pool: ToolPool, *, held: bool) -> NamedTool:
    """A tool for something that none of the pool's is for, though it may be for the same verb."""
    avoid = {tool.noun for tool in pool.tools}
    return random_tool(rng, words, held=held, avoid=avoid, verbs=_verbs_of(rng, pool.tools, held))


def _verbs_of(rng: Random, tools: list[NamedTool], held: bool) -> list[str]:
    """Verbs to take again, so that a verb alone says little. The few held-out verbs meet again by themselves."""
    return [tool.verb for tool in tools if tool.verb] if not held and rng.random() < 0.35 else []


def random_tool(rng: Random, words: Pool, *, held: bool, avoid: set[str], verbs: list[str]) -> NamedTool:
    """A tool about something that no noun in `avoid` names; its verb is one of `verbs` when there are any."""
    while True:
        made = _one_tool(rng, words, held, rng.choice(verbs) if verbs else verb(rng, words))
        if made.noun not in avoid:
            return made


def _one_tool(rng: Random, words: Pool, held: bool, does: str) -> NamedTool:
    kind = rng.random()
    if kind < (0.3 if held else 0.15):
        spoken = rng.choice(HELD_TOOLS if held else TRAIN_TOOLS)
        return NamedTool(spoken.definition(), "", spoken.noun, spoken)
    if not held and kind > 0.95:
        spoken = invented_operator(rng, does)
        return NamedTool(spoken.definition(), "", does, spoken)
    what = noun(rng, words)
    if held or kind < 0.75:
        return _worded_tool(rng, words, held, does, what)
    parameters = [
        (_string_name(rng, words), "string") if rng.random() < 0.65 else (rng.choice(_INTEGERS), "integer")
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2)))
    ]
    spoken = invented_tool(rng, words, does, what, list(dict(parameters).items()))
    return NamedTool(spoken.definition(), does, what, spoken)


def _string_name(rng: Random, words: Pool) -> str:
    return rng.choice(list(_STRINGS)) if rng.random() < 0.5 else made_up(rng, words)


def _other_verb(rng: Random, words: Pool, than: str) -> str:
    while (other := verb(rng, words)) == than:
        pass
    return other


def _worded_tool(rng: Random, words: Pool, held: bool, verb: str, what: str) -> NamedTool:
    name = rng.choice((f"{verb}_{what}",) * 4 + (f"{what}_{verb}", what))
    verb = verb if verb in name else ""
    said = (
        f"{verb} {what}".strip()
        if held
        else rng.choice((f"{verb} a {what}", f"{verb} the {what}", f"{verb} {what}", what)).strip()
    )
    described = f"{said[0].upper()}{said[1:]}" + rng.choice((".", "", ".", " for the user.", " now."))
    properties = _properties(rng, words, held)
    required = list(properties)
    if len(required) > 1 and rng.random() < 0.2:
        last = required.pop()
        if properties[last]["type"] == "integer":
            properties[last] = {"default": rng.randint(0, 9), **properties[last]}
    shape: dict[str, Any] = {"properties": properties, "required": required, "type": "object"}
    if rng.random() < 0.05:
        shape = {"type": "object", "properties": properties, "required": required}
    return NamedTool({"name": name, "description": described, "parameters": shape}, verb, what)


def _properties(rng: Random, words: Pool, held: bool) -> dict[str, Any]:
    """None to three parameters of different names and types."""
    found: dict[str, Any] = {}
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3))):
        kind = rng.random()
        if kind < 0.5:
            names = list(_HELD_STRINGS if held else _STRINGS)
            key = rng.choice(names) if rng.random() < (0.75 if held else 0.5) else made_up(rng, words)
            found[key] = {"type": "string"}
        elif kind < 0.75:
            found[_number_name(rng, words, _HELD_INTEGERS if held else _INTEGERS, held)] = {"type": "integer"}
        elif kind < 0.85:
            found[_number_name(rng, words, _HELD_NUMBERS if held else _NUMBERS, held)] = {"type": "number"}
        else:
            options = [
                rng.choice(words.things) if rng.random() < 0.7 else made_up(rng, words)
                for _ in range(rng.choice((2, 3)))
            ]
            key = _number_name(rng, words, _HELD_CHOICES if held else _CHOICES, held)
            found[key] = {"enum": sorted(set(options)), "type": "string"}
    for key in found:
        if rng.random() < 0.1:
            found[key] = {
                "description": rng.choice((f"The {key}.", f"Name of the {key}", f"which {key}", f"{key} to use")),
                **found[key],
            }
    return found


def _number_name(rng: Random, words: Pool, names: tuple[str, ...], held: bool) -> str:
    """Training invents names too; the held-out names are new by themselves."""
    return rng.choice(names) if held or rng.random() < 0.6 else made_up(rng, words)


# ---- requests -----------------------------------------------------------------------------------------------------
def request_for(rng: Random, words: Pool, tool: NamedTool, *, held: bool) -> tuple[str, Call]:
    """A sentence that asks for `tool`, and the call it asks for."""
    said, call = _asked(rng, words, tool, held)
    return polite(rng, words, said, held), call


def _asked(rng: Random, words: Pool, tool: NamedTool, held: bool) -> tuple[str, Call]:
    if tool.spoken is not None:
        values = {key: value_for(rng, words, key, shape) for key, shape in tool.properties.items()}
        form = rng.choice(tool.spoken.forms)
        return form.format(**values), Call(tool.name, values, tool.spoken.subject(form))
    required = tool.definition["parameters"]["required"]
    values = {
        key: value_for(rng, words, key, shape)
        for key, shape in tool.properties.items()
        if key in required or rng.random() < 0.5
    }
    said, tail = _arguments(rng, values, held)
    return f"{_head(rng, tool, held)}{said}", Call(tool.name, values, f"the {tool.noun}{tail}")


def _head(rng: Random, tool: NamedTool, held: bool) -> str:
    if not held:
        return head(rng, tool.verb, tool.noun)
    return rng.choice(HELD_HEADS if tool.verb else HELD_NAMELESS).format(v=tool.verb, n=tool.noun)


def value_for(rng: Random, words: Pool, key: str, shape: dict[str, Any]) -> Any:
    """A value of a parameter."""
    if "enum" in shape:
        return rng.choice(shape["enum"])
    if shape["type"] == "integer":
        return rng.randint(1, 10 ** rng.randint(1, 3))
    if shape["type"] == "number":
        return round(rng.uniform(0.5, 200), rng.choice((1, 2)))
    named = (_STRINGS | _HELD_STRINGS).get(key)
    if named is None and words.wild:
        named = rng.choice((phrase, phrase, person, place, code))  # an invented name says nothing about its value
    return (named or phrase)(rng, words)


def _arguments(rng: Random, values: dict[str, Any], held: bool) -> tuple[str, str]:
    """ " with city Oslo and days 3", in one of many forms; and what an answer says of it: " for {city}"."""
    if not values:
        return "", ""
    items = list(values.items())
    if rng.random() < 0.4:
        rng.shuffle(items)
    if len(items) == 1 and not held and rng.random() < 0.35:
        link = rng.choice((" for", " in", "", ":", " at", " of", " called", " from"))
        return f"{link} {items[0][1]}", f"{link or ' for'} {{{items[0][0]}}}".replace(":", " for")
    form, other = (rng.choice(HELD_ARGUMENTS) if held else argument(rng) for _ in range(2))
    between = rng.choice((" and ", ", ")) if held else joint(rng, (", ", " and ", ", and "))
    parts = [(form if rng.random() < 0.8 else other).format(k=key, v=value) for key, value in items]
    return rng.choice((" ", " ", ", ")) + between.join(parts), f" for {{{next(iter(values))}}}"


def polite(rng: Random, words: Pool, said: str, held: bool) -> str:
    """A wish or a question as a sentence, with what people say around it."""
    if said.startswith(_QUESTIONS):
        return said + ("?" if held else rng.choice(("?", "?", "")))
    before = rng.choice(HELD_OPENINGS) if held else opening(rng, words)
    after = rng.choice(HELD_CLOSINGS) if held else closing(rng)
    text = before + said
    return f"{text[0].upper()}{text[1:]}{after}"


def join_requests(rng: Random, words: Pool, pool: ToolPool, many: int, *, held: bool) -> tuple[str, list[Call]]:
    """One request for several calls: of one tool with different values, or of different tools."""
    single = [
        tool for tool in pool.tools if tool.spoken is not None and tool.spoken.lists and len(tool.properties) == 1
    ]
    if single and rng.random() < 0.6:
        return _listed(rng, words, rng.choice(single), many, held)
    tools = [rng.choice(pool.tools) for _ in range(many)]
    asked = [_asked(rng, words, tool, held) for tool in tools]
    plain = (" and ", ", then ", "; ", ". Also ", " and then ", ", and ", ". And ")
    between = rng.choice((" and also ", ". Then ")) if held else joint(rng, plain)
    text = polite(rng, words, between.join(said[0].lower() + said[1:] for said, _ in asked), held)
    return text, [call for _, call in asked]


def _listed(rng: Random, words: Pool, tool: NamedTool, many: int, held: bool) -> tuple[str, list[Call]]:
    """ "the weather in Oslo, Lima and Rome": one call for each."""
    if tool.spoken is None:
        raise ValueError(f"{tool.name} has no spoken form.")
    ((key, shape),) = tool.properties.items()
    values = [value_for(rng, words, key, shape) for _ in range(many)]
    listed = ", ".join(str(value) for value in values[:-1]) + f" and {values[-1]}"
    form = rng.choice(tool.spoken.forms)
    text = polite(rng, words, form.format(**{key: listed}), held)
    return text, [Call(tool.name, {key: value}, tool.spoken.subject(form)) for value in values]


def called(calls: list[Call], results: list[str]) -> list[dict[str, Any]]:
    """Calls, their results, and the answer that follows."""
    return [
        {"role": "assistant", "content": "", "tool_calls": [call.message for call in calls]},
        *({"role": "tool", "content": result} for result in results),
        {"role": "assistant", "content": answer([call.subject for call in calls], results)},
    ]
