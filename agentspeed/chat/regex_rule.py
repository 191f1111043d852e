"""A regular expression as a rule of a grammar, and whether a text matches it by that rule."""

from __future__ import annotations

import re

from agentspeed.tools.grammars import HEAD


def regex_rule(pattern: str, max_chars: int) -> str:
    """The body of a rule for texts of at most `max_chars` characters that match `pattern` from end to end."""
    return f"/{_slashed(pattern)}/ & /(?s:.){{0,{max_chars}}}/"


def matches(pattern: str, max_chars: int, text: str) -> bool:
    """Whether the whole text matches, by the rule that the engine draws under."""
    from llguidance import LLMatcher, LLTokenizer

    source = f"{HEAD}\nstart: OUTPUT\nOUTPUT: {regex_rule(pattern, max_chars)}\n"
    matcher = LLMatcher(LLTokenizer("byte"), source, log_level=0)
    return all(matcher.try_consume_tokens([byte]) == 1 for byte in text.encode()) and matcher.is_accepting()


def _slashed(pattern: str) -> str:
    """A pattern between slashes: anchors are implied, and a slash of its own is escaped."""
    bare = pattern.removeprefix("^")
    bare = bare[:-1] if bare.endswith("$") and not bare.endswith(r"\$") else bare
    return re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], bare, flags=re.DOTALL)
