"""Whatever a model, a file or a message holds, nothing leaves the text layer but agentspeed's own errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed import Assistant, ToolCall, ToolMessage, User, errors
from agentspeed.chat.call_reader import JsonDepth
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.environment import load_template
from agentspeed.chat.parser import CallBroken, CallReady, TurnParser
from agentspeed.engine import NANO
from agentspeed.messages import Message
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import folder_of

NAMES = ("deepseek v3.1", "deepseek v3.2", "kimi k2 thinking", "glm 4.6", "gigachat 3", "llama 3", "qwen 3")
HUGE = ("9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "-" + "1" * 5000 + "e9", "1e999999")


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatCodec]:
    root = tmp_path_factory.mktemp("faults")
    made = {}
    for name in NAMES:
        family = FAMILIES[name]
        folder = folder_of(
            root / name.replace(" ", "_"), family.template, family.controls, plain=family.plain, end=family.end
        )
        made[name] = ChatCodec(folder)
    return {**made, "nano": ChatCodec(NANO)}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from((*NAMES, "nano")))
def test_no_text_of_a_model_breaks_the_parser_however_it_is_split(
    codecs: dict[str, ChatCodec], data: st.DataObject, name: str
) -> None:
    tags = codecs[name].tags
    form = tags.calls
    marks = [
        form.opening,
        form.trigger,
        form.name_end,
        form.call_close,
        form.joint,
        form.section_close,
        tags.think_open,
        tags.think_close,
        form.lead,
        '{"a": 1}',
        "look_up",
        '{"name": "f", "arguments": {}}',
        "\n",
        "5",
        '"',
        "}",
        "{",
    ]
    if form.keys is not None:
        marks += [form.keys.key_open, form.keys.text_open, form.keys.json_open, form.keys.value_close]
    marks = [mark for mark in marks if mark]
    parts = data.draw(st.lists(st.one_of(st.sampled_from([*marks, *HUGE[:2]]), st.text(max_size=4)), max_size=9))
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    reasoning = data.draw(st.booleans())
    edges = [0, *sorted(cuts), len(text)]
    one, other = (
        TurnParser(tags, reasoning=reasoning, tools={"look_up": {"properties": {"a": {"type": "string"}}}})
        for _ in range(2)
    )
    whole = [*one.feed(text), *one.finish()]
    split = [piece for a, b in pairwise(edges) for piece in other.feed(text[a:b])] + other.finish()
    assert told(whole) == told(split)
    for piece in whole:
        if isinstance(piece, CallReady):
            assert isinstance(json.loads(piece.arguments, parse_int=str, parse_float=str), dict)


def told(pieces: list[object]) -> list[tuple[str, str]]:
    """Kinds and joined contents: what must not depend on the split."""
    joined: list[tuple[str, str]] = []
    for piece in pieces:
        kind = type(piece).__name__
        content = "".join(str(getattr(piece, name, "")) for name in ("index", "name", "text", "arguments", "raw"))
        if joined and joined[-1][0] == kind and kind in ("TextPiece", "ReasoningPiece"):
            joined[-1] = (kind, joined[-1][1] + content)
        elif kind != "CallDelta":
            joined.append((kind, content))
    return joined


@pytest.mark.parametrize("body", HUGE, ids=["digits", "brackets", "braces", "exponent", "infinite"])
@pytest.mark.parametrize("name", ["nano", "deepseek v3.1", "kimi k2 thinking", "qwen 3", "llama 3"])
def test_huge_and_deep_arguments_are_a_call_or_told_to_be_none(
    codecs: dict[str, ChatCodec], name: str, body: str
) -> None:
    form = codecs[name].tags.calls
    head = f"{form.opening}{'functions.' if form.numbered else ''}n{':0' if form.numbered else ''}{form.name_end}"
    parser = TurnParser(codecs[name].tags)
    said = f'{head}{{"t":{body}}}{form.call_close}{form.section_close}'
    pieces = [*parser.feed(said), *parser.finish()]
    assert any(isinstance(piece, CallReady | CallBroken) for piece in pieces)


@pytest.mark.parametrize("body", HUGE, ids=["digits", "brackets", "braces", "exponent", "infinite"])
@pytest.mark.parametrize("name", ["nano", "glm 4.6", "llama 3", "qwen 3"])
def test_huge_and_deep_arguments_in_a_history_are_written_or_refused(
    codecs: dict[str, ChatCodec], name: str, body: str
) -> None:
    call = ToolCall(id="c", name="n", arguments=f'{{"t":{body}}}')
    try:
        ids = codecs[name].append([User("a")], [Assistant("", (call,))])
    except errors.AgentspeedError as error:
        assert error.remedy
    else:
        assert ids[0]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from((*NAMES, "nano")))
def test_whatever_messages_a_codec_is_given_it_writes_or_refuses_them(
    codecs: dict[str, ChatCodec], data: st.DataObject, name: str
) -> None:
    text = st.one_of(
        st.text(max_size=8), st.sampled_from(["", "\ud800", '\ue000"0.text\ue001', "<think>", "\x00", *HUGE[:1]])
    )
    call = st.builds(
        lambda i, n, a: ToolCall(id=i, name=n, arguments=a), text, text, text | st.sampled_from(["{}", "[]", *HUGE])
    )
    message: st.SearchStrategy[Message] = st.one_of(
        st.builds(User, text),
        st.builds(lambda t, c, r: Assistant(t, tuple(c), r), text, st.lists(call, max_size=2), text),
        st.builds(lambda i, n, t: ToolMessage(call_id=i, name=n, text=t), text, text, text),
    )
    messages = data.draw(st.lists(message, min_size=1, max_size=4))
    codec = codecs[name]
    try:
        written = codec.append([], messages)
        _ = codec.prompt(messages)
    except errors.AgentspeedError:
        return
    assert len(written) == len(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 99999999999 }}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{{ messages[0].content.foo() }}",
        "{{ [].append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 // 0 }}",
        "{{ '%d' % 'x' }}",
    ],
)
def test_a_template_that_goes_wrong_says_so_in_our_words(tmp_path: Path, template: str) -> None:
    folder = folder_of(tmp_path / "m", template, ())
    with pytest.raises(errors.AgentspeedError) as refusal:
        _ = ChatCodec(folder)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("settings_", "why"),
    [
        ({"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]}, "none is called default"),
        ({"chat_template": [{"name": "a"}]}, "no name or no text"),
        ({"chat_template": 5}, "no chat template"),
        ({"chat_template": []}, "no chat template"),
    ],
)
def test_what_is_no_list_of_templates_is_refused(tmp_path: Path, settings_: dict[str, object], why: str) -> None:
    _ = (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    with pytest.raises(errors.ModelBroken, match=why):
        _ = load_template(tmp_path)


def test_the_template_for_tools_is_run_when_there_are_tools(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    _ = (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    template = load_template(tmp_path)
    assert template([]) == "plain" and template([], tools=[{}]) == "1 tools"


def test_files_are_read_as_utf8_whatever_the_machine_speaks(tmp_path: Path) -> None:
    family = FAMILIES["deepseek v3.1"]
    folder = folder_of(tmp_path / "m", family.template, family.controls, plain=family.plain)
    program = (
        "import sys\nfrom pathlib import Path\nfrom agentspeed import User\n"
        "from agentspeed.chat.codec import ChatCodec\n"
        "codec = ChatCodec(Path(sys.argv[1]))\nprint(len(codec.append([], [User('\\u65e5\\U0001f600')])[0]))\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0 and int(done.stdout) > 3, done.stderr.decode()


def test_a_bracket_too_many_is_no_depth() -> None:
    depth = JsonDepth()
    assert [depth.take(character) for character in '}{"}"}'] == [-1, None, None, None, None, -1]
