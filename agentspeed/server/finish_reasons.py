"""How turns end in the words of OpenAI's API, which metrics count by as well."""

from __future__ import annotations

from typing import Final

FINISH: Final = {
    "stop_id": "stop",
    "grammar_end": "stop",
    "stop_string": "stop",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
}
"""The SDK's reasons as OpenAI's."""
