"""What tools give back: plain values, errors, other agents' answers, lists and objects."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from tools.nano.format import compact
from tools.nano.words import Pool, code, made_up, noun, person, phrase, place

_KEYS = ("status", "count", "temp", "sky", "price", "code", "id", "time", "seats", "name", "size", "open", "tags")
_HELD_KEYS = ("state", "wind", "total", "mark", "height", "owner", "parts")


def structured_result(rng: Random, words: Pool, *, held: bool) -> str:
    """A list, an object, a list of objects, an object with a list; now and then nothing."""
    kind = rng.random()
    if kind < 0.04:
        return "[]"
    if kind < 0.45:
        return compact(items(rng, words, rng.choice((1, 2, 2, 3, 3, 4))))
    if kind < 0.75:
        return compact(_object(rng, words, held, rng.choice((1, 2, 3, 3))))
    keys = _object(rng, words, held, 2)
    if kind < 0.9:
        return compact([{key: _plain(rng, words) for key in keys} for _ in range(rng.choice((1, 2, 2, 3)))])
    return compact({**keys, _key(rng, words, held): items(rng, words, rng.choice((1, 2, 3)))})


def items(rng: Random, words: Pool, count: int) -> list[Any]:
    """Values of one kind."""
    draw = rng.choice((person, place, phrase, code, _file, _number))
    return [draw(rng, words) for _ in range(count)]


def _number(rng: Random, words: Pool) -> int | float:
    return rng.randint(0, 999) if rng.random() < 0.8 else round(rng.uniform(0, 99), 1)


def _file(rng: Random, words: Pool) -> str:
    ending = rng.choice(("txt", "py", "md", "csv"))
    return f"{made_up(rng, words)}{rng.choice(('_', '-', '', ''))}{noun(rng, words)}.{ending}"


def _object(rng: Random, words: Pool, held: bool, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while len(found) < count:
        found[_key(rng, words, held)] = _plain(rng, words)
    return found


def _key(rng: Random, words: Pool, held: bool) -> str:
    if rng.random() < 0.4:
        return made_up(rng, words)
    return rng.choice(_HELD_KEYS if held else _KEYS)


def _plain(rng: Random, words: Pool) -> Any:
    kind = rng.random()
    if kind < 0.08:
        return rng.random() < 0.5
    return _number(rng, words) if kind < 0.4 else rng.choice((person, place, phrase, phrase, code))(rng, words)


def plain_result(rng: Random, words: Pool, name: str, values: dict[str, Any], *, held: bool) -> str:
    """A number, a few words, a flat object, an error; in training also what the runtime and other agents say."""
    kind = rng.random()
    unusual = 1.0 if held else rng.random()
    if unusual < 0.12:
        return f"error: {name}: {_complaint(rng, words)}"
    if unusual < 0.2:
        return _answer_of_an_agent(rng, words, list(values.values()))
    if unusual < 0.36:
        return _free_text(rng, words)
    if kind < 0.2:
        return str(rng.randint(0, 10 ** rng.randint(1, 4)))
    if kind < 0.4:
        keys = rng.sample(
            ("status", "count", "temp", "sky", "price", "code", "id", "time", "seats", "name"), rng.choice((1, 2, 2, 3))
        )
        return json.dumps(
            {key: rng.choice((rng.randint(0, 500), phrase(rng, words))) for key in keys},
            ensure_ascii=False,
            separators=(",", ":"),
        )
    if kind < 0.5:
        return "error: " + rng.choice(
            ("not found", "no result after 5 s", f"unknown {noun(rng, words)}", "out of stock")
        )
    if kind < 0.6:
        return rng.choice(("done", "ok", "saved", "booked", "sent", code(rng, words)))
    if kind < 0.8:
        return f"{rng.randint(-9, 40)} {noun(rng, words)}s and {phrase(rng, words)}"
    return " ".join(phrase(rng, words) for _ in range(rng.choice((1, 2, 3)))) + rng.choice(("", "", "."))


def _free_text(rng: Random, words: Pool) -> str:
    """Words and numbers with what people put between them."""
    text = phrase(rng, words)
    for _ in range(rng.randint(1, 5)):
        draw = rng.choice((phrase, noun, place, person, code, _written))
        text += rng.choice((" ", " ", ", ", ", ", ": ", " - ", "; ", " and ", "/", ". ")) + draw(rng, words)
    return text


def _written(rng: Random, words: Pool) -> str:
    number = _number(rng, words)
    return rng.choice(("{}", "{} degrees", "{} %", "{}:{}", "({})", "{} {}", "${}")).format(number, rng.randint(10, 59))


def _answer_of_an_agent(rng: Random, words: Pool, values: list[Any]) -> str:
    """What a tool gives back that is an agent itself: an answer inside the answer."""
    about = rng.choice(values) if values and rng.random() < 0.7 else place(rng, words)
    said = f"{rng.randint(0, 99)} {noun(rng, words)}s" if rng.random() < 0.5 else phrase(rng, words)
    return rng.choice((f"For {about}: {said}.", f"The {noun(rng, words)} of {about} is {said}."))


def _complaint(rng: Random, words: Pool) -> str:
    """What the runtime says of a tool that failed, in its own forms."""
    kind = rng.random()
    if kind < 0.55:
        error = rng.choice(("Value", "Lookup", "Key", "Type", "Runtime", "Connection", "Permission", "Timeout", "OS"))
        said = " ".join(
            f"{rng.choice(('no', 'bad', 'unknown', 'not'))} {phrase(rng, words)}" for _ in range(rng.randint(1, 2))
        )
        return f"{error}Error: {said}"
    if kind < 0.75:
        return f"no result after {rng.choice((0.05, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0))} s"
    return rng.choice(("not approved by the user", "not approved: the approver failed", "cancelled before it finished"))
