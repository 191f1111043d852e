"""Requests that take several calls, each of which needs a result of the one before; and how nano goes about them."""

from __future__ import annotations

# ruff: noqa: SIM905 (lists of words read best as text)
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tools.nano.answers import sentence
from tools.nano.format import compact
from tools.nano.forms import filler
from tools.nano.requests import Call, NamedTool, called, value_for
from tools.nano.results import items, plain_result
from tools.nano.spoken import HELD_TOOLS, TRAIN_TOOLS, SpokenTool
from tools.nano.words import Pool, code, made_up, noun, phrase, verb

Message = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """Tools, a request, and the messages that follow it up to the answer."""

    tools: list[dict[str, Any]]
    messages: list[Message]


@dataclass(frozen=True)
class _Link:
    """A tool of one parameter, and where its noun stands: "the {noun} {link} VALUE"."""

    tool: NamedTool
    key: str
    link: str

    def asked(self, value: object) -> str:
        return f"the {self.tool.noun} {self.link} {value}"

    def call(self, value: Any) -> Call:
        return Call(self.tool.name, {self.key: value}, f"the {self.tool.noun} {self.link} {{{self.key}}}")


_KEYS = tuple("city country place person name owner title topic color code id reference".split())
_HELD_KEYS = tuple("town region client sender label theme key".split())
_TEXT = {"type": "string"}
_LINKS = ("of", "of", "for", "in", "at", "from", "by", "with", "on")
_VERBS = ("get", "get", "find", "find", "look up", "fetch", "check", "tell me", "read", "give me", "search")
_ACTS = ("send", "book", "email", "call", "order", "pay", "close", "cancel", "move", "open", "mark", "tell", "rent")


def chain(rng: Random, words: Pool, *, held: bool) -> Chain:
    """Two calls or three."""
    kind = rng.random()
    if kind < 0.22:
        return _sums(rng, held)
    if kind < 0.36:
        return _for_each(rng, words, held)
    if kind < 0.5:
        return _acted_on(rng, words, held)
    return _looked_up(rng, words, held)


# ---- the owner of the order of Anna ---------------------------------------------------------------------------------
def _looked_up(rng: Random, words: Pool, held: bool) -> Chain:
    links = _links(rng, words, held, rng.choice((2, 2, 2, 3)))
    start = value_for(rng, words, links[0].key, _TEXT)
    nested = _nested(links, start)
    if len(links) == 2 and rng.random() < 0.5:
        text = _steps(rng, links, start, held)
    elif held:
        text = rng.choice(("I'd like to know {}.", "Kindly give {} to me.", "{} is what?")).format(nested)
    else:
        text = _said(rng, nested)
    results = [_passed_on(rng, words, link) for link in links[1:]]
    return _played(rng, words, links, start, results, text, held)


def _links(rng: Random, words: Pool, held: bool, count: int) -> list[_Link]:
    found: list[_Link] = []
    while len(found) < count:
        what = noun(rng, words)
        if what in {link.tool.noun for link in found}:
            continue
        key = rng.choice(_HELD_KEYS if held else _KEYS) if rng.random() < 0.6 else made_up(rng, words)
        found.append(_Link(_tool(rng, words, what, {key: _TEXT}), key, rng.choice(_LINKS)))
    return found


def _tool(rng: Random, words: Pool, what: str, properties: dict[str, Any], does: str = "") -> NamedTool:
    does = does or rng.choice(("get", "get", "find", "fetch", "look_up", verb(rng, words)))
    name = rng.choice((f"{does}_{what}",) * 5 + (what,))
    keys = list(properties)
    described = rng.choice(
        (f"Get the {what}.", f"The {what} of a {keys[0] if keys else 'user'}.", f"{does} {what}", f"Find a {what}.")
    )
    shape = {"properties": properties, "required": keys, "type": "object"}
    return NamedTool({"name": name, "description": described, "parameters": shape}, does, what)


def _nested(links: list[_Link], start: str) -> str:
    said = start
    for link in links:
        said = link.asked(said)
    return said


def _said(rng: Random, what: str) -> str:
    kind = rng.random()
    if kind < 0.4:
        return f"What is {what}?"
    if kind < 0.75:
        text = f"{rng.choice(_VERBS)} {what}"
    else:
        text = f"{' '.join(filler(rng) for _ in range(rng.randint(1, 3)))} {what}"
    return text[0].upper() + text[1:] + rng.choice((".", "", "?", ", please.", "!"))


def _steps(rng: Random, links: list[_Link], start: str, held: bool) -> str:
    """Each call a wish of its own, the second of what the first one found."""
    first, second = links[0].asked(start), links[1].asked("{}")
    if held:
        return rng.choice(("First get {}. With that, get {}.", "Get {} and after that {}.")).format(
            first, second.format(rng.choice(("this", "the outcome")))
        )
    it = rng.choice(("it", "that", "the result", "the answer", "what you get", f"that {links[0].tool.noun}"))
    one, two = rng.choice(_VERBS), rng.choice(_VERBS)
    joined = rng.choice((", then {} ", " and then {} ", ". Then {} ", " and {} ", "; next {} ", ". With it, {} "))
    text = f"{one} {first}{joined.format(two)}{second.format(it)}"
    return text[0].upper() + text[1:] + rng.choice((".", "", ", please."))


def _passed_on(rng: Random, words: Pool, to: _Link) -> tuple[str, str]:
    """A result as a text, and the value in it that the next call takes: all of it, or that of the object's own key."""
    value = value_for(rng, words, to.key, _TEXT)
    if rng.random() < 0.7:
        return value, value
    others = {made_up(rng, words): rng.choice((phrase(rng, words), rng.randint(0, 99))) for _ in range(2)}
    pairs = [*others.items(), (to.key, value)]
    rng.shuffle(pairs)
    return compact(dict(pairs)), value


def _played(
    rng: Random,
    words: Pool,
    links: list[_Link],
    start: str,
    results: list[tuple[str, str]],
    text: str,
    held: bool,
) -> Chain:
    messages: list[Message] = [{"role": "user", "content": text}]
    value = start
    for link, (result, passed) in zip(links, [*results, ("", "")], strict=True):
        call = link.call(value)
        last = link is links[-1]
        if last or (not held and rng.random() < 0.06):
            result = plain_result(rng, words, call.name, call.values, held=held)
            if not last:
                result = f"error: {rng.choice(('not found', 'no such value', phrase(rng, words)))}"
            return Chain(_offered(rng, words, links), [*messages, *called([call], [result])])
        messages += called([call], [result])[:-1]
        value = passed
    raise ValueError("a chain has a last link.")


def _offered(rng: Random, words: Pool, links: list[_Link]) -> list[dict[str, Any]]:
    """The tools of a chain, and perhaps one that it does not need."""
    tools = {link.tool.name: link.tool.definition for link in links}
    if rng.random() < 0.4:
        other = _tool(rng, words, noun(rng, words), {made_up(rng, words): _TEXT})
        tools.setdefault(other.name, other.definition)
    shuffled = list(tools.values())
    rng.shuffle(shuffled)
    return shuffled


# ---- find the owner and send it to them -----------------------------------------------------------------------------
def _acted_on(rng: Random, words: Pool, held: bool) -> Chain:
    """The second tool does something with what the first one found, and with a value of the request."""
    link = _links(rng, words, held, 1)[0]
    target, extra = rng.sample(_HELD_KEYS if held else _KEYS, 2)
    what = noun(rng, words)
    while what == link.tool.noun:
        what = noun(rng, words)
    does = rng.choice(_ACTS) if not held else verb(rng, words)
    keys = [target, extra] if rng.random() < 0.8 else [extra, target]
    acts = _tool(rng, words, what, dict.fromkeys(keys, _TEXT), does)
    start = value_for(rng, words, link.key, _TEXT)
    given = value_for(rng, words, extra, _TEXT)
    found = link.asked(start)
    if held:
        text = f"Get {found}, and {does} the {what} for it whose {extra} should be {given}."
    else:
        it = rng.choice(("it", "that", "them", "the result", f"that {link.tool.noun}"))
        form = rng.choice(("with {} {}", "{} {}", "using {} {}", "with {} being {}", "where {} is {}"))
        how = form.format(extra, given)
        joined = rng.choice((" and {}", ", then {}", ". Then {}", " and then {}", "; {}")).format(does)
        at = rng.choice(("to", "for", "with"))
        text = f"{rng.choice(_VERBS)} {found}{joined} {rng.choice(('the', 'a'))} {what} {at} {it} {how}"
        text = text[0].upper() + text[1:] + rng.choice((".", "", "!"))
    result, passed = _passed_on(rng, words, _Link(acts, target, ""))
    values = {key: passed if key == target else given for key in keys}
    second = Call(acts.name, values, f"the {what} for {{{keys[0]}}}")
    messages: list[Message] = [{"role": "user", "content": text}, *called([link.call(start)], [result])[:-1]]
    outcome = rng.choice(("done", "sent", "ok", "booked", code(rng, words), str(rng.randint(1, 99))))
    return Chain(_offered(rng, words, [link, _Link(acts, target, "")]), [*messages, *called([second], [outcome])])


# ---- the weather in each of them ------------------------------------------------------------------------------------
def _for_each(rng: Random, words: Pool, held: bool) -> Chain:
    """A list, then a call for each of its items, or for the first or last one."""
    listing, each = _links(rng, words, held, 2)
    alone = rng.random() < 0.4
    group = noun(rng, words)
    lists = (
        _Link(_tool(rng, words, f"{group}s", {}, rng.choice(("list", "list", "get", "find"))), "", "")
        if alone
        else listing
    )
    start = value_for(rng, words, listing.key, _TEXT)
    many = f"the {group}s" if alone else f"the {lists.tool.noun} {lists.link} {start}"
    found = items(rng, words, rng.choice((1, 2, 2, 3)))
    found = [str(value) for value in found]
    which = rng.choice(("each", "each", "first", "last"))
    wanted = {"each": found, "first": found[:1], "last": found[-1:]}[which]
    it = {
        "each": rng.choice(("each", "each of them", "every one", "all of them")),
        "first": rng.choice(("the first", "the first one", "the first of them")),
        "last": rng.choice(("the last", "the last one", "the last of them")),
    }[which]
    if held:
        text = f"First get {many}. With those, get {each.asked(it)}."
    else:
        joined = rng.choice((" and ", ", then ", ". Then ", " and then ")) + rng.choice(_VERBS)
        text = f"{rng.choice((*_VERBS, 'list', 'list', 'show'))} {many}{joined} {each.asked(it)}"
        text = text[0].upper() + text[1:] + rng.choice((".", "", ", please."))
    first = Call(lists.tool.name, {}, many) if alone else lists.call(start)
    messages: list[Message] = [
        {"role": "user", "content": text},
        *called([first], [compact(found)])[:-1],
        *called(
            [each.call(value) for value in wanted],
            [plain_result(rng, words, each.tool.name, {each.key: value}, held=held) for value in wanted],
        ),
    ]
    return Chain(_offered(rng, words, [lists, each]), messages)


# ---- sums -----------------------------------------------------------------------------------------------------------
_SIGNS: dict[str, tuple[Callable[[int, int], int], str, str, tuple[str, ...]]] = {
    "add": (lambda a, b: a + b, "plus", "+", ("add {b} to {it}", "plus {b}", "add {b} more")),
    "multiply": (lambda a, b: a * b, "times", "*", ("multiply {it} by {b}", "times {b}", "multiply by {b}")),
    "subtract": (lambda a, b: a - b, "minus", "-", ("subtract {b} from {it}", "minus {b}", "take {b} away from {it}")),
}


def _sums(rng: Random, held: bool) -> Chain:
    """Two or three steps of arithmetic, each with the result of the one before as its first number."""
    names = [rng.choice(list(_SIGNS)) for _ in range(rng.choice((2, 2, 2, 3)))]
    numbers = [rng.randint(1, rng.choice((9, 30, 99))) for _ in range(len(names) + 1)]
    spoken: list[SpokenTool] = [tool for tool in TRAIN_TOOLS if tool.name in names]
    if rng.random() < 0.4:
        spoken.append(rng.choice(HELD_TOOLS if held else TRAIN_TOOLS))
    tools = {tool.name: tool.definition() for tool in spoken}
    messages: list[Message] = [{"role": "user", "content": sum_request(rng, names, numbers, held=held)}]
    value = numbers[0]
    for name, number in zip(names, numbers[1:], strict=True):
        call = Call(name, {"a": value, "b": number}, "the result")
        value = _SIGNS[name][0](value, number)
        messages += called([call], [str(value)])[:-1]
    definitions = list(tools.values())
    rng.shuffle(definitions)
    return Chain(definitions, [*messages, {"role": "assistant", "content": sentence("the result", str(value))}])


def sum_request(rng: Random, names: list[str], numbers: list[int], *, held: bool) -> str:
    """ "What is 3 plus 4, times 5?" or "Add 3 and 4, then multiply the result by 5." """
    words = [_SIGNS[name][1] for name in names]
    if held:
        rest = "".join(f" and that {word} {number}" for word, number in zip(words[1:], numbers[2:], strict=True))
        return rng.choice(("Work out {} {} {}{}.", "Tell me {} {} {}{}.")).format(
            numbers[0], words[0], numbers[1], rest
        )
    kind = rng.random()
    if kind < 0.35:
        text = f"{numbers[0]} {words[0]} {numbers[1]}"
        for word, number in zip(words[1:], numbers[2:], strict=True):
            text = rng.choice(("{}, {} {}", "{}, then {} {}", "({}) {} {}")).format(text, word, number)
        return rng.choice(("What is {}?", "What is {}?", "{}?", "How much is {}?", "Compute {}.")).format(text)
    if kind < 0.5:
        text = f"{numbers[0]} {_SIGNS[names[0]][2]} {numbers[1]}"
        for name, number in zip(names[1:], numbers[2:], strict=True):
            text = f"({text}) {_SIGNS[name][2]} {number}"
        return rng.choice(("What is {}?", "{}", "Compute {}.", "What is {} ?")).format(text)
    starts = {
        "add": ("Add {a} and {b}", "Add {b} to {a}", "Sum {a} and {b}", "Take {a} plus {b}"),
        "multiply": ("Multiply {a} by {b}", "Multiply {a} and {b}", "Take {a} times {b}"),
        "subtract": ("Subtract {b} from {a}", "Take {a} minus {b}"),
    }
    text = rng.choice(starts[names[0]]).format(a=numbers[0], b=numbers[1])
    for name, number in zip(names[1:], numbers[2:], strict=True):
        it = rng.choice(("it", "that", "the result", "the sum"))
        step = rng.choice(_SIGNS[name][3]).format(it=it, b=number)
        text += rng.choice((", then ", " and ", ". Then ", " and then ", ", and ")) + step
    return text + rng.choice((".", "", ", please."))


def next_sum(rng: Random, value: int, *, held: bool) -> tuple[str, Call, str]:
    """A further step from a value that was just told: the request, the call, its result."""
    name, number = rng.choice(list(_SIGNS)), rng.randint(1, 30)
    compute, word, _, forms = _SIGNS[name]
    if held:
        text = rng.choice((f"Take that {word} {number}.", f"What does that {word} {number} make?"))
    else:
        it = rng.choice(("it", "that", "the result", "this"))
        said = rng.choice((*(form.format(it=it, b=number) for form in forms), f"what is that {word} {number}"))
        text = rng.choice(("Now {}.", "{}.", "And {}.", "{}, please.", "Then {}", "{}?")).format(said)
        text = text[0].upper() + text[1:]
    call = Call(name, {"a": value, "b": number}, "the result")
    return text, call, str(compute(value, number))
