"""Requests that lean on what was said: the same for another value, the answer once more, a next step with it."""

from __future__ import annotations

from random import Random
from typing import Any

from tools.nano.chains import next_sum
from tools.nano.forms import filler
from tools.nano.requests import Call, ToolPool, called, value_for
from tools.nano.results import plain_result, structured_result
from tools.nano.spoken import TRAIN_TOOLS
from tools.nano.words import Pool

Message = dict[str, Any]

_OTHERS = (
    *("And {}?", "What about {}?", "and {}?", "And for {}?", "And {}, please?", "Now for {}", "Same for {}."),
    *(
        "The same for {}.",
        "What about {}",
        "And with {}?",
        "Also {}.",
        "Then {}?",
        "Do {} too.",
        "Also for {}, please.",
    ),
)
_HELD_OTHERS = ("How about {}?", "Once more with {}.", "Next {}, please.")
_AGAIN = (
    *("What was that again?", "Say that again.", "Again, please.", "Repeat that.", "What did you say?", "Pardon?"),
    *("Tell me again.", "Can you repeat that?", "Sorry, what?", "And again."),
)
_REPEATING = ("again", "repeat", "say", "say", "said", "answer", "once", "tell me", "twice", "repeat it", "say it")
_HELD_AGAIN = ("Could you say it once more?", "Please repeat what you said.")


def another(rng: Random, words: Pool, pool: ToolPool, call: Call, *, held: bool) -> tuple[str, Call] | None:
    """The same call with another first value; None where it has none."""
    tool = next(tool for tool in pool.tools if tool.name == call.name)
    key = next(iter(call.values), None)
    if key is None:
        return None
    values = {**call.values, key: value_for(rng, words, key, tool.properties[key])}
    if not held and rng.random() < 0.3:
        text = f"{' '.join(filler(rng) for _ in range(rng.randint(1, 2)))} {values[key]}"
        text = text[0].upper() + text[1:] + rng.choice(("?", ".", ""))
    else:
        text = rng.choice(_HELD_OTHERS if held else _OTHERS).format(values[key])
    return text, Call(call.name, values, call.form)


def round_of(rng: Random, words: Pool, text: str, calls: list[Call], *, held: bool, structured: float) -> list[Message]:
    """A request, its calls, their results, and the answer; `structured`: share of lists and objects."""
    results = [
        structured_result(rng, words, held=held)
        if rng.random() < structured
        else plain_result(rng, words, call.name, call.values, held=held)
        for call in calls
    ]
    return [{"role": "user", "content": text}, *called(calls, results)]


def again(rng: Random, said: str, *, held: bool) -> list[Message]:
    """The last answer once more, without a call."""
    text = rng.choice(_HELD_AGAIN if held else _AGAIN)
    if not held and rng.random() < 0.6:
        around = [filler(rng) for _ in range(rng.randint(1, 5))]
        around.insert(rng.randint(0, len(around)), rng.choice(_REPEATING))
        text = " ".join(around)
        text = text[0].upper() + text[1:] + rng.choice((".", "?", "?", "", ", please."))
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": said},
    ]


def sums_that_go_on(rng: Random, *, held: bool) -> tuple[list[dict[str, Any]], list[Message]]:
    """Tools, and a sum whose result is reckoned with further, or which is asked for with other numbers."""
    spoken = [tool for tool in TRAIN_TOOLS if tool.name in ("add", "multiply", "subtract")]
    offered = [tool.definition() for tool in spoken]
    rng.shuffle(offered)
    one, two = rng.randint(1, 99), rng.randint(1, 99)
    text = f"What is {one} plus {two}?"
    messages = [
        {"role": "user", "content": text},
        *called([Call("add", {"a": one, "b": two}, "{a} plus {b}")], [str(one + two)]),
    ]
    value = one + two
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.35:
            one, two = rng.randint(1, 99), rng.randint(1, 99)
            form = rng.choice(_HELD_OTHERS[:1] if held else ("And {}?", "What about {}?", "{}?", "And what is {}?"))
            text = form.format(f"{one} plus {two}")
            call, result = Call("add", {"a": one, "b": two}, "{a} plus {b}"), str(one + two)
        else:
            text, call, result = next_sum(rng, value, held=held)
        value = int(result)
        messages += [{"role": "user", "content": text}, *called([call], [result])]
    return offered, messages
