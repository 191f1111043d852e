"""Texts under a schema's grammar: whether one can be written, and one written at random."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from decimal import Decimal, localcontext
from functools import cache
from typing import Any

from jsonschema.validators import validator_for
from llguidance import LLMatcher, LLTokenizer

from agentspeed.tools.grammars import check_expressible, schema_source
from agentspeed.tools.schema import DEFAULT_BOUNDS, Bounds

BYTES = LLTokenizer("byte")


@cache
def _grammar(schema: str, bounds: Bounds) -> str:
    return schema_source(check_expressible(json.loads(schema), bounds))


def matcher(schema: Mapping[str, Any], bounds: Bounds = DEFAULT_BOUNDS) -> LLMatcher:
    made = LLMatcher(BYTES, _grammar(json.dumps(schema), bounds), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def takes(grammar: LLMatcher, text: str) -> bool:
    """Whether a text can be written, from a matcher at its start, which stays there."""
    reader, data = grammar.deep_copy(), list(text.encode())
    return reader.try_consume_tokens(data) == len(data) and bool(reader.is_accepting())


def accepts(schema: Mapping[str, Any], value: object, bounds: Bounds = DEFAULT_BOUNDS) -> bool:
    return takes(matcher(schema, bounds), json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def written(schema: Mapping[str, Any], seed: int, bounds: Bounds = DEFAULT_BOUNDS, most: int = 20_000) -> str:
    """A text of a schema, as `random_text` draws it."""
    return random_text(matcher(schema, bounds), random.Random(seed), most)


def random_text(reader: LLMatcher, draw: random.Random, most: int = 20_000) -> str:
    """What a writer makes of a grammar who takes any of the bytes allowed, and ends where that is the only way or, now
    and then, where it may. Fails where the text cannot be ended."""
    text = bytearray()
    while not reader.is_stopped():
        mask = reader.compute_bitmask()
        assert not reader.is_error(), reader.get_error()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> (byte % 8) & 1]
        if not allowed or (reader.is_accepting() and draw.random() < 0.3):
            break
        closing = [byte for byte in allowed if byte in b'"}],']
        byte = draw.choice(closing if closing and draw.random() < 0.4 else allowed)
        assert reader.consume_token(byte), reader.get_error()
        text.append(byte)
        assert len(text) < most, "the text does not end"
    assert reader.is_accepting(), f"stuck after {text.decode(errors='replace')!r}"
    return text.decode()


def is_instance(schema: Mapping[str, Any], text: str) -> bool:
    """The judge's verdict, over exact decimals: as many digits as a text has, or its exponents ask for."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    judge: Any = validator_for(exact)
    with localcontext() as context:
        context.prec = 2 * len(text) + 2000  # 1e308 by 1e-308 has 617 digits
        return bool(judge(exact).is_valid(json.loads(text, parse_float=Decimal)))
