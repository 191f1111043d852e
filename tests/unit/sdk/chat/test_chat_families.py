"""Every family's conversations, in any order, are in the log as its template renders them; its calls come back."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer

from agentspeed import Assistant, ToolCall, User, errors
from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.messages import Message
from agentspeed.tools import declared_tool
from tests.support.call_samples import SMALL, calls_of, walked
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import TOOLS, converse, folder_of, log_of, written

SEEDS = 12
"""Of each kind of session; `bench/models.py` takes more."""
WITH_TOOLS = [name for name, family in FAMILIES.items() if family.tools]
DECLARED = [declared_tool(tool, print) for tool in TOOLS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: folder_of(
            root / name.replace(" ", "_"), family.template, family.controls, plain=family.plain, end=family.end
        )
        for name, family in FAMILIES.items()
    }


@pytest.mark.parametrize("reasoning", [False, True], ids=["plain", "reasoning"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_log_written_message_by_message_is_what_the_template_renders_at_once(
    folders: dict[str, Path], name: str, reasoning: bool
) -> None:
    tools = FAMILIES[name].tools
    for seed, (given, system) in itertools.product(range(SEEDS), [(False, "Be brief."), (tools, None), (tools, "Be.")]):
        log = log_of(folders[name], reasoning=reasoning, system=system, tools=given)
        converse(log, random.Random(seed))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_kept_log_only_grows_whatever_the_template_leaves_out(folders: dict[str, Path], name: str) -> None:
    chance = random.Random(3)
    log = log_of(folders[name], reasoning=True, system=None, tools=True, history="keep")
    converse(log, chance, compared=False)
    drawn = [span for span in log.mirror.spans if log.mirror.made.find(1, span.start, span.end) >= 0]
    assert all(1 in log.mirror.made[span.start : span.end] for span in drawn)
    assert log.codec.first_changed([span.message for span in log.mirror.spans], [], {}, generate=True) is None


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_the_grammar_lets_a_family_write_calls_as_its_template_does_and_they_are_read_back(
    folders: dict[str, Path], name: str
) -> None:
    chance = random.Random(7)
    log = log_of(folders[name], reasoning=False, system=None, tools=True)
    tokenizer = LLTokenizer((folders[name] / "tokenizer.json").read_text())
    history: list[Message] = [User("Go.")]
    log.ask(*history)
    for _ in range(25):
        form = log.codec.tags.calls
        count = chance.randint(1, min(3, form.most))
        text = "I look." if form.text_beside and chance.random() < 0.5 else ""
        said = Assistant(text, calls_of(log, count, chance))
        raw = written(log.codec, log.tags, history, said)
        source = turn_grammar(tools=DECLARED, tags=log.tags)
        assert source is not None
        matcher = LLMatcher(tokenizer, source)
        ids = log.codec.tokenizer.template_ids(raw)
        assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), (raw, matcher.get_error())
        _ = log.parsed(raw, said)  # compares


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_whatever_call_the_grammar_lets_through_is_read_back_and_fits_the_schema(
    folders: dict[str, Path], name: str
) -> None:
    """Draws at random among the ids that the grammar allows, once a call has begun."""
    chance = random.Random(11)
    log = log_of(folders[name], reasoning=False, system=None, tools=True)
    tokenizer = LLTokenizer((folders[name] / "tokenizer.json").read_text())
    log.ask(User("Go."))
    few = [{**TOOLS[0], "parameters": SMALL}]
    source = turn_grammar(tools=[declared_tool(tool, print) for tool in few], tool_choice="required", tags=log.tags)
    assert source is not None
    for _ in range(6):
        ids = walked(LLMatcher(tokenizer, source), tokenizer, chance, log.codec.tokenizer.token_id("<think>"))
        raw = log.codec.tokenizer.text(ids)
        parser = TurnParser(log.tags, tools={tool["name"]: tool["parameters"] for tool in few})
        calls = [piece for piece in (*parser.feed(raw), *parser.finish()) if isinstance(piece, CallReady)]
        assert calls, raw
        for call in calls:
            value = json.loads(call.arguments)
            assert set(value) <= {"word", "count", "kind"} and "word" in value, raw
            assert isinstance(value["word"], str) and isinstance(value.get("count", 0), int), raw
            assert value.get("kind", "a b") in ("a b", "5"), raw


def test_what_a_template_cannot_do_is_refused_with_what_and_why(folders: dict[str, Path]) -> None:
    two = calls_of(log_of(folders["qwen 3"], reasoning=False, system=None, tools=True), 2, random.Random(1))
    llama = log_of(folders["llama 3"], reasoning=False, system=None, tools=True)
    llama.add(User("Go."))
    with pytest.raises(errors.InvalidRequest, match=r"has 2 calls, and this model's template writes 1"):
        llama.add(Assistant("", two))
    with pytest.raises(errors.InvalidRequest, match="text beside its calls"):
        llama.add(Assistant("So.", two[:1]))
    with pytest.raises(errors.InvalidRequest, match="does not show tools"):
        _ = log_of(folders["deepseek v2"], reasoning=False, system=None, tools=True)


def test_tools_that_a_template_with_calls_does_not_show_stand_in_the_system_text(folders: dict[str, Path]) -> None:
    log = log_of(folders["deepseek v3.1"], reasoning=False, system="Be brief.", tools=True)
    opening = log.codec.tokenizer.text(list(log.mirror.ids))
    assert "Be brief." in opening and "look_up" in opening and "count_them" in opening


MIXED = {
    "type": "object",
    "properties": {
        "flag": {"type": "boolean"},
        "most": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "rules": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "word": {"type": "string", "maxLength": 4},
    },
    "required": ["flag", "most", "rules"],
}


def test_values_that_a_template_writes_as_python_does_are_drawn_so_and_read_as_what_they_are(
    folders: dict[str, Path],
) -> None:
    log = log_of(folders["qwen 3 coder"], reasoning=False, system=None, tools=True)
    tool = declared_tool({**TOOLS[0], "parameters": MIXED}, print)
    source = turn_grammar(tools=[tool], tool_choice="required", tags=log.tags)
    tokenizer = LLTokenizer((folders["qwen 3 coder"] / "tokenizer.json").read_text())
    given = {"flag": True, "most": None, "rules": [True, False], "word": "True"}
    said = Assistant("", (ToolCall(id="c", name=tool.name, arguments=json.dumps(given)),))
    history: list[Message] = [User("Go.")]
    log.ask(*history)
    raw = written(log.codec, log.tags, history, said)
    assert "=flag>\nTrue\n" in raw and "=most>\nNone\n" in raw and "=rules>\n[true, false]\n" in raw
    matcher = LLMatcher(tokenizer, source)
    ids = log.codec.tokenizer.template_ids(raw)
    assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), matcher.get_error()
    for text in (raw, *(log.codec.tokenizer.text(walked(LLMatcher(tokenizer, source), tokenizer, chance, None))
                        for chance in map(random.Random, range(4)))):  # fmt: skip
        parser = TurnParser(log.tags, tools={tool.name: MIXED})
        for call in [piece for piece in (*parser.feed(text), *parser.finish()) if isinstance(piece, CallReady)]:
            value = json.loads(call.arguments)
            assert text != raw or value == given
            assert isinstance(value["flag"], bool) and isinstance(value["most"], int | None), text
            assert all(isinstance(rule, bool) for rule in value["rules"]) and isinstance(value.get("word", ""), str)
