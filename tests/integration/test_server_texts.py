"""Plain completions by OpenAI's own client, the server's description of itself, and connections that never speak."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from agentspeed import Session
from agentspeed.errors import InvalidRequest
from agentspeed.server.options import ServerOptions
from tests.support.server_run import server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = ServerOptions(port=0, drain_seconds=5.0, header_seconds=0.6, body_seconds=0.6)
    with server(options=options, pages=256) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


# ---- completions ----------------------------------------------------------------------------------------------------
def test_a_text_goes_on_and_echoed_with_its_log_probabilities(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="nano", prompt="What is 17 plus", max_tokens=4, temperature=0, echo=True, logprobs=2
    )
    (choice,) = found.choices
    assert choice.text.startswith("What is 17 plus") and found.usage is not None
    told: Any = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [len("".join(told.tokens[:place])) for place in range(len(told.tokens))]
    assert told.token_logprobs[0] is None and all(value < 0 for value in told.token_logprobs[1:])
    assert all(
        max(top.values()) >= value - 1e-6
        for top, value in zip(told.top_logprobs[1:], told.token_logprobs[1:], strict=True)
    )
    assert found.usage.total_tokens == len(told.tokens) + (choice.finish_reason == "stop")


def test_scoring_alone_draws_nothing_and_scores_as_the_sdk_does(client: openai.OpenAI) -> None:
    scored = client.completions.create(model="nano", prompt="3 3 5", max_tokens=0, echo=True, logprobs=0)
    told: Any = scored.choices[0].logprobs
    assert scored.choices[0].text == "3 3 5" and scored.usage is not None and scored.usage.completion_tokens == 0
    again = client.completions.create(model="nano", prompt="3 3 5", max_tokens=2, temperature=0, logprobs=0)
    assert again.choices[0].logprobs is not None and again.choices[0].logprobs.token_logprobs is not None
    assert len(told.token_logprobs) > 1


@pytest.mark.anyio
async def test_a_session_over_a_text_reads_it_as_it_stands(url: str) -> None:
    async with Session.over_text("3 3 5", url) as session:
        assert session.messages == () and session.engine.codec.tokenizer.text(list(session.ids)).endswith("3 3 5")
        first = await session.generate(max_tokens=2)
        second = await session.generate(max_tokens=2)
        assert second.text.startswith(first.text) and session.tokens >= len(first.ids) + 3
        async with Session.restore(await session.snapshot(), url) as again:
            assert again.messages == () and (await again.generate(max_tokens=2)).text.startswith(second.text)
            with pytest.raises(InvalidRequest, match="no messages"):
                _ = await again.generate("Hi.")


def test_several_prompts_and_choices_are_numbered_and_a_stream_adds_up(client: openai.OpenAI) -> None:
    several = client.completions.create(model="nano", prompt=["Reach 30", "Reach 12"], n=2, max_tokens=6, seed=4)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    again = client.completions.create(model="nano", prompt=["Reach 30", "Reach 12"], n=2, max_tokens=6, seed=4)
    assert [choice.text for choice in again.choices] == [choice.text for choice in several.choices]
    texts = ["", "", "", ""]
    for chunk in client.completions.create(
        model="nano", prompt=["Reach 30", "Reach 12"], n=2, max_tokens=6, seed=4, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in several.choices]


def test_ids_are_taken_as_they_are_and_what_cannot_be_is_refused(client: openai.OpenAI, url: str) -> None:
    ids = httpx.post(f"{url}/tokenize", json={"prompt": "3 3 5"}).json()["tokens"]
    found = client.completions.create(model="nano", prompt=ids, max_tokens=3, temperature=0, echo=True)
    assert found.choices[0].text.startswith("3 3 5")
    prompts = ([], [2**31], [2**32], [[-1]])
    for wrong in ({"best_of": 3}, {"suffix": "x"}, {"max_tokens": 0}, {"n": 0}, *({"prompt": one} for one in prompts)):
        with pytest.raises(openai.BadRequestError):
            _ = client.completions.create(**{"model": "nano", "prompt": "a", **wrong})  # type: ignore[call-overload]


def test_choices_that_do_not_fit_are_one_refusal(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _ = client.completions.create(model="nano", prompt="word " * 5000, n=2, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    long: Any = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError):
        _ = client.chat.completions.create(model="nano", messages=long, n=2, max_tokens=4)


# ---- what the server says of itself ---------------------------------------------------------------------------------
def test_the_document_has_every_path_of_the_server_and_no_other(url: str) -> None:
    from agentspeed.server.app import application

    document = httpx.get(f"{url}/openapi.json").json()
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    gate: Any = application(_Stub())  # type: ignore[arg-type]
    real = {(route.path.replace(":path", ""), method) for route in gate.routes for method in route.methods - {"HEAD"}}
    assert described == real


class _Stub:
    """A service that is not used: routes are made without one."""

    options = ServerOptions(port=0)
    history = None


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("PUT", "/v1/models", 405)])
def test_what_no_route_takes_is_refused_in_the_clients_shape(url: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{url}{path}")
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    if status == 405:
        assert "GET" in answer.headers["allow"]


# ---- connections ----------------------------------------------------------------------------------------------------
def _said(url: str, data: bytes) -> tuple[bytes, float]:
    """Everything that comes until the server closes, and after how many seconds it does."""
    host, _, port = url.removeprefix("http://").partition(":")
    begun = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as peer:
        peer.sendall(data)
        found = b""
        while more := peer.recv(65536):
            found += more
    return found, time.monotonic() - begun


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"])
def test_a_connection_that_never_finishes_its_head_is_closed(url: str, said: bytes) -> None:
    answer, seconds = _said(url, said)
    assert answer.startswith(b"HTTP/1.1 408") and seconds < 5


def test_a_body_that_stops_coming_is_refused_and_the_next_request_is_served(url: str) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 400\r\n\r\n"
    answer, seconds = _said(url, head + b'{"messages": [')
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer and seconds < 5
    assert httpx.get(f"{url}/health").status_code == 200


def test_headers_without_end_are_refused(url: str) -> None:
    answer, _ = _said(url, b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 65_600)
    assert answer.startswith(b"HTTP/1.1 431")
