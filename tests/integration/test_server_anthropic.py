"""Anthropic's own client against a live server on the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.server_run import server

if TYPE_CHECKING:  # it takes seconds to import, which every worker would do: tests that run import it
    import anthropic

ADD: Any = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
QUESTION: Any = {"role": "user", "content": "What is 17 plus 25?"}


@pytest.fixture(scope="module")
def client() -> Iterator[anthropic.Anthropic]:
    import anthropic

    with server(pages=512) as url, anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as made:
        yield made


def test_a_tool_task_goes_its_round_and_its_history_is_read_from_the_cache(client: anthropic.Anthropic) -> None:
    first = client.messages.create(
        model="nano", max_tokens=64, messages=[QUESTION], tools=[ADD], extra_body={"temperature": 0}
    )
    assert first.stop_reason == "tool_use"
    use = first.content[-1]
    assert use.type == "tool_use"
    assert use.input == {"a": 17, "b": 25}
    history: Any = [
        QUESTION,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "42"}]},
    ]
    second = client.messages.create(
        model="nano", max_tokens=64, messages=history, tools=[ADD], extra_body={"temperature": 0}
    )
    assert second.stop_reason == "end_turn"
    assert second.content[0].type == "text"
    assert "42" in second.content[0].text
    read = second.usage.cache_read_input_tokens or 0
    assert read >= first.usage.input_tokens + first.usage.output_tokens - 2
    assert second.usage.input_tokens < read


def test_a_stream_adds_up_to_the_whole_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(
        model="nano", max_tokens=64, messages=[QUESTION], tools=[ADD], extra_body={"temperature": 0}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(final.content)
    assert final.content[-1].type == "tool_use"
    assert final.content[-1].input == {"a": 17, "b": 25}
    assert final.usage.output_tokens > 0


def test_tokens_are_counted_as_the_model_reads_them(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="nano", messages=[QUESTION], tools=[ADD], system="Count these.")
    said = client.messages.create(model="nano", max_tokens=1, messages=[QUESTION], tools=[ADD], system="Count these.")
    assert counted.input_tokens == said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0 has no content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ],
    ids=["no messages", "role", "no content", "max_tokens", "tool_choice", "image"],
)
def test_a_wrong_request_is_refused_in_the_shape_of_this_protocol(
    client: anthropic.Anthropic, change: dict[str, Any], names: str
) -> None:
    import anthropic

    body: Any = {"max_tokens": 8, "messages": [QUESTION], **change}
    with pytest.raises(anthropic.BadRequestError) as refusal:
        _ = client.messages.create(model="nano", **body)
    assert names in str(refusal.value)
    assert isinstance(refusal.value.body, dict)
    assert refusal.value.body["error"]["type"] == "invalid_request_error"
