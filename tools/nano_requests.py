"""Tools a model can be offered and the requests that call them, in many surface forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from nano_spoken import HELD_TOOLS, TRAIN_TOOLS, SpokenTool
from nano_words import Pool, code, made_up, noun, person, phrase, place


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
    """What a request asks for."""

    name: str
    values: dict[str, Any]


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
            made = random_tool(rng, words, held=held, avoid=used)
        if made.name not in {tool.name for tool in tools}:
            tools.append(made)
    rng.shuffle(tools)
    return ToolPool(tools)


def random_tool(rng: Random, words: Pool, *, held: bool, avoid: set[str]) -> NamedTool:
    """A tool about something that no noun in `avoid` names."""
    while True:
        if rng.random() < 0.3:
            spoken = rng.choice(HELD_TOOLS if held else TRAIN_TOOLS)
            made = NamedTool(spoken.definition(), "", spoken.noun, spoken)
        else:
            made = _worded_tool(rng, words, held, rng.choice(words.verbs), noun(rng, words))
        if made.noun not in avoid:
            return made


def _other_verb(rng: Random, words: Pool, verb: str) -> str:
    return rng.choice([other for other in words.verbs if other != verb])


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
            key = rng.choice(names) if rng.random() < 0.75 else made_up(rng, words)
            found[key] = {"type": "string"}
        elif kind < 0.75:
            found[rng.choice(_HELD_INTEGERS if held else _INTEGERS)] = {"type": "integer"}
        elif kind < 0.85:
            found[rng.choice(_HELD_NUMBERS if held else _NUMBERS)] = {"type": "number"}
        else:
            options = [
                rng.choice(words.things) if rng.random() < 0.7 else made_up(rng, words)
                for _ in range(rng.choice((2, 3)))
            ]
            found[rng.choice(_HELD_CHOICES if held else _CHOICES)] = {"enum": sorted(set(options)), "type": "string"}
    for key in found:
        if rng.random() < 0.1:
            found[key] = {
                "description": rng.choice((f"The {key}.", f"Name of the {key}", f"which {key}", f"{key} to use")),
                **found[key],
            }
    return found


# ---- requests -----------------------------------------------------------------------------------------------------
def request_for(rng: Random, words: Pool, tool: NamedTool, *, held: bool) -> tuple[str, Call]:
    """A sentence that asks for `tool`, and the call it asks for."""
    said, call = _asked(rng, words, tool, held)
    return _polite(rng, said, held, question=said.startswith(("What", "How", "When", "Is "))), call


def _asked(rng: Random, words: Pool, tool: NamedTool, held: bool) -> tuple[str, Call]:
    if tool.spoken is not None:
        values = {key: _value(rng, words, key, shape) for key, shape in tool.properties.items()}
        return rng.choice(tool.spoken.forms).format(**values), Call(tool.name, values)
    required = tool.definition["parameters"]["required"]
    values = {
        key: _value(rng, words, key, shape)
        for key, shape in tool.properties.items()
        if key in required or rng.random() < 0.5
    }
    return f"{_head(rng, tool, held)}{_arguments(rng, values, held)}", Call(tool.name, values)


def _head(rng: Random, tool: NamedTool, held: bool) -> str:
    if not tool.verb:
        forms = (
            ("do the {n}", "give me the {n}")
            if held
            else ("show me the {n}", "use {n}", "I need the {n}", "run {n}", "the {n}")
        )
    else:
        forms = (
            ("{v} my {n}", "{v} that {n}")
            if held
            else ("{v} a {n}", "{v} the {n}", "{v} {n}", "{v} one {n}", "{v} this {n}")
        )
    return rng.choice(forms).format(v=tool.verb, n=tool.noun)


def _value(rng: Random, words: Pool, key: str, shape: dict[str, Any]) -> Any:
    if "enum" in shape:
        return rng.choice(shape["enum"])
    if shape["type"] == "integer":
        return rng.randint(1, 10 ** rng.randint(1, 3))
    if shape["type"] == "number":
        return round(rng.uniform(0.5, 200), rng.choice((1, 2)))
    return (_STRINGS | _HELD_STRINGS).get(key, phrase)(rng, words)


def _arguments(rng: Random, values: dict[str, Any], held: bool) -> str:
    """ " with city Oslo and days 3", in one of many forms."""
    if not values:
        return ""
    items = list(values.items())
    if rng.random() < 0.4:
        rng.shuffle(items)
    if len(items) == 1 and not held and rng.random() < 0.45:
        return rng.choice((" for {}", " in {}", " {}", ": {}", " at {}", " of {}", " called {}", " from {}")).format(
            items[0][1]
        )
    forms = (
        ("having {k} {v}", "whose {k} should be {v}", "{k} being {v}")
        if held
        else (
            "with {k} {v}",
            "{k} {v}",
            "{k}: {v}",
            "where {k} is {v}",
            "with {v} as {k}",
            "{v} as the {k}",
            "{k}={v}",
            "using {k} {v}",
            "for {k} {v}",
            "set {k} to {v}",
            "{v} for the {k}",
            "the {k} is {v}",
            '{k} "{v}"',
        )
    )
    form = rng.choice(forms)
    joint = rng.choice((", ", " and ", ", and ") if not held else (" and ", ", "))
    parts = [(form if rng.random() < 0.8 else rng.choice(forms)).format(k=key, v=value) for key, value in items]
    return rng.choice((" ", " ", ", ")) + joint.join(parts)


def _polite(rng: Random, said: str, held: bool, question: bool) -> str:
    if question:
        return said + rng.choice(("?", "?", "")) if not held else said + "?"
    before = (
        ("I'd like you to ", "Kindly ", "")
        if held
        else (
            "",
            "",
            "Please ",
            "Can you ",
            "Could you ",
            "Could you please ",
            "I want you to ",
            "I need you to ",
            "Now ",
            "Hey, ",
            "Next, ",
            "Help me: ",
        )
    )
    after = (".", "", ", if you can.") if held else ("", ".", ".", "?", " please.", "!", " now.", ", thanks.")
    text = rng.choice(before) + said
    return f"{text[0].upper()}{text[1:]}{rng.choice(after)}"


def join_requests(
    rng: Random, words: Pool, pool: ToolPool, many: int, *, held: bool
) -> tuple[str, list[dict[str, Any]]]:
    """One request for several calls: of one tool with different values, or of different tools."""
    single = [
        tool for tool in pool.tools if tool.spoken is not None and tool.spoken.lists and len(tool.properties) == 1
    ]
    if single and rng.random() < 0.6:
        return _listed(rng, words, rng.choice(single), many, held)
    tools = [rng.choice(pool.tools) for _ in range(many)]
    asked = [_asked(rng, words, tool, held) for tool in tools]
    joint = rng.choice(
        (" and also ", ". Then ") if held else (" and ", ", then ", "; ", ". Also ", " and then ", ", and ", ". And ")
    )
    text = _polite(rng, joint.join(said[0].lower() + said[1:] for said, _ in asked), held, question=False)
    return text, [{"name": call.name, "arguments": call.values} for _, call in asked]


def _listed(rng: Random, words: Pool, tool: NamedTool, many: int, held: bool) -> tuple[str, list[dict[str, Any]]]:
    """ "the weather in Oslo, Lima and Rome": one call for each."""
    if tool.spoken is None:
        raise ValueError(f"{tool.name} has no spoken form.")
    ((key, shape),) = tool.properties.items()
    values = [_value(rng, words, key, shape) for _ in range(many)]
    listed = ", ".join(str(value) for value in values[:-1]) + f" and {values[-1]}"
    said = rng.choice(tool.spoken.forms).format(**{key: listed})
    text = _polite(rng, said, held, question=said.startswith(("What", "How", "When", "Is ")))
    return text, [{"name": tool.name, "arguments": {key: value}} for value in values]
