"""OpenAI's own client against a live server on the shipped model: chat, streams, tools, shapes, responses, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from agentspeed.server.options import ApiKey, ServerOptions
from tests.support.server_run import server

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
FLAT: Any = {"type": "function", **ADD["function"]}
QUESTION: Any = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is 17 plus 25?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = ServerOptions(port=0, keys=(ApiKey("one", "a"), ApiKey("two", "b")), max_tokens=256, drain_seconds=5.0)
    with server(options=options, pages=512) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="one", max_retries=0) as made:
        yield made


def test_a_tool_task_goes_its_round_and_its_history_is_cached(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="nano", messages=QUESTION, tools=[ADD], temperature=0)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"a": 17, "b": 25}
    history = [
        *QUESTION,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "42"},
    ]
    second = client.chat.completions.create(model="nano", messages=history, tools=[ADD], temperature=0)
    assert "42" in (second.choices[0].message.content or "")
    assert second.choices[0].finish_reason == "stop"
    assert first.usage is not None and second.usage is not None and second.usage.prompt_tokens_details is not None
    kept = first.usage.prompt_tokens + first.usage.completion_tokens
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= kept - 2
    assert second.usage.total_tokens == second.usage.prompt_tokens + second.usage.completion_tokens


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="nano", messages=QUESTION, tools=[ADD], temperature=0)
    with client.chat.completions.stream(
        model="nano", messages=QUESTION, tools=[ADD], temperature=0, stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    one, other = final.choices[0].message.tool_calls, whole.choices[0].message.tool_calls
    assert one is not None and other is not None
    assert [call.function.arguments for call in one] == [call.function.arguments for call in other]  # type: ignore[union-attr]
    assert final.usage is not None and whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_choices_are_forks_of_one_prompt(client: openai.OpenAI) -> None:
    puzzle: Any = [{"role": "user", "content": "Reach 30 from 3 3 5."}]
    found = client.chat.completions.create(model="nano", messages=puzzle, n=4, temperature=1.5, max_tokens=24, seed=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in found.choices}) > 1
    chunks = client.chat.completions.create(
        model="nano", messages=QUESTION, n=3, temperature=1.5, max_tokens=12, stream=True
    )
    seen = {choice.index for chunk in chunks for choice in chunk.choices}
    assert seen == {0, 1, 2}


def test_a_schema_is_kept_to_and_text_is_cut_at_a_stop(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    found = client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": "Ada is 36 years old. Give it as JSON."}],
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    assert set(json.loads(found.choices[0].message.content or "")) == {"name", "age"}
    cut = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0, stop=["4", "2"])
    assert "2" not in (cut.choices[0].message.content or "")
    assert cut.choices[0].finish_reason == "stop"


def test_log_probabilities_come_with_their_tokens(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="nano", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=6
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == found.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(other.logprob for other in entry.top_logprobs)


def test_a_response_goes_on_from_any_earlier_one(client: openai.OpenAI) -> None:
    first = client.responses.create(model="nano", input="What is 17 plus 25?", tools=[FLAT], temperature=0)
    call = first.output[0]
    assert call.type == "function_call"
    for result in ("42", "43"):
        output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": result}]
        then = client.responses.create(
            model="nano", previous_response_id=first.id, input=output, tools=[FLAT], temperature=0
        )
        assert result in then.output_text
        assert then.usage is not None and first.usage is not None
        assert then.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 2
    assert client.responses.retrieve(first.id).output[0].type == "function_call"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        _ = client.responses.retrieve(first.id)


def test_a_streamed_response_numbers_its_events_and_ends_completed(client: openai.OpenAI) -> None:
    with client.responses.stream(model="nano", input="What is 17 plus 25?", tools=[FLAT], temperature=0) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].type == "response.completed"
    assert final.output[0].type == "function_call"
    assert json.loads(final.output[0].arguments) == {"a": 17, "b": 25}


def test_a_conversation_remembers(client: openai.OpenAI) -> None:
    made = client.conversations.create()
    for _ in range(2):
        found = client.responses.create(model="nano", conversation=made.id, input="Say hi.", temperature=0)
    assert found.usage is not None and found.usage.input_tokens_details.cached_tokens > 0
    kinds = [item.type for item in client.conversations.items.list(made.id).data]
    assert kinds == ["message"] * 4


def test_a_prewarmed_prompt_is_cached_when_its_question_comes(client: openai.OpenAI) -> None:
    text = "A long context. " * 40
    warm = client.responses.create(model="nano", input=text, extra_body={"prewarm": True})
    assert warm.output == []
    found = client.responses.create(model="nano", input=text, max_output_tokens=4)
    assert found.usage is not None
    assert found.usage.input_tokens_details.cached_tokens > 0.9 * found.usage.input_tokens


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]: role"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n is 0"),
        ({"tool_choice": "add"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"logit_bias": {"five": 3}}, "logit_bias"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"messages": [{"role": "tool", "tool_call_id": "none", "content": "x"}]}, "none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_request_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], names: str) -> None:
    body = {"model": "nano", "messages": QUESTION, **change}
    with pytest.raises(openai.BadRequestError) as refusal:
        _ = client.post("/chat/completions", body=body, cast_to=httpx.Response)
    assert names in str(refusal.value)


def test_a_prompt_beyond_the_context_is_refused_in_words_clients_know(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        _ = client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "word " * 40_000}])
    assert refusal.value.code == "context_length_exceeded"


def test_nobody_comes_in_without_a_key_but_the_health_check(url: str) -> None:
    for key in ("", "wrong", "onee"):
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key or "-", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            _ = stranger.models.list()
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/version").status_code == 401
    assert httpx.get(f"{url}/version", headers={"x-api-key": "two"}).status_code == 200


def test_what_one_tenant_sent_is_neither_cached_nor_found_for_another(url: str, client: openai.OpenAI) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="two", max_retries=0) as other:
        mine = client.responses.create(model="nano", input="A secret of tenant a.", max_output_tokens=4)
        theirs = other.responses.create(model="nano", input="A secret of tenant a.", max_output_tokens=4)
        assert theirs.usage is not None and theirs.usage.input_tokens_details.cached_tokens == 0
        with pytest.raises(openai.NotFoundError):
            _ = other.responses.retrieve(mine.id)
        with pytest.raises(openai.NotFoundError):
            _ = other.responses.create(model="nano", previous_response_id=mine.id, input="x")


def test_text_and_ids_are_each_others_inverse(url: str) -> None:
    headers = {"x-api-key": "one"}
    ids = httpx.post(f"{url}/tokenize", json={"prompt": "Hello, wörld."}, headers=headers).json()["tokens"]
    assert httpx.post(f"{url}/detokenize", json={"tokens": ids}, headers=headers).json() == {"prompt": "Hello, wörld."}


def test_the_model_is_listed_and_another_is_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError):
        _ = client.models.retrieve("other")


def test_metrics_count_what_was_asked_and_what_was_kept(url: str, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        text = httpx.get(f"{url}/metrics", headers={"x-api-key": "one"}).text
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        }

    before = read()
    found = client.chat.completions.create(model="nano", messages=QUESTION, temperature=0)
    after = read()
    assert found.usage is not None
    for name, counted in (
        ("prompt_tokens_total", found.usage.prompt_tokens),
        ("generation_tokens_total", found.usage.completion_tokens),
        ('request_success_total{finished_reason="stop"}', 1),
    ):
        assert after[f"agentspeed:{name}"] - before.get(f"agentspeed:{name}", 0.0) == counted
    assert after["agentspeed:num_requests_running"] == 0
    assert 0 <= after["agentspeed:kv_cache_usage_perc"] <= 1
    assert sum(after[f'agentspeed:pages{{owner="{owner}"}}'] for owner in ("free", "tail", "nodes")) == 512


def test_penalties_and_biases_change_what_is_drawn(client: openai.OpenAI, url: str) -> None:
    asked: Any = {"model": "nano", "messages": QUESTION, "temperature": 0, "max_tokens": 6}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    ids = httpx.post(f"{url}/tokenize", json={"prompt": plain}, headers={"x-api-key": "one"}).json()["tokens"]
    banned = client.chat.completions.create(**asked, logit_bias={str(ids[0]): -100}).choices[0].message.content
    assert plain and banned != plain
    text = client.completions.create(model="nano", prompt="7 7 7 7", temperature=0, max_tokens=12)
    other = client.completions.create(
        model="nano", prompt="7 7 7 7", temperature=0, max_tokens=12, frequency_penalty=2.0, presence_penalty=2.0
    )
    assert text.choices[0].text != other.choices[0].text
    for wrong in ({"logit_bias": {"x": 1}}, {"frequency_penalty": 3.0}, {"logit_bias": {"1": 101}}):
        with pytest.raises(openai.BadRequestError):
            _ = client.chat.completions.create(**{**asked, **wrong})
