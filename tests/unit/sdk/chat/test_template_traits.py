"""Rarer traits of published templates: numbers that begin anew, lists of a template's own, calls that begin twice."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer

from agentspeed import Assistant, ToolCall, ToolMessage, User, errors
from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.rehearsal import converse, rehearse
from agentspeed.tools import declared_tool
from tests.support.call_samples import calls_of
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import TOOLS, folder_of, log_of, written

KIMI = FAMILIES["kimi k2"]
COUNTED = KIMI.template.replace("c.id", "'functions.' + c.function.name + ':' + loop.index0 | string")
QUEUED = (
    KIMI.template.replace("namespace(last=-1)", "namespace(last=-1, ids=[], count=0)")
    .replace("c.id", "s.ids[-1]")
    .replace(
        "{{- '<|tool_calls_section_begin|>' if loop.first -}}",
        "{{- '<|tool_calls_section_begin|>' if loop.first -}}"
        "{%- set _ = s.ids.append('functions.' + c.function.name + ':' + s.count | string) -%}"
        "{%- set s.count = s.count + 1 -%}",
    )
    .replace("m.tool_call_id", "s.ids.pop(0)")
)
DEEPSEEK = FAMILIES["deepseek v3"]
ONCE = DEEPSEEK.template.replace("namespace(results=false)", "namespace(results=false, begun=false)").replace(
    "{{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' -}}",
    "{{- '\n' if s.begun else '<｜tool▁calls▁begin｜>' -}}{%- set s.begun = true -%}",
)
"""A section of calls begins with the first call of a conversation, and with no later one."""
TWICE = DEEPSEEK.template.replace(
    "{{- '<｜tool▁calls▁end｜>' if loop.last -}}", "{{- '<｜tool▁calls▁end｜>' if not loop.first -}}"
)
"""A single call has no end of its section, the third of three has two."""
_PLAIN = """{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + (m.content or '') -}}
{%- for c in m.tool_calls or [] -%}
{%- set f = c.function -%}
{%- set given = f.arguments if f.arguments is string else f.arguments | tojson -%}
CALL
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""
_OBJECT = """'{"name": "' + f.name + '", "arguments": ' + given + '}'"""
LISTED = _PLAIN.replace(
    "CALL", "{{- ('<calls>[' if loop.first else ', ') + " + _OBJECT + " + (']</calls>' if loop.last else '') -}}"
)
IN_LINES = _PLAIN.replace(
    "CALL", "{{- ('<calls>\n' if loop.first else '') + " + _OBJECT + " + '\n' + ('</calls>' if loop.last else '') -}}"
)
NAMED = _PLAIN.replace("CALL", "{{- '<function=' + f.name + '>' + given + '</function>' -}}")
SECTIONS = {"in one array": LISTED, "one in a line": IN_LINES, "in marks that name them": NAMED}
"""Calls that have no mark of their own, or one that holds a name."""
NAMED_TWICE = _PLAIN.replace("CALL", "{{- '<call>' + f.name + ' of ' + f.name + given + '</call>' -}}")
"""A call has the name of its tool twice."""
_MARKED = "{{- '<call>' + " + _OBJECT + " + '</call>' -}}"
OTHER_END = _PLAIN.replace("CALL", _MARKED).replace(
    "{{- '<|im_end|>\n' -}}", "{{- '<|eom|>' if m.tool_calls else '<|im_end|>\n' -}}"
)
MISCOUNTED = """{%- set first = messages[0].role == 'system' -%}
{%- if first %}{{ messages[0].content + '<|im_end|>\n' }}{% endif -%}
{%- if tools %}{{ tools | tojson + '<|im_end|>\n' }}{% endif -%}
{%- for m in messages[1 if first else 0:] -%}
{%- if m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user\n' }}{% endif -%}
{{- '<result>' + m.content + '</result>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- else -%}
{{- '<|im_start|>' + m.role + '\n' + (m.content or '') -}}
{%- for c in m.tool_calls or [] -%}
{{- '<call>{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}</call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"""
"""With a system text it looks at the wrong neighbours of a result, and so closes results before a prompt only."""
_MARKS = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("template", SECTIONS.values(), ids=SECTIONS.keys())
def test_several_calls_are_read_back_however_a_section_holds_them(tmp_path: Path, template: str) -> None:
    folder = folder_of(tmp_path / "m", template, _MARKS)
    for seed in range(12):
        converse(log_of(folder, reasoning=False, system="Be brief.", tools=True), random.Random(seed))
    log = log_of(folder, reasoning=False, system=None, tools=True)
    assert log.codec.tags.calls.most > 1 and log.codec.tags.calls.text_beside
    log.ask(User("Go."))
    tokenizer = LLTokenizer((folder / "tokenizer.json").read_text())
    source = turn_grammar(tools=[declared_tool(tool, print) for tool in TOOLS], tags=log.tags)
    assert source is not None
    chance = random.Random(7)
    for count in (1, 2, 3):
        for text in ("", "I look."):
            said = Assistant(text, calls_of(log, count, chance))
            raw = written(log.codec, log.tags, [User("Go.")], said)
            ids = log.codec.tokenizer.template_ids(raw)
            matcher = LLMatcher(tokenizer, source)
            assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), (raw, matcher.get_error())
            _ = log.parsed(raw, said)  # compares
            parser = TurnParser(log.tags)
            pieces = [piece for letter in raw for piece in parser.feed(letter)] + parser.finish()
            told = [(piece.name, piece.arguments) for piece in pieces if isinstance(piece, CallReady)]
            assert told == [(call.name, call.arguments) for call in said.tool_calls]


def test_a_template_whose_calls_cannot_be_read_back_holds_no_tools(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", NAMED_TWICE, _MARKS)
    _ = log_of(folder, reasoning=False, system=None, tools=False)
    with pytest.raises(errors.InvalidRequest, match="a call is not read back as it is written: '<call>"):
        _ = log_of(folder, reasoning=False, system=None, tools=True)


def test_a_template_that_ends_messages_with_calls_otherwise_holds_no_tools(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", OTHER_END, (*_MARKS, "<|eom|>"))
    _ = log_of(folder, reasoning=False, system=None, tools=False)
    words = r"it ends a message with calls with '}</call><\|eom\|>', and others with '<\|im_end\|>"
    with pytest.raises(errors.InvalidRequest, match=words):
        _ = log_of(folder, reasoning=False, system=None, tools=True)


def test_a_template_that_writes_another_prompt_than_it_asked_with_holds_no_tools(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", MISCOUNTED, _MARKS)
    converse(log_of(folder, reasoning=False, system=None, tools=True), random.Random(1))
    with pytest.raises(errors.InvalidRequest, match="it asks for an answer after user, a call, a result with"):
        _ = log_of(folder, reasoning=False, system="Be brief.", tools=True)


@pytest.mark.parametrize("template", [COUNTED, QUEUED], ids=["anew in each message", "in a list of its own"])
def test_a_result_names_its_call_as_the_template_counted_it(tmp_path: Path, template: str) -> None:
    folder = folder_of(tmp_path / "m", template, KIMI.controls)
    for seed in range(12):
        converse(log_of(folder, reasoning=False, system=None, tools=True), random.Random(seed))
    log = log_of(folder, reasoning=False, system=None, tools=True)
    for number in range(2):
        call = ToolCall(id=f"c{number}", name="look_up", arguments="{}")
        log.add(User("Go."), Assistant("", (call,)), ToolMessage(call_id=call.id, name="look_up", text="1"))
    shown = log.codec.tokenizer.text(list(log.mirror.ids))
    assert shown.count("Return of functions.look_up:0") == (2 if template == COUNTED else 1)


def test_a_template_that_begins_later_calls_otherwise_holds_no_tools(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", ONCE, DEEPSEEK.controls)
    _ = log_of(folder, reasoning=False, system=None, tools=False)
    with pytest.raises(errors.InvalidRequest, match="a call after user, a call, a result begins with"):
        _ = log_of(folder, reasoning=False, system=None, tools=True)


def test_calls_are_as_many_as_a_template_ends_alike(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", TWICE, DEEPSEEK.controls)
    log = log_of(folder, reasoning=False, system=None, tools=True)
    assert log.codec.tags.calls.most == 1
    for seed in range(6):
        converse(log_of(folder, reasoning=False, system=None, tools=True), random.Random(seed))


def test_what_ends_a_turn_stays_so_where_nothing_else_could_end_it(tmp_path: Path) -> None:
    """GigaChat's calls follow the mark that ends a message; a model whose only end it is writes no call after text."""
    family = FAMILIES["gigachat 3"]
    folder = folder_of(tmp_path / "m", family.template, family.controls, end="<|message_sep|>")
    log = log_of(folder, reasoning=False, system=None, tools=True)
    assert log.codec.stop_ids == (log.codec.tokenizer.token_id("<|message_sep|>"),)
    converse(log, random.Random(1))


@pytest.mark.parametrize(
    ("closing", "ends"), [("</turn>", []), ("\n<|end|>\n", ["<|end|>"])], ids=["text", "a control"]
)
def test_no_ordinary_token_of_a_closing_ends_an_answer(tmp_path: Path, closing: str, ends: list[str]) -> None:
    """What closes a message may begin with `<` or the end of a line, which answers have too."""
    template = (
        "{%- for m in messages -%}{{ m.role + ': ' + m.content + CLOSING }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
    ).replace("CLOSING", repr(closing))
    log = log_of(folder_of(tmp_path / "m", template, ["<|end|>"]), reasoning=False, system=None, tools=False)
    known = log.codec.tokenizer.token_id
    assert set(log.codec.stop_ids) == {known(token) for token in ("<EOS>", *ends)}
    written = log.codec.closing()
    for stop in log.codec.stop_ids:
        owed = log.codec.owed([*log.codec.tokenizer.content_ids("Yes"), stop])
        assert owed == (written[written.index(stop) + 1 :] if stop in written else written)
    for seed in range(6):
        converse(log_of(tmp_path / "m", reasoning=False, system=None, tools=False), random.Random(seed))


def test_a_rehearsal_tells_of_each_kind_of_session_what_it_holds_and_why_not(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", ONCE, DEEPSEEK.controls)
    told = list(rehearse(folder, 2))
    assert [one.kind for one in told] == [
        "no tools, no system text", "no tools, a system text", "tools, no system text", "tools, a system text",
    ]  # fmt: skip
    assert [one.holds for one in told] == [True, True, False, False]
    assert "begins with" in told[2].refused and told[0].equal == told[0].conversations == 2


class _Days:
    """A clock whose days the test gives."""

    today = datetime(2026, 1, 31, tzinfo=UTC)

    @classmethod
    def now(cls) -> datetime:
        return cls.today


def test_an_opening_is_had_again_and_tells_the_day_it_is_asked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentspeed.chat.codec.datetime", _Days)
    dated, timeless = (
        log_of(
            folder_of(tmp_path / name, FAMILIES[name].template, FAMILIES[name].controls),
            reasoning=False,
            system=None,
            tools=False,
        )
        for name in ("llama 3", "kimi k2")
    )
    first = [log.codec.opening("Be brief.", []) for log in (dated, timeless)]
    _Days.today = datetime(2026, 2, 1, tzinfo=UTC)
    second = [log.codec.opening("Be brief.", []) for log in (dated, timeless)]
    assert "31 Jan 2026" in dated.codec.tokenizer.text(first[0])
    assert "01 Feb 2026" in dated.codec.tokenizer.text(second[0])
    second[1].append(0)  # a caller's own list
    assert timeless.codec.opening("Be brief.", []) == first[1]
    assert timeless.codec.opening("Be long.", []) != first[1]
