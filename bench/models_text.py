"""What `bench/models.py` measures of the text: codecs against templates, calls read back, tokenizers."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from agentspeed import Assistant, User
from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.rehearsal import Differs, Log
from agentspeed.chat.tokenizer import TextTokenizer
from agentspeed.engine import NANO
from agentspeed.messages import Message
from agentspeed.tools import declared_tool
from tests.support.call_samples import SMALL, calls_of, walked
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import TOOLS, converse, folder_of, log_of, written
from tests.support.tokenizer_folders import CORPUS, byte_level, fallback, tiktoken_folder, tiktoken_reference

PUBLISHED: dict[str, str] = {
    "deepseek v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n"
    '{"word": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look_up<｜tool▁sep｜>{"word": "Paris"}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek v3.2": '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="look_up">\n'
    '<｜DSML｜parameter name="word" string="true">Paris</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>",
    "kimi k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look_up:0<|tool_call_argument_begin|>"
    '{"word": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
    "kimi k2 thinking": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look_up:0"
    '<|tool_call_argument_begin|>{"word": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
    "glm 4.6": "\n<tool_call>look_up\n<arg_key>word</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
    "glm 4.7": "\n<tool_call>look_up\n<arg_key>word</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
    "youtu": '<tool_call>{"name": "look_up", "arguments": {"word": "Paris"}}</tool_call>',
    "llama 3": '{"name": "look_up", "parameters": {"word": "Paris"}}',
    "qwen 3": '<tool_call>\n{"name": "look_up", "arguments": {"word": "Paris"}}\n</tool_call>',
    "qwen 3 coder": "<tool_call>\n<function=look_up>\n<parameter=word>\nParis\n</parameter>\n</function>\n</tool_call>",
}
"""A call as each family's makers show it, about one of our tools. GigaChat's stands in a message of its own."""


def folders(root: Path) -> dict[str, Path]:
    return {
        name: folder_of(root / name.replace(" ", "_"), one.template, one.controls, plain=one.plain, end=one.end)
        for name, one in FAMILIES.items()
    }


def codec(name: str, folder: Path, conversations: int) -> dict[str, Any]:
    """Random conversations whose ids are those of the whole, of every kind of session in turn."""
    tools = FAMILIES[name].tools
    kinds = list(itertools.product((False, True), [(False, "Be brief."), (tools, None), (tools, "Be.")]))
    equal, first = 0, ""
    for number in range(conversations):
        reasoning, (given, system) = kinds[number % len(kinds)]
        log = log_of(folder, reasoning=reasoning, system=system, tools=given)
        try:
            converse(log, random.Random(number))
            equal += 1
        except Differs as error:
            first = first or f"seed {number}: {str(error)[:400]}"
    return {"conversations": conversations, "equal": equal, **({"first": first} if first else {})}


def calls(name: str, folder: Path, count: int) -> dict[str, Any]:
    """Calls that were written as the template shows them, or drawn at random under the grammar, and read back."""
    log = log_of(folder, reasoning=False, system=None, tools=True)
    tokenizer = LLTokenizer((folder / "tokenizer.json").read_text())
    history: list[Message] = [User("Go.")]
    log.ask(*history)
    chance = random.Random(7)
    source = turn_grammar(tools=[declared_tool(tool, print) for tool in TOOLS], tags=log.tags)
    assert source is not None
    read = tried = 0
    for _ in range(count):
        form = log.codec.tags.calls
        text = "I look." if form.text_beside and chance.random() < 0.5 else ""
        said = Assistant(text, calls_of(log, chance.randint(1, min(3, form.most)), chance))
        raw = written(log.codec, log.tags, history, said)
        matcher, ids = LLMatcher(tokenizer, source), log.codec.tokenizer.template_ids(raw)
        tried += 1
        try:
            allowed = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            _ = log.parsed(raw, said)
            read += allowed
        except Differs:
            pass
    few = [{**TOOLS[0], "parameters": SMALL}]
    source = turn_grammar(tools=[declared_tool(tool, print) for tool in few], tool_choice="required", tags=log.tags)
    assert source is not None
    for _ in range(count // 10):
        drawn = walked(LLMatcher(tokenizer, source), tokenizer, chance, log.codec.tokenizer.token_id("<think>"))
        found = _ready(log, log.codec.tokenizer.text(drawn), few)
        tried += 1
        read += bool(found) and all("word" in json.loads(call.arguments) for call in found)
    shown = PUBLISHED.get(name)
    example = None
    if shown is not None:
        ready = _ready(log, shown, TOOLS)
        example = [(call.name, json.loads(call.arguments)) for call in ready] == [("look_up", {"word": "Paris"})]
    return {"calls": tried, "read_back": read, "published": example}


def _ready(log: Log, raw: str, tools: list[dict[str, Any]]) -> list[CallReady]:
    parser = TurnParser(log.tags, tools={tool["name"]: tool["parameters"] for tool in tools})
    return [piece for piece in (*parser.feed(raw), *parser.finish()) if isinstance(piece, CallReady)]


# ---- tokenizers -----------------------------------------------------------------------------------------------------
_PIECES = (
    *CORPUS[:3], "\n\n", "\r\n", "\t", "  ", "Ġ", "<|", "|>", "\ufffd", "\u200d", "\u0301", "'S", "aB", "日本",
    "한국", "é", "e\u0301", "👩\u200d👧", "\x00", "\x7f", "１２３", "0123456789", "ﬁ", "İ", "\u2028", "\ufeff",
    "<0x0A>", "</s>", "العربية",
)  # fmt: skip


def hostile(count: int) -> list[str]:
    """Texts of pieces that tokenizers are known to trip over, and of any characters at all."""
    chance = random.Random(1)
    found: list[str] = []
    while len(found) < count:
        letters = [
            chance.choice(_PIECES) if chance.random() < 0.5 else chr(chance.randrange(0x110000)) for _ in range(12)
        ]
        text = "".join(letter for letter in letters[: chance.randint(1, 12)] if not 0xD800 <= ord(letter[0]) < 0xE000)
        if text:
            found.append(text)
    return found


def tokenizers(count: int) -> dict[str, dict[str, int]]:
    """Of each kind: texts, and how many had the ids and the text of the reference."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        kinds: dict[str, tuple[TextTokenizer, Callable[[str], tuple[list[int], str]]]] = {}
        for name, make in (
            ("byte fallback", fallback),
            ("metaspace", lambda folder: fallback(folder, metaspace=True)),
            ("byte level", byte_level),
        ):
            folder = root / name.replace(" ", "_")
            folder.mkdir()
            kinds[name] = (make(folder), _library(folder))
        kinds["shipped"] = (TextTokenizer(NANO), _library(NANO))
        encoding = tiktoken_reference()
        given = tiktoken_folder(root)
        kinds["tiktoken"] = (
            TextTokenizer(given),
            lambda text: (encoding.encode_ordinary(text), encoding.decode(encoding.encode_ordinary(text))),
        )
        texts = hostile(count)
        return {
            name: {"texts": count, "equal": sum(_same(ours, reference(text), text) for text in texts)}
            for name, (ours, reference) in kinds.items()
        }


def _library(folder: Path) -> Callable[[str], tuple[list[int], str]]:
    """The tokenizers library, told that a text names no control token."""
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True

    def both(text: str) -> tuple[list[int], str]:
        ids = reference.encode(text, add_special_tokens=False).ids
        return ids, reference.decode(ids, skip_special_tokens=False)

    return both


def _same(ours: TextTokenizer, wanted: tuple[list[int], str], text: str) -> bool:
    ids = ours.content_ids(text)
    return (ids, ours.text(ids)) == wanted
