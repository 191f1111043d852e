"""JSON schemas as rules of a grammar, and the grammar library's verdict on a whole grammar."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final

from agentspeed.errors import ExtraMissing, SchemaUnsupported
from agentspeed.tools.schema import DEFAULT_BOUNDS, Bounds, Compiled, Json, compile_schema

HEAD: Final = "%llguidance {}"
"""The first line of every grammar in the library's own language."""
_TOKEN: Final = re.compile(r"<\[([0-9]+)\]>")


@lru_cache(maxsize=256)
def check_grammar(source: str) -> None:
    """Raises `SchemaUnsupported` with the grammar library's own reason when it cannot express the source."""
    try:
        from llguidance import LLMatcher, LLTokenizer
    except ImportError as error:
        raise ExtraMissing("Tools and output= need llguidance.", remedy="Install agentspeed[engine].") from error
    is_error, messages = LLMatcher.validate_grammar_with_warnings(source)
    if not is_error:  # some limits are met only where it is about to run
        matcher = LLMatcher(_bytes(LLTokenizer), _TOKEN.sub(_as_byte, source), log_level=0)
        is_error, messages = matcher.is_error(), [matcher.get_error()]
    if is_error:
        raise SchemaUnsupported(
            f"This cannot be expressed as a grammar: {_reason(messages)}.", remedy="Correct the schema or regex."
        )


def _as_byte(token: re.Match[str]) -> str:
    """A token of some vocabulary as one that the vocabulary of bytes has: what counts is that a token stands there."""
    return f"<[{int(token[1]) % 256}]>"


@cache
def _bytes(tokenizer: Callable[[str], Any]) -> Any:
    return tokenizer("byte")


def check_expressible(
    schema: Mapping[str, Json], bounds: Bounds = DEFAULT_BOUNDS, *, lenient: bool = False, sets: bool = False
) -> Compiled:
    """The schema's rules. Raises `SchemaUnsupported` for what no turn could be constrained to: known when a tool is
    made, not when a model is about to use it."""
    compiled = compile_schema(schema, bounds, lenient=lenient, sets=sets)
    check_grammar(schema_source(compiled))
    return compiled


def schema_source(compiled: Compiled) -> str:
    """A whole grammar of one value."""
    rules = "\n".join(f"{name}: {body}" for name, body in compiled.rules)
    return f"{HEAD}\nstart: {compiled.start}\n{rules}\n"


def _reason(messages: Sequence[str]) -> str:
    """The library's first line says what, and one that begins with "error:" says why; between them is a picture."""
    lines = " ".join(messages).splitlines() or ["no reason was given"]
    why = [line.removeprefix("error:") for line in lines[1:] if line.startswith("error:")]
    return "".join([lines[0], *why[:1]]).rstrip(". ")
