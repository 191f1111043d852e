"""A server that ends: what runs ends well, nothing new is taken, and its sessions go on at the next server."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from annotated_types import Len

import agentspeed
from agentspeed.server.options import ApiKey, ServerOptions
from agentspeed.sync import Session
from tests.support.engine_client import engine
from tests.support.server_run import server, server_and_service

NANO = Path(agentspeed.__file__).parent / "models/nano"
QUESTION: Any = {"messages": [{"type": "user", "text": "What is 17 plus 25?"}]}
GREETING: Any = {"messages": [{"type": "user", "text": "Say hi."}], "max_tokens": 8}
ADD: Any = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}


def _options(folder: Path, **more: Any) -> ServerOptions:
    keys = (ApiKey("one", "a"), ApiKey("two", "b"))
    return ServerOptions(port=0, keys=keys, drain_seconds=20.0, snapshots=str(folder), **more)


def _client(url: str, key: str = "one") -> httpx.Client:
    return httpx.Client(base_url=url, headers={"x-api-key": key}, timeout=30.0)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _ask(client: httpx.Client, messages: list[dict[str, Any]]) -> str:
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def _respond(client: httpx.Client, **body: Any) -> Any:
    answer = client.post("/v1/responses", json={"temperature": 0, "max_output_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module", autouse=True)
def one_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For all servers here: what they restore comes from their folder alone."""
    with (
        engine(tmp_path_factory.mktemp("e"), model=str(NANO), pages=512) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AGENTSPEED_ENGINE", str(process.path))
        yield


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder that a server left behind, and what its clients knew."""
    folder = tmp_path_factory.mktemp("kept") / "snapshots"
    known: dict[str, Any] = {}
    with server(options=_options(folder)) as url, _client(url) as client:
        known["session"] = path = f"/v1/sessions/{client.post('/v1/sessions', json={'tools': [ADD]}).json()['id']}"
        known["call"] = client.post(f"{path}/generate", json=QUESTION).json()["tool_calls"][0]
        known["log"] = client.get(path).json()["log"]
        with client.stream("GET", f"{path}/events") as response:
            known["last"] = [line for line in response.iter_lines() if line.startswith("id: ")][-1]
        (child,) = client.post(f"{path}/fork", json={"n": 1}).json()["data"]
        known["child"] = f"/v1/sessions/{child['id']}"
        known["private"] = client.post("/v1/sessions", json={"private": True}).json()["id"]
        known["asked"] = [{"role": "user", "content": "Say hi."}]
        known["asked"] += [{"role": "assistant", "content": _ask(client, known["asked"])}]
        known["response"] = _respond(client, input="Say hello.")["id"]
        known["conversation"] = client.post("/v1/conversations", json={}).json()["id"]
        _ = _respond(client, input="Say hi.", conversation=known["conversation"])
        endless = {**GREETING, "max_tokens": 300, "temperature": 2.0, "stream": True, "seed": 1}
        known["left"] = left = f"/v1/sessions/{client.post('/v1/sessions', json={'name': 'left'}).json()['id']}"
        with client.stream("POST", f"{left}/generate", json=endless) as response:
            assert next(response.iter_lines()) == "id: 1"  # and leaves it; the server ends while its turn runs
    return folder, known


@pytest.fixture
def next_server(ended: tuple[Path, dict[str, Any]]) -> Iterator[str]:
    with server(options=_options(ended[0])) as url:
        yield url


def test_a_session_is_there_again_by_its_id_and_its_tools_are_answered(
    ended: tuple[Path, dict[str, Any]], next_server: str
) -> None:
    _, known = ended
    with _client(next_server, "two") as other:
        assert other.get(known["session"]).status_code == 404
    with _client(next_server) as client:
        assert client.get("/v1/sessions").json()["data"] == []  # nobody asked for one yet
        assert client.get(known["session"]).json()["log"] == known["log"]
        result = [{"type": "tool", "call_id": known["call"]["id"], "name": "add", "text": "42"}]
        answer = client.post(f"{known['session']}/generate", json={"messages": result, "stream": True})
        lines = answer.text.splitlines()
        assert lines[0] == f"id: {int(known['last'].removeprefix('id: ')) + 1}"
        told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert "42" in told[-1]["reply"]["text"]
        assert client.get(f"{known['session']}/events").json()["error"]["code"] == "events_gone"
        assert client.get(known["child"]).json()["messages"] == len(known["log"])


def test_a_turn_that_ran_without_a_reader_had_ended_before_its_session_was_saved(
    ended: tuple[Path, dict[str, Any]], next_server: str
) -> None:
    with _client(next_server) as client:
        log = client.get(ended[1]["left"]).json()["log"]
        assert [message["type"] for message in log] == ["user", "assistant"]


def test_a_private_session_leaves_nothing_behind(ended: tuple[Path, dict[str, Any]], next_server: str) -> None:
    with _client(next_server) as client:
        assert client.get(f"/v1/sessions/{ended[1]['private']}").status_code == 404


def test_a_stateless_conversation_goes_on_with_the_ids_that_its_model_drew(
    ended: tuple[Path, dict[str, Any]], next_server: str
) -> None:
    asked = [*ended[1]["asked"], {"role": "user", "content": "Again."}]
    with _client(next_server, "two") as other:
        _ = _ask(other, asked)
        assert 'history_matches_total{verb="continue"}' not in other.get("/metrics").text
    with _client(next_server) as client:
        _ = _ask(client, asked)
        assert 'history_matches_total{verb="continue"} 1.0' in client.get("/metrics").text


def test_responses_and_conversations_are_gone_on_from(ended: tuple[Path, dict[str, Any]], next_server: str) -> None:
    number, conversation = ended[1]["response"], ended[1]["conversation"]
    with _client(next_server, "two") as other:
        assert other.get(f"/v1/responses/{number}").status_code == 404
        assert other.get(f"/v1/conversations/{conversation}").status_code == 404
    with _client(next_server) as client:
        for _ in range(2):
            assert _respond(client, input="Again.", previous_response_id=number)["previous_response_id"] == number
        assert client.get(f"/v1/responses/{number}").json()["id"] == number
        _ = _respond(client, input="Again.", conversation=conversation)
        items = client.get(f"/v1/conversations/{conversation}/items").json()["data"]
        assert [item["role"] for item in items] == ["user", "assistant"] * 2
        assert client.delete(f"/v1/responses/{number}").status_code == 200
        assert client.get(f"/v1/responses/{number}").status_code == 404
        assert 'history_matches_total{verb="continue"} ' in client.get("/metrics").text


def test_files_are_for_their_owner_alone_and_names_of_clients_are_no_paths(
    ended: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = ended
    files = _files(folder)
    assert files
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in files)
    assert not any("left" in str(path.relative_to(folder)) for path in files)


@pytest.mark.parametrize("damage", [b"", b"no snapshot", None], ids=["empty", "other", "one bit"])
def test_a_damaged_file_is_refused_by_name_and_the_others_are_served(tmp_path: Path, damage: bytes | None) -> None:
    options = _options(tmp_path)
    with server(options=options) as url, _client(url) as client:
        for name in ("good", "bad"):
            assert client.post("/v1/sessions", json={"name": name, "system": name}).status_code == 200
        asked = [{"role": "user", "content": "Say hi."}]
        asked.append({"role": "assistant", "content": _ask(client, asked)})
        response = _respond(client, input="Say hi.")["id"]
    for path in _files(tmp_path):
        data = path.read_bytes()
        if b"good" not in data:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage is None else damage)
    with server(options=options) as url, _client(url) as client:
        for _ in range(2):
            refusal = client.get("/v1/sessions/bad")
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (410, "snapshot_broken")
            assert "'bad'" in refusal.json()["error"]["message"] and ".snapshot" in refusal.json()["error"]["message"]
            assert _ask(client, [*asked, {"role": "user", "content": "Again."}])
        assert client.get(f"/v1/responses/{response}").status_code == 404
        assert client.post("/v1/sessions", json={"name": "bad"}).json()["error"]["code"] == "session_exists"
        assert client.get("/v1/sessions/good").status_code == 200
        assert client.delete("/v1/sessions/bad").json() == {"id": "bad", "object": "session", "closed": True}
        assert client.get("/v1/sessions/bad").status_code == 404
        assert client.post("/v1/sessions", json={"name": "bad"}).status_code == 200


def test_children_that_were_saved_keep_their_ids_when_their_parent_has_others(tmp_path: Path) -> None:
    with server(options=_options(tmp_path)) as url, _client(url) as client:
        _ = client.post("/v1/sessions", json={"name": "s"})
        _ = client.post("/v1/sessions/s/fork", json={"n": 1})
        assert client.post("/v1/sessions/s.1/messages", json=QUESTION).status_code == 200
    with server(options=_options(tmp_path)) as url, _client(url) as client:
        (child,) = client.post("/v1/sessions/s/fork", json={"n": 1}).json()["data"]
        assert child["id"] == "s.2"
        assert len(client.get("/v1/sessions/s.1").json()["log"]) == 1


def test_a_snapshot_that_has_no_room_now_is_not_lost(tmp_path: Path) -> None:
    with server(options=_options(tmp_path)) as url, _client(url) as client:
        for name in ("one", "two"):
            _ = client.post("/v1/sessions", json={"name": name})
    with server(options=_options(tmp_path, max_sessions=1)) as url, _client(url) as client:
        assert client.get("/v1/sessions/one").status_code == 200
        assert client.get("/v1/sessions/two").status_code == 429
        _ = client.delete("/v1/sessions/one")
        assert client.get("/v1/sessions/two").status_code == 200


def test_nothing_new_is_taken_while_the_server_drains_and_what_is_there_can_be_read_and_ended(tmp_path: Path) -> None:
    with server_and_service(options=_options(tmp_path)) as (url, service), _client(url) as client:
        path = f"/v1/sessions/{client.post('/v1/sessions', json={}).json()['id']}"
        service.drain()
        asked = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 2}
        for method, place, body in (
            ("POST", "/v1/sessions", {}),
            ("POST", f"{path}/generate", GREETING),
            ("POST", f"{path}/fork", {"n": 1}),
            ("POST", f"{path}/messages", QUESTION),
            ("POST", "/v1/links", {}),
            ("POST", "/v1/chat/completions", asked),
            ("POST", "/v1/responses", {"input": "Say hi."}),
            ("POST", "/v1/messages", asked),
            ("GET", "/health", None),
        ):
            refusal = client.request(method, place, json=body)
            assert (refusal.status_code, refusal.headers.get("retry-after")) == (503, "5"), place
        assert client.get(path).status_code == 200
        assert client.delete(path).status_code == 200


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    with pytest.raises(Exception, match="Snapshots cannot be kept in"), server(options=_options(place)):
        pass


def test_a_client_of_a_link_that_rests_does_not_hold_up_the_end() -> None:
    """Its link stays open for as long as its process lives."""
    with server(options=ServerOptions(port=0, drain_seconds=100.0)) as url, Session(url) as s:
        _ = s.generate("Say hi.", max_tokens=4)


def test_a_turn_over_a_link_ends_well_before_the_server_does() -> None:
    with server_and_service(options=ServerOptions(port=0, drain_seconds=100.0)) as (url, service), Session(url) as s:
        with s.stream("Say hi.", output=Annotated[list[bool], Len(100, 100)], max_tokens=900) as turn:
            for _ in turn:
                service.drain()
        assert len(turn.result().output) == 100


def test_a_server_that_is_told_to_end_lets_a_stream_end_saves_its_session_and_exits_well(tmp_path: Path) -> None:
    command = "from agentspeed.cli import main; main()"
    run = subprocess.Popen(
        [sys.executable, "-c", command, "serve", str(NANO), "--port", "0", "--snapshots", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stderr is not None
        while not (line := run.stderr.readline()).startswith("agentspeed serves"):
            assert line, "the server did not start"
        with httpx.Client(base_url=line.split()[-1], timeout=30.0) as client:
            path = f"/v1/sessions/{client.post('/v1/sessions', json={}).json()['id']}"
            body = {**GREETING, "stream": True, "max_tokens": 200, "temperature": 2.0, "seed": 1}
            with client.stream("POST", f"{path}/generate", json=body) as response:
                lines = response.iter_lines()
                assert next(lines) == "id: 1"
                run.send_signal(signal.SIGTERM)
                told = [json.loads(one.removeprefix("data: ")) for one in lines if one.startswith("data: ")]
            assert told[-1]["type"] == "Reply"
        log = run.stderr.read()
        assert run.wait(30) == 0, log
    finally:
        run.kill()
        _ = run.wait(10)
        if run.stderr is not None:
            run.stderr.close()
    with server(options=ServerOptions(port=0, snapshots=str(tmp_path))) as url:
        messages = httpx.get(f"{url}{path}", timeout=30.0).json()["log"]
    assert [message["type"] for message in messages] == ["user", "assistant"]
    assert messages[1]["text"] == told[-1]["reply"]["text"]
