"""What the scripted model says to each question of LangChain's standard tests: by the last words of the log."""

from __future__ import annotations

import json
from typing import Any, Final

from agentspeed.testing import Turn as Asked
from agentspeed.testing import tool_call

_JOKE: Final = json.dumps({"setup": "Why did the cat sit?", "punchline": "To rest."}, separators=(",", ":"))
_CALLS: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("magic_function(3)", "magic_function", {"input": 3}),
    ("What is 3 + 4", "my_adder_tool", {"a": 3, "b": 4}),
    ("magic_function_no_args", "magic_function_no_args", {}),
    ("你好啊集团", "unicode_customer", {"customer_name": "你好啊集团", "description": "中国科技公司"}),
    ("こんにちは株式会社", "unicode_customer", {"customer_name": "こんにちは株式会社", "description": "日本の会社"}),
    ("weather in San Francisco", "get_weather", {"location": "San Francisco, CA"}),
    ("Using the tool, generate a", "greeting_generator", {"answer_style": "pirate"}),
    ("Hello!", "magic_function", {"input": 3}),
)
"""Words of a question, and the call that answers it."""


def answer(asked: Asked) -> str:
    """A call, JSON, or text: what that question expects; text after a tool's result."""
    _, _, last = asked.log.rpartition("<|user|>")
    question, _, since = last.partition("<|end|>")
    if "<|tool|>" in since:
        return "It is sunny."
    for words, name, arguments in _CALLS:
        if words in question and f'"name":"{name}"' in asked.log:
            return tool_call(name, **arguments)
    if "joke" in question.lower():
        return tool_call("Joke", **json.loads(_JOKE)) if '"name":"Joke"' in asked.log else _JOKE
    return "Hello there."
