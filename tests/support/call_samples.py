"""Tool calls by chance: as a family writes them, and as its grammar lets ids be drawn."""

from __future__ import annotations

import json
import random

from llguidance import LLMatcher, LLTokenizer

from agentspeed import ToolCall
from agentspeed.chat.rehearsal import TOOLS, Log

SMALL = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 6},
        "count": {"type": "integer"},
        "kind": {"enum": ["a b", "5"]},
    },
    "required": ["word"],
}
"""Parameters that random draws can fill within a few hundred ids."""


def calls_of(log: Log, count: int, chance: random.Random) -> tuple[ToolCall, ...]:
    """Calls whose arguments fit the tools' schemas."""
    style = (", ", ": ") if log.codec.tags.calls.spaced else (",", ":")
    values: dict[str, list[object]] = {
        "word": ["a", "5", "", "two\nlines", 'quo"ted \\ back', "é 😀", " spaced ", "null", "{}", "<b>"],
        "count": [0, -12],
        "items": [["x", "y\nz", '"']],
        "flag": [True, False],
    }
    calls = []
    for number in range(count):
        keys = [key for key in values if chance.random() < 0.6]
        arguments = {key: chance.choice(values[key]) for key in keys}
        text = json.dumps(arguments, ensure_ascii=False, separators=style)
        calls.append(ToolCall(id=f"c{number}", name=chance.choice(TOOLS)["name"], arguments=text))
    return tuple(calls)


def walked(matcher: LLMatcher, tokenizer: LLTokenizer, chance: random.Random, never: int | None) -> list[int]:
    """Ids drawn at random under a grammar, to its first end; `never` is not drawn."""
    import llguidance.numpy

    mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)
    ids: list[int] = []
    while not matcher.is_stopped() and len(ids) < 400:
        llguidance.numpy.fill_next_token_bitmask(matcher, mask)
        allowed = [n for n in range(tokenizer.vocab_size) if mask[0, n // 32] >> (n % 32) & 1]
        eos = tokenizer.eos_token
        if matcher.is_accepting() and eos in allowed:
            break
        drawn = chance.choice([n for n in allowed if n not in (eos, never)] or allowed)
        assert matcher.consume_token(drawn)
        ids.append(drawn)
    return ids
