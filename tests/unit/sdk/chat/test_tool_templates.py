"""Tools as different chat templates want them: the model is shown each by name, or the session is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from agentspeed import errors
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.environment import load_template
from agentspeed.engine import NANO

MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def listing(tool: str) -> str:
    """A ChatML template that lists its tools first, `tool` being how it writes one."""
    return (
        "{% if tools %}<|im_start|>tools\n{% for tool in tools %}"
        + tool
        + "{% endfor %}<|im_end|>\n{% endif %}"
        + MESSAGES
    )


WRAPPED = {
    "by attribute": "{{ tool.function.name }}: {{ tool.function.description }}"
    " ({{ tool.function.parameters.properties | list | join(', ') }})\n",
    "by key": "{{ tool['function']['name'] }} {{ tool['function']['parameters'] | tojson }}\n",
    "asserted": "{% if tool.type != 'function' %}{{ raise_exception('not a function') }}{% endif %}"
    "{{ tool.function | tojson }}\n",
}
PLAIN = {
    "by attribute": "{{ tool.name }}: {{ tool.description }} {{ tool.parameters | tojson }}\n",
    "in an object": "{{ {'name': tool.name, 'parameters': tool.parameters} | tojson }}\n",
    "asserted": "{% if tool.function is defined %}{{ raise_exception('wrapped') }}{% endif %}{{ tool | tojson }}\n",
}
TOOLS: list[dict[str, Any]] = [
    {
        "name": name,
        "description": f"{name} two numbers.",
        "parameters": {"type": "object", "properties": {"left": {"type": "number"}}, "required": ["left"]},
    }
    for name in ("add", "subtract")
]


def codec(checkpoint: Path, folder: Path, template: str) -> ChatCodec:
    """The checkpoint's tokenizer under another template."""
    _ = shutil.copy(checkpoint / "tokenizer.json", folder)
    settings = {"chat_template": template, "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    _ = (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ChatCodec(folder)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    "template",
    [*WRAPPED.values(), *PLAIN.values(), "{{ tool | tojson }}\n"],
    ids=[*(f"wrapped {name}" for name in WRAPPED), *(f"plain {name}" for name in PLAIN), "whole"],
)
def test_the_model_is_shown_every_tool_by_name_with_its_parameters(
    checkpoint: Path, tmp_path: Path, template: str, system: str | None
) -> None:
    made = codec(checkpoint, tmp_path, listing(template))
    text = made.tokenizer.text(made.opening(system, TOOLS))
    assert "add" in text and "subtract" in text and "left" in text
    assert ("Be brief." in text) == (system is not None)


@pytest.mark.parametrize("template", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_tools_are_written_as_the_models_own_library_writes_them(
    checkpoint: Path, tmp_path: Path, template: str
) -> None:
    made = codec(checkpoint, tmp_path, listing(template))
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    whole = load_template(tmp_path)([{"role": "user", "content": "Hi"}], tools=wrapped)
    opening = made.tokenizer.text(made.opening(None, TOOLS))
    assert opening and whole.startswith(opening)


def test_a_template_that_takes_both_shapes_is_given_the_common_one(checkpoint: Path, tmp_path: Path) -> None:
    made = codec(checkpoint, tmp_path, listing("{{ tool | tojson }}\n"))
    assert '{"type": "function", "function": {"name": "add"' in made.tokenizer.text(made.opening(None, TOOLS))


def test_the_shipped_model_reads_its_tools_as_it_was_trained() -> None:
    made = ChatCodec(NANO)
    text = made.tokenizer.text(made.opening("Be brief.", TOOLS))
    first = json.dumps(TOOLS[0], separators=(",", ":"))
    assert text == f"<|bos|><|system|>Be brief.\n{first}\n{json.dumps(TOOLS[1], separators=(',', ':'))}<|end|>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (MESSAGES, "no tool's name"),
        (listing("{{ tool.declaration.title }}\n"), "declaration"),
        ("{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}" + MESSAGES, "no tools, please"),
    ],
    ids=["ignores tools", "unknown shape", "refuses tools"],
)
def test_a_template_that_shows_no_tools_is_refused_with_what_to_do(
    checkpoint: Path, tmp_path: Path, template: str, why: str
) -> None:
    made = codec(checkpoint, tmp_path, template)
    assert made.opening(None, []) is not None  # without tools it serves
    with pytest.raises(errors.InvalidRequest, match=why) as refusal:
        _ = made.opening(None, TOOLS)
    assert "tool.function.name" in refusal.value.remedy


def test_loops_that_break_off_are_understood(checkpoint: Path, tmp_path: Path) -> None:
    template = listing("{{ tool.name }}{% if loop.index == 2 %}{% break %}{% endif %}\n")
    made = codec(checkpoint, tmp_path, template)
    assert "subtract" in made.tokenizer.text(made.opening(None, [*TOOLS, {**TOOLS[0], "name": "third"}]))


def test_a_template_that_refuses_the_prompt_once_there_are_tools_is_refused_in_its_own_words(
    checkpoint: Path, tmp_path: Path
) -> None:
    refuses = "{% if tools and add_generation_prompt %}{{ raise_exception('no prompt') }}{% endif %}"
    made = codec(checkpoint, tmp_path, refuses + listing(WRAPPED["by key"]))
    with pytest.raises(errors.TemplateUnstable, match="with tools writes: no prompt"):
        _ = made.view(reasoning=None, history="template", variables={}, system=False, tools=True)
