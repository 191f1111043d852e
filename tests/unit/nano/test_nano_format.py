"""The chat format of the shipped model: its template only appends, its tokenizer loses nothing, nothing is missing."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

HOME = Path(__file__).resolve().parents[3]
from agentspeed.chat.codec import ChatCodec  # noqa: E402
from agentspeed.chat.environment import load_template  # noqa: E402
from tools.nano.format import CHAT_TEMPLATE, SPECIALS, render  # noqa: E402
from tools.nano.tasks import training_task  # noqa: E402

FOLDER = HOME / "agentspeed" / "models" / "nano"
MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def conversations() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    rng = Random("format")
    tasks = [training_task(rng) for _ in range(60)]
    return [(task.messages, task.tools) for task in tasks]


def test_the_template_writes_what_the_model_was_trained_on(conversations: Any) -> None:
    template = load_template(FOLDER)
    for messages, tools in conversations:
        assert template(messages, tools=tools) == "".join(text for text, _ in render(messages, tools))


def test_a_message_is_written_the_same_whatever_follows(conversations: Any) -> None:
    template = load_template(FOLDER)
    for messages, tools in conversations:
        whole = template(messages, tools=tools)
        for count in range(1, len(messages)):
            assert whole.startswith(template(messages[:count], tools=tools))


def test_a_generation_prompt_only_appends_the_opening_of_a_reply(conversations: Any) -> None:
    template = load_template(FOLDER)
    for messages, tools in conversations:
        assert template(messages, tools=tools, generate=True) == template(messages, tools=tools) + "<|assistant|>"


def test_tools_alone_make_a_system_message() -> None:
    tool = {"name": "now", "description": "Time.", "parameters": {"properties": {}, "required": [], "type": "object"}}
    text = load_template(FOLDER)([{"role": "user", "content": "hi"}], tools=[tool])
    assert text.startswith('<|bos|><|system|>\n{"name":"now","description":"Time."')
    wrapped = load_template(FOLDER)([{"role": "user", "content": "hi"}], tools=[{"type": "function", "function": tool}])
    assert wrapped == text


def test_arguments_may_be_text_or_values() -> None:
    template = load_template(FOLDER)

    def said(arguments: object) -> str:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return template([{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}])

    assert said('{"a":1}') == said({"a": 1})
    assert said({"a": 1}).endswith('<|assistant|><tool_call>{"name":"f","arguments":{"a":1}}</tool_call><|end|>')


def test_an_unknown_role_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown role oracle"):
        load_template(FOLDER)([{"role": "oracle", "content": "x"}])


def test_the_codec_takes_the_folder_and_gives_the_ids_of_the_training_format(conversations: Any) -> None:
    codec = ChatCodec(FOLDER)
    for messages, tools in conversations[:20]:
        whole = codec.tokenizer.template_ids("".join(text for text, _ in render(messages, tools)))
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        opening = codec.opening(system, tools)
        assert whole[: len(opening)] == opening


@pytest.mark.parametrize(
    "text", ["", " ", "Grüße, 東京! 🙂", "a\n\tb  c", "<|end|>", '{"a":"b"}', "x_1-2.5", "\x00\u200d"]
)
def test_every_text_comes_back_from_its_ids(text: str) -> None:
    codec = ChatCodec(FOLDER)
    assert codec.tokenizer.text(codec.tokenizer.content_ids(text)) == text


def test_content_cannot_forge_a_control_token() -> None:
    codec = ChatCodec(FOLDER)
    assert not set(codec.tokenizer.content_ids("".join(SPECIALS))) & set(range(len(SPECIALS)))


def test_digits_are_single_tokens_and_a_word_is_the_same_in_a_sentence_and_in_json() -> None:
    codec = ChatCodec(FOLDER)
    assert len(codec.tokenizer.content_ids("90210")) == 5
    word = codec.tokenizer.content_ids("Zanzibar")
    for text in ("in Zanzibar now", '{"city":"Zanzibar"}'):
        ids = codec.tokenizer.content_ids(text)
        assert any(ids[at : at + len(word)] == word for at in range(len(ids)))


def test_control_tokens_have_the_ids_that_the_configuration_names() -> None:
    codec, config = ChatCodec(FOLDER), json.loads((FOLDER / "config.json").read_text())
    assert [codec.tokenizer.token_id(text) for text in SPECIALS] == list(range(len(SPECIALS)))
    assert codec.tokenizer.token_id("<|pad|>") == config["pad_token_id"]
    assert codec.tokenizer.token_id("<|bos|>") == config["bos_token_id"]
    assert codec.stop_ids == (config["eos_token_id"],) == (codec.tokenizer.token_id("<|end|>"),)


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12 * MEBIBYTE


def test_the_shipped_template_is_the_one_of_the_source() -> None:
    assert json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE
