"""`/v1/sessions` over real sockets: forks, marks, leases, snapshots, streams that are resumed, requests sent twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import pytest

from agentspeed import Engine
from agentspeed.server.options import ApiKey, ServerOptions
from agentspeed.transport.base import wire
from tests.support.server_run import server

QUESTION: Any = {"messages": [{"type": "user", "text": "What is 17 plus 25?"}]}
GREETING: Any = {"messages": [{"type": "user", "text": "Say hi."}], "max_tokens": 16}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = ServerOptions(
        port=0, keys=(ApiKey("one", "a"), ApiKey("two", "b")), max_sessions=12, grace_seconds=0.2, drain_seconds=5.0
    )
    with server(options=options, pages=512) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"x-api-key": "one"}, timeout=30.0) as made:
        yield made
        for session in made.get("/v1/sessions").json()["data"]:
            _ = made.delete(f"/v1/sessions/{session['id']}")


def _open(client: httpx.Client, **body: Any) -> str:
    made = client.post("/v1/sessions", json=body)
    assert made.status_code == 200, made.text
    return f"/v1/sessions/{made.json()['id']}"


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: ")]


def test_a_session_forks_adopts_marks_and_goes_back(client: httpx.Client) -> None:
    path = _open(client, system="You are brief.")
    first = client.post(f"{path}/generate", json=QUESTION).json()
    here = client.post(f"{path}/marks", json={"name": "here"}).json()["tokens"]
    children = client.post(f"{path}/fork", json={"n": 2}).json()["data"]
    assert [child["parent"] for child in children] == [path.rsplit("/", 1)[1]] * 2
    said = [client.post(f"/v1/sessions/{child['id']}/generate", json=GREETING).json() for child in children]
    assert all(reply["usage"]["resumed"] >= first["usage"]["new"] for reply in said)
    adopted = client.post(f"{path}/adopt", json={"child": children[1]["id"]}).json()
    assert adopted["messages"] == 4
    assert client.get(f"/v1/sessions/{children[1]['id']}").status_code == 404
    back = client.post(f"{path}/rewind", json={"to": "here"}).json()
    assert (back["tokens"], back["messages"]) == (here, 2)


def test_a_stream_that_was_left_is_read_on_from_its_last_event(client: httpx.Client) -> None:
    path = _open(client)
    with client.stream("POST", f"{path}/generate", json={**QUESTION, "stream": True}) as response:
        whole = _events(response)
    assert [event["seq"] for event in whole] == list(range(1, len(whole) + 1))
    assert whole[-1]["type"] == "Reply"
    with client.stream("GET", f"{path}/events", params={"after": 2}) as response:
        assert _events(response) == whole[2:]
    with client.stream("GET", f"{path}/events", headers={"last-event-id": "3"}) as response:
        assert _events(response) == whole[3:]


def test_a_turn_that_nobody_reads_any_more_ends_and_the_session_goes_on(client: httpx.Client) -> None:
    path = _open(client)
    long = {
        "messages": [{"type": "user", "text": "Write on and on."}],
        "temperature": 2.0,
        "stream": True,
        "max_tokens": 4000,
    }
    with client.stream("POST", f"{path}/generate", json=long) as response:
        assert next(response.iter_lines()).startswith("id: 1")
    with client.stream("GET", f"{path}/events") as response:  # reading again in time keeps it
        assert next(response.iter_lines()).startswith("id: 1")
    assert client.post(f"{path}/cancel").status_code in (200, 409)
    for _ in range(100):
        answer = client.post(f"{path}/generate", json=GREETING)
        if answer.status_code == 200:
            break
        assert answer.status_code == 409
    assert answer.status_code == 200


def test_a_request_that_is_sent_again_is_done_once(client: httpx.Client) -> None:
    path = _open(client)
    headers = {"idempotency-key": "fork-1"}
    one, other = (client.post(f"{path}/fork", json={"n": 1}, headers=headers).json() for _ in range(2))
    assert one == other
    assert len(client.get("/v1/sessions").json()["data"]) == 2
    refusal = client.post(f"{path}/fork", json={"n": 2}, headers=headers)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_a_link_shows_no_tenant_the_sessions_of_another(client: httpx.Client, url: str) -> None:
    _ = _open(client, name="mine")

    async def look() -> wire.Reply:
        async with Engine(url, api_key="two") as engine:
            return await (await engine.link()).call(lambda number: wire.Look(request=number))

    seen = anyio.run(look)
    assert isinstance(seen, wire.Picture) and seen.counts["sessions"] == 1
    assert (seen.sessions, seen.tenants) == ((), {})


def test_of_those_who_open_one_name_at_once_one_has_it(client: httpx.Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/sessions", json={"name": "same"}).status_code, range(6)))
    assert sorted(answers) == [200, *[409] * 5]


def test_a_child_takes_no_id_that_another_session_has(client: httpx.Client) -> None:
    path, other = _open(client, name="s"), _open(client, name="s.1")
    _ = client.post(f"{other}/messages", json=QUESTION)
    refusal = client.post(f"{path}/fork", json={"n": 2})
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "session_exists")
    assert client.get(other).json()["messages"] == 1
    assert len(client.get("/v1/sessions").json()["data"]) == 2
    assert client.post(f"{path}/fork", json={"n": 1}).json()["data"][0]["id"] == "s.3"


def test_a_turn_that_is_asked_for_again_is_drawn_once_whether_it_ran_or_had_ended(client: httpx.Client) -> None:
    path = _open(client)
    headers = {"idempotency-key": "turn-1"}
    body = {**QUESTION, "temperature": 1.0}
    streamed = {**body, "stream": True}
    with client.stream("POST", f"{path}/generate", json=streamed, headers=headers) as response:
        assert next(response.iter_lines()) == "id: 1"  # the client loses its connection here
    with client.stream("POST", f"{path}/generate", json=streamed, headers=headers) as response:
        joined = _events(response)
    assert joined[-1]["type"] == "Reply" and [event["seq"] for event in joined] == list(range(1, len(joined) + 1))
    assert client.get(path).json()["messages"] == 2
    assert client.post(f"{path}/generate", json=GREETING, headers={"idempotency-key": "turn-2"}).status_code == 200
    with client.stream("POST", f"{path}/generate", json=streamed, headers=headers) as response:
        assert _events(response) == joined  # its own turn's events, not those of the next
    one, other = (
        client.post(f"{path}/generate", json=GREETING, headers={"idempotency-key": "turn-2"}) for _ in range(2)
    )
    assert one.json() == other.json()
    assert client.get(path).json()["messages"] == 4
    refusal = client.post(f"{path}/generate", json=QUESTION, headers=headers)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_a_turn_that_came_to_nothing_is_drawn_when_it_is_asked_for_again(client: httpx.Client) -> None:
    path = _open(client)
    headers = {"idempotency-key": "turn-3"}
    late = {**GREETING, "timeout": 1e-6}
    assert client.post(f"{path}/generate", json=late, headers=headers).status_code == 504
    last = client.get(f"{path}/events").text.count("id: ")
    assert client.post(f"{path}/generate", json=late, headers=headers).status_code == 504
    assert client.get(f"{path}/events").text.count("id: ") > last  # another turn was begun


def test_a_snapshot_opens_again_with_its_messages(client: httpx.Client) -> None:
    path = _open(client, system="You are brief.")
    _ = client.post(f"{path}/generate", json=QUESTION)
    log = client.get(path).json()["log"]
    data = client.get(f"{path}/snapshot").content
    _ = client.delete(path)
    restored = client.post("/v1/sessions/restore", content=data).json()
    assert client.get(f"/v1/sessions/{restored['id']}").json()["log"] == log
    assert client.post("/v1/sessions/restore", content=b"no snapshot").status_code == 400


def test_tools_of_a_session_are_called_and_answered(client: httpx.Client) -> None:
    add = {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
    path = _open(client, tools=[add])
    (call,) = client.post(f"{path}/generate", json=QUESTION).json()["tool_calls"]
    assert json.loads(call["arguments"]) == {"a": 17, "b": 25}
    lease = client.post(f"{path}/expect", json={"seconds": 5, "tool": "add"}).json()
    assert lease["keep"] == "soft"
    result = {"messages": [{"type": "tool", "call_id": call["id"], "name": "add", "text": "42"}]}
    answer = client.post(f"{path}/generate", json=result).json()
    assert "42" in answer["text"]
    assert answer["usage"]["recomputed"] == 0


def test_another_key_sees_no_session_of_this_one(url: str, client: httpx.Client) -> None:
    path = _open(client)
    with httpx.Client(base_url=url, headers={"x-api-key": "two"}) as other:
        assert other.get(path).status_code == 404
        assert other.post(f"{path}/generate", json=QUESTION).status_code == 404
        assert other.get("/v1/sessions").json()["data"] == []


def test_sessions_are_bounded_and_say_so(client: httpx.Client) -> None:
    paths = [_open(client) for _ in range(12)]
    refusal = client.post("/v1/sessions", json={})
    assert (refusal.status_code, refusal.headers["retry-after"]) == (429, "1")
    _ = client.delete(paths[0])
    assert client.post("/v1/sessions", json={}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("", {"temperature": "hot"}, 400),
        ("", {"no_such": 1}, 400),
        ("/none/generate", {}, 404),
        ("/{id}/generate", {"tool_choice": "nobody"}, 400),
        ("/{id}/generate", {"messages": [{"type": "robot", "text": "x"}]}, 400),
        ("/{id}/rewind", {"to": "nowhere"}, 400),
        ("/{id}/rewind", {"to": 10_000}, 400),
        ("/{id}/adopt", {"child": "none"}, 404),
        ("/{id}/fork", {"n": 100}, 429),
        ("/{id}/fork", {"n": 0}, 400),
        ("/{id}/cancel", {}, 409),
        ("/{id}/expect", {"seconds": -1}, 400),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_is_refused_with_its_status(
    client: httpx.Client, path: str, body: dict[str, Any], status: int
) -> None:
    made = _open(client)
    answer = client.post(f"/v1/sessions{path}".replace("/v1/sessions/{id}", made), json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_session_may_bound_its_turns(client: httpx.Client) -> None:
    path = _open(client, max_tokens=3)
    assert client.post(f"{path}/generate", json=QUESTION).json()["usage"]["drawn"] == 3
    assert client.post(f"{path}/generate", json={**QUESTION, "max_tokens": 2}).json()["usage"]["drawn"] == 2
