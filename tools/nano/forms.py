"""How training requests are worded: random words around what matters, so that no sentence is learnt by heart.

Held-out requests have forms of their own, which training never has; the words in them it has in other places, as a
reader of English would.
"""

from __future__ import annotations

# ruff: noqa: SIM905 (lists of words read best as text)
from collections.abc import Callable
from functools import partial
from random import Random

from tools.nano.puzzles import HELD_ASKING
from tools.nano.spoken import SpokenTool
from tools.nano.words import FILLERS, Pool, made_up

HELD_OPENINGS = ("I'd like you to ", "Kindly ", "")
HELD_CLOSINGS = (".", "", ", if you can.")
HELD_ARGUMENTS = ("having {k} {v}", "whose {k} should be {v}", "{k} being {v}")
HELD_HEADS = ("{v} my {n}", "{v} that {n}")
HELD_NAMELESS = ("do the {n}", "give me the {n}")
OPENINGS = (
    *("Please ", "Can you ", "Could you ", "Could you please ", "I want you to ", "I need you to ", "Now ", "Hey, "),
    *("Next, ", "Help me: ", "Would you ", "I want to ", "We need to ", "It is time to ", "Let us ", "Go and "),
    *("Then ", "First ", "I'd love to ", "I'd rather you ", "You should ", "Be so kind to "),
)
_CLOSINGS = (".", ".", "", "", "?", "!", ", thanks.", ", please.", ". Thanks!", ", will you?")
ARGUMENTS = (
    *("with {k} {v}", "{k} {v}", "{k}: {v}", "where {k} is {v}", "with {v} as {k}", "{v} as the {k}", "{k}={v}"),
    *("using {k} {v}", "for {k} {v}", "set {k} to {v}", "{v} for the {k}", "the {k} is {v}", '{k} "{v}"'),
    *("its {k} is {v}", "whose {k} is {v}", "having {v} as {k}", "the {k} being {v}", "{k} should be {v}"),
    *(
        "{k} - {v}",
        "{k} : {v}",
        "{k} -> {v}",
        "({k} {v})",
        "{k} == {v}",
        "{k} => {v}",
        "{k} ~ {v}",
        "{k} / {v}",
        "{k} | {v}",
    ),
)
HEADS = (
    *("{v} a {n}", "{v} the {n}", "{v} {n}", "{v} one {n}", "{v} this {n}", "{v} our {n}", "{v} some {n}"),
    *("{v} another {n}", "{v} my own {n}", "{v} me that one {n}"),
)
_NAMELESS = (
    *("show me the {n}", "use {n}", "I need the {n}", "run {n}", "the {n}", "let me have the {n}", "go for the {n}"),
    *("do {n}", "give {n} to me"),
)
_PUZZLES = (
    *("Reach {t} from {spaced}.", "Make {t} with {listed}.", "Reach {t} from {spaced} using + - *."),
    *("Use {listed} to get {t}.", "Numbers: {spaced}. Target: {t}."),
)
_REACH = (
    *(
        "reach",
        "make",
        "hit",
        "obtain",
        "build",
        "get",
        "find",
        "come to",
        "arrive at",
        "the target is",
        "target",
        "goal:",
    ),
    *(
        "we want",
        "aim for",
        "produce",
        "the goal is",
        "I need",
        "give me",
        "now make",
        "try to reach",
        "go for",
        "solve",
    ),
)
_FROM = (
    *("from", "with", "using", "by", "out of", "numbers:", "use", "take", "given", "your numbers:", "there are", "of"),
    *("here are", "you have", "with the numbers", "from the numbers", "I have", "these numbers:", "combine", "digits"),
)
_USUAL_VERBS = "get get get list list find search fetch check read create make set open count tell".split()
"""What tools are called by most often, whatever verb the request has."""
_PREPOSITIONS = "in at for of from to on with by about near under via".split()


def filler(rng: Random) -> str:
    """A word that says nothing about which tool or value is meant; an English one, so that it is no value either."""
    return rng.choice(FILLERS)


def _fillers(rng: Random, least: int, most: int) -> str:
    return " ".join(filler(rng) for _ in range(rng.randint(least, most)))


def _unlike(rng: Random, make: Callable[[Random], str], held: tuple[str, ...]) -> str:
    """A form that the held-out set does not have."""
    while (form := make(rng)) in held:
        pass
    return form


def opening(rng: Random, words: Pool) -> str:
    """What stands before the request, with its space."""
    kind = rng.random()
    if kind < 0.3:
        return ""
    if kind < 0.6:
        return rng.choice(OPENINGS)
    return _unlike(rng, lambda rng: _said_first(rng, words), HELD_OPENINGS)


def _said_first(rng: Random, words: Pool) -> str:
    said = " ".join(made_up(rng, words) if rng.random() < 0.3 else filler(rng) for _ in range(rng.randint(1, 4)))
    return said[0].upper() + said[1:] + rng.choice((" ", " ", ", ", ": "))


def closing(rng: Random) -> str:
    """What stands behind the request."""
    if rng.random() < 0.7:
        return rng.choice(_CLOSINGS)
    return _unlike(rng, lambda rng: f", {_fillers(rng, 1, 4)}{rng.choice('.?!')}", HELD_CLOSINGS)


def head(rng: Random, verb: str, noun: str) -> str:
    """What is wanted; `verb` may be empty."""
    form = _unlike(rng, partial(_head, named=bool(verb)), HELD_HEADS if verb else HELD_NAMELESS)
    return form.format(v=verb, n=noun)


def _head(rng: Random, named: bool) -> str:
    if rng.random() < 0.6:
        return rng.choice(HEADS if named else _NAMELESS)
    between = _fillers(rng, 0 if named else 1, 3)
    return " ".join(part for part in ("{v}" if named else "", between, "{n}") if part)


def argument(rng: Random) -> str:
    """A form with slots {k} and {v}."""
    return _unlike(rng, _argument, HELD_ARGUMENTS)


def _argument(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(ARGUMENTS)
    if kind < 0.42:
        return f"{{v}} {_fillers(rng, 1, 2)} {{k}}"
    before, between = _fillers(rng, 0, 2), _fillers(rng, 0, 2)
    return " ".join(part for part in (before, "{k}", between, "{v}") if part)


def puzzle_form(rng: Random) -> str:
    """A form with a slot {t} for the target and one for the numbers: {spaced}, {listed} or {joined}."""
    return rng.choice(_PUZZLES) if rng.random() < 0.3 else _unlike(rng, _puzzle_form, HELD_ASKING)


def _puzzle_form(rng: Random) -> str:
    """Whatever the words and their order: the number that stands alone is the target."""
    numbers = rng.choice(("{spaced}", "{spaced}", "{listed}", "{joined}"))
    wanted = f"{rng.choice(_REACH)} {{t}}" if rng.random() < 0.6 else f"{_fillers(rng, 1, 2)} {{t}}"
    given = f"{rng.choice(_FROM)} {numbers}" if rng.random() < 0.6 else f"{_fillers(rng, 0, 3)} {numbers}".lstrip()
    parts = [wanted, given]
    if rng.random() < 0.5:
        parts.reverse()
    text = rng.choice((" ", " ", ", ", ". ", ": ", "; ")).join(parts) + rng.choice(
        (".", ".", "", "!", "?", ", please.")
    )
    return text[0].upper() + text[1:]


def joint(rng: Random, plain: tuple[str, ...]) -> str:
    """What stands between two wishes or two arguments."""
    if rng.random() < 0.75:
        return rng.choice(plain)
    return rng.choice((", {} ", " and {} ", ", and {} ", "; {} ", ". {} ")).format(filler(rng))


def invented_operator(rng: Random, verb: str) -> SpokenTool:
    """A tool of two numbers or words, called with them in the order in which they stand."""
    one, two = rng.choice((("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("one", "two")))
    kind = rng.choice(("integer", "integer", "number", "string"))
    link = rng.choice(("by", "with", "and", "over", "to", "on", "into"))
    forms = (
        f"{verb} {{{one}}} {link} {{{two}}}",
        f"What is {{{one}}} {verb}ed {link} {{{two}}}",
        f"What is {{{one}}} {verb} {{{two}}}",
        f"{verb} {{{one}}} and {{{two}}}",
        f"How much is {{{one}}} {verb} {{{two}}}",
    )
    said = f"{verb[0].upper()}{verb[1:]} two {rng.choice(('numbers', 'values', 'things'))}."
    return SpokenTool(verb, verb, said, {one: {"type": kind}, two: {"type": kind}}, forms, about="the result")


def invented_tool(rng: Random, words: Pool, verb: str, noun: str, parameters: list[tuple[str, str]]) -> SpokenTool:
    """A tool of up to two parameters, given as (name, type), asked for by sentences that do not name them."""
    slots = [(f"{rng.choice(_PREPOSITIONS)} " if rng.random() < 0.85 else "") + f"{{{key}}}" for key, _ in parameters]
    tail = f" {' '.join(slots)}" if slots else ""
    if rng.random() < 0.5:
        verb = rng.choice(_USUAL_VERBS)
    starts = [f"What is the {noun}", f"How is the {noun}", f"tell me the {noun}", f"{verb} the {noun}"]
    starts += [f"{verb} a {noun}", f"I want a {noun}", f"{verb} {noun}", f"Is there a {noun}", f"{verb} me the {noun}"]
    if len(parameters) == 1:
        starts += [f"Where is the {noun}", f"How many {noun}s are there"]
    if not parameters:
        starts += [f"{verb} all {noun}s", f"What {noun}s are there", f"show every {noun}", f"which {noun}s are there"]
    key = parameters[0][0] if parameters else rng.choice(words.things)
    preposition = rng.choice(_PREPOSITIONS)
    said = rng.choice(
        (
            *(f"{verb} the {noun}", f"{verb} a {noun}", f"{noun} {preposition} a {key}", f"{noun} now"),
            f"{verb} the {noun} {preposition} a {key}",
        )
    )
    thing = f"{noun}s" if not parameters and rng.random() < 0.5 else noun
    name = rng.choice((f"{verb}_{thing}",) * 3 + (thing,))
    properties = {key: {"type": kind} for key, kind in parameters}
    return SpokenTool(
        name,
        noun,
        f"{said[0].upper()}{said[1:]}.",
        properties,
        tuple(one + tail for one in starts),
        lists=len(parameters) == 1,
        about=f"the {noun}{tail}",
    )
