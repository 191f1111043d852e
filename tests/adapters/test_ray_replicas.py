"""Two replicas on Ray Serve, on one machine: conversations stay with theirs, and move with their snapshots."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentspeed.server.options import ApiKey, ServerOptions

ray: Any = pytest.importorskip("ray", reason="run by `make conformance`")
serve: Any = pytest.importorskip("ray.serve", reason="run by `make conformance`")
replicas: Any = pytest.importorskip("agentspeed.server.replicas", reason="run by `make conformance`")

ROOT = Path(__file__).resolve().parents[2]
QUESTION: Any = {"messages": [{"type": "user", "text": "What is 17 plus 25?"}]}
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ServerOptions:
    folder = tmp_path_factory.mktemp("shared") / "snapshots"
    keys = (ApiKey("one", "a"), ApiKey("two", "b"))
    return ServerOptions(keys=keys, snapshots=str(folder), turn_seconds=30.0, drain_seconds=5.0)


@pytest.fixture(scope="module")
def url(options: ServerOptions) -> Iterator[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "engine", "kernels"))
    _ = ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 1024 * 1024,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        _scaled(options, 2)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def _scaled(options: ServerOptions, count: int) -> None:
    _ = serve.run(replicas.replicated(None, options, replicas=count, pages=256))


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"x-api-key": "one"}, timeout=60.0) as made:
        yield made


def _patient(client: httpx.Client, method: str, path: str, **body: Any) -> httpx.Response:
    """As clients are: what may succeed later is asked for again."""
    deadline = time.monotonic() + 60
    while True:
        answer = client.request(method, path, **body)
        if answer.status_code != 503 or time.monotonic() > deadline:
            return answer
        time.sleep(float(answer.headers["retry-after"]) / 4)


def _ask(client: httpx.Client, messages: list[dict[str, Any]]) -> Any:
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    answer = _patient(client, "POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _opened(client: httpx.Client) -> int:
    return len(client.get("/v1/sessions").json()["data"])


def test_every_conversation_comes_to_the_replica_that_has_it(client: httpx.Client) -> None:
    for number in range(6):
        asked = [{"role": "user", "content": f"Say hi {number}."}]
        first = _ask(client, asked)
        asked += [{"role": "assistant", "content": first["choices"][0]["message"]["content"]}]
        second = _ask(client, [*asked, {"role": "user", "content": "Again."}])
        kept = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert kept >= first["usage"]["total_tokens"] - 2
        joke = client.post("/v1/responses", json={"input": f"Count to {number}.", "max_output_tokens": 8}).json()
        for _ in range(2):
            on = {"input": "On.", "previous_response_id": joke["id"], "max_output_tokens": 4}
            then = client.post("/v1/responses", json=on).json()
            assert then["usage"]["input_tokens_details"]["cached_tokens"] >= joke["usage"]["total_tokens"] - 2
            assert client.get(f"/v1/responses/{then['id']}").status_code == 200


def test_a_request_that_is_sent_again_is_done_once_by_the_same_replica(client: httpx.Client) -> None:
    headers = {"idempotency-key": "open-1"}
    one, other = (client.post("/v1/sessions", json={}, headers=headers).json()["id"] for _ in range(2))
    assert one == other
    _ = client.delete(f"/v1/sessions/{one}")


def test_wrong_requests_are_refused_as_one_server_refuses_them(client: httpx.Client, url: str) -> None:
    assert client.post("/v1/chat/completions", content=b"{").status_code == 400
    assert client.get("/v1/sessions/none").status_code == 404
    assert client.post("/v1/links").json()["error"]["code"] == "no_links"
    assert httpx.get(f"{url}/version").status_code == 401


def test_sessions_of_a_replica_that_goes_are_opened_by_the_one_that_stays(
    client: httpx.Client, url: str, options: ServerOptions
) -> None:
    paths = [f"/v1/sessions/{client.post('/v1/sessions', json={}).json()['id']}" for _ in range(16)]
    logs = {}
    for path in paths:
        assert client.post(f"{path}/generate", json=QUESTION).status_code == 200
        logs[path] = client.get(path).json()["log"]
    (child,) = client.post(f"{paths[0]}/fork", json={"n": 1}).json()["data"]
    assert client.get(f"/v1/sessions/{child['id']}").status_code == 200
    assert 0 < _opened(client) < 16  # of one of the two
    asked = [[{"role": "user", "content": f"Say {number}."}] for number in range(6)]
    for one in asked:
        one += [{"role": "assistant", "content": _ask(client, one)["choices"][0]["message"]["content"]}]
    jokes = [
        client.post("/v1/responses", json={"input": f"Joke {number}.", "max_output_tokens": 4}) for number in range(6)
    ]
    _scaled(options, 1)
    for joke in jokes:
        on = {"input": "On.", "previous_response_id": joke.json()["id"], "max_output_tokens": 4}
        assert _patient(client, "POST", "/v1/responses", json=on).status_code == 200
    for path in paths:
        again = _patient(client, "GET", path)
        assert again.status_code == 200, again.text
        assert again.json()["log"] == logs[path]
        assert client.post(f"{path}/generate", json=QUESTION).json()["usage"]["turns"] == 1
    assert _opened(client) >= 16
    for one in asked:
        assert "cache_miss_reason" in _ask(client, [*one, {"role": "user", "content": "Again."}])["usage"]
    matches = client.get("/metrics").text
    assert 'history_matches_total{verb="continue"} ' in matches
    with httpx.Client(base_url=url, headers={"x-api-key": "two"}, timeout=60.0) as other:
        assert other.get(paths[0]).status_code == 404
    _scaled(options, 2)
    for path in paths:  # a replica that comes takes none of what another has
        assert client.get(path).json()["messages"] == len(logs[path]) + 2


def test_a_client_that_goes_away_ends_its_turn(client: httpx.Client, options: ServerOptions) -> None:
    _scaled(options, 1)  # whose gauge is looked at
    body = {"messages": [{"role": "user", "content": "Write on."}], "stream": True, "temperature": 2.0}
    with client.stream("POST", "/v1/chat/completions", json={**body, "max_tokens": 2000}) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["object"] == "chat.completion.chunk"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and "num_requests_running 0.0" not in client.get("/metrics").text:
        time.sleep(0.1)
    assert "num_requests_running 0.0" in client.get("/metrics").text
