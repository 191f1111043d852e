"""A server under what it must bear: many streams, readers that stop, a full pool, and processes that are killed."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentspeed.chat.codec import ChatCodec
from agentspeed.server import serving, streaming
from agentspeed.server.options import ServerOptions
from tests.support.engine_client import EngineProcess, engine, until
from tests.support.random_checkpoint import make_checkpoint
from tests.support.server_run import server

ROOT = Path(__file__).resolve().parents[2]
_STOPS: list[int] = []
"""Ids that would end a turn early: the model counts up and comes to all of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((ROOT / "bench/models/tiny.json").read_text())
    made = make_checkpoint(config, tmp_path_factory.mktemp("m") / "t")
    _STOPS.extend(ChatCodec(made).stop_ids)
    return made


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A model that takes 1 ms a step and a pool of 40 turns of 96 tokens."""
    with engine(tmp_path_factory.mktemp("e"), model="noop:512:1", pages=80, context_limit=4096, page_tokens=64) as made:
        yield made


@pytest.fixture(scope="module")
def url(folder: Path, process: EngineProcess) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTSPEED_ENGINE", str(process.path))
        with server(folder, ServerOptions(port=0, drain_seconds=5.0, idle_sessions=700)) as found:
            yield found


def _asked(number: int, tokens: int, **more: Any) -> bytes:
    endless = {str(one): -100 for one in _STOPS}
    body = {"messages": [{"role": "user", "content": f"go {number}"}], "max_tokens": tokens, "stream": True, **more}
    body |= {"logit_bias": endless, "temperature": 0}
    data = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def _connected(url: str, room: int | None = None) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    peer = socket.socket()
    if room is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    peer.settimeout(60)
    peer.connect((host, int(port)))
    return peer


def _all(peers: list[socket.socket]) -> list[bytes]:
    """What each of them says, read side by side."""
    said = {peer: bytearray() for peer in peers}
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            _ = selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(60)
            assert ready, "nothing came for a minute"
            for key, _ in ready:
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                said[key.fileobj] += data  # type: ignore[index]
                if not data:
                    _ = selector.unregister(key.fileobj)
    return [bytes(said[peer]) for peer in peers]


def _storm(url: str, streams: int, tokens: int) -> list[bytes]:
    peers = [_connected(url) for _ in range(streams)]
    for number, peer in enumerate(peers):
        peer.sendall(_asked(number, tokens))
    said = _all(peers)
    for peer in peers:
        peer.close()
    return said


def _gauge(url: str, name: str) -> float:
    page = httpx.get(f"{url}/metrics", timeout=30).text
    return float(next(line.split()[-1] for line in page.splitlines() if line.startswith(f"agentspeed:{name} ")))


def _at_rest(url: str) -> bool:
    return _gauge(url, "http_requests_running") == 0 and _gauge(url, "num_requests_running") == 0


@pytest.mark.parametrize("streams", [60, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_more_streams_than_the_pool_has_room_for_all_end_whole(url: str, streams: int) -> None:
    said = _storm(url, streams, 96)
    assert all(one.startswith(b"HTTP/1.1 200") and one.rstrip().endswith(b"0") for one in said)
    assert all(b'"completion_tokens":96' in one and b"[DONE]" in one for one in said)
    assert _at_rest(url)


@pytest.mark.slow
def test_readers_that_stop_reading_are_left_and_others_are_served(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.5)
    stuck = [_connected(url, room=4096) for _ in range(2)]
    for number, peer in enumerate(stuck):
        peer.sendall(_asked(1000 + number, 2500, n=16))  # more than the buffers between them hold
    (said,) = _storm(url, 1, 20)
    assert b"[DONE]" in said
    until("the readers were left", lambda: _at_rest(url), 60)
    for peer in stuck:
        peer.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such limit")
def test_a_stream_whose_client_neither_reads_nor_closes_is_cancelled_though_buffers_would_take_all_of_it(
    folder: Path, process: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "UNTAKEN_SECONDS", 0.3)
    monkeypatch.setenv("AGENTSPEED_ENGINE", str(process.path))
    with server(folder, ServerOptions(port=0, drain_seconds=5.0)) as url, _connected(url, room=4096) as peer:
        peer.sendall(_asked(1, 3500))  # some seconds, and less than the server's own buffers hold
        assert peer.recv(12) == b"HTTP/1.1 200"
        until("its turn ended", lambda: _at_rest(url), 60)
        page = httpx.get(f"{url}/metrics", timeout=30).text
        assert "agentspeed:request_success_total{" not in page  # it was cancelled, and had not come to its end


def test_clients_that_vanish_end_their_turns(url: str) -> None:
    for _ in range(3):
        peers = [_connected(url) for _ in range(10)]
        for number, peer in enumerate(peers):
            peer.sendall(_asked(2000 + number, 3000))
        assert peers[0].recv(1000).startswith(b"HTTP/1.1 200")
        for peer in peers:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, as of a lost machine
            peer.close()
    until("their turns ended", lambda: _at_rest(url), 30)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"\xff"',
        b"[" * 100_000,
        b'{"messages": 3}',
        b'{"messages": [{"role": "user", "content": 5}]}',
        b"\0" * 50,
    ],
)
def test_broken_bodies_are_refused_by_every_endpoint(url: str, body: bytes) -> None:
    with httpx.Client(base_url=url) as client:
        for path in ("chat/completions", "completions", "responses", "messages", "sessions/restore"):
            answer = client.post(f"/v1/{path}", content=body)
            assert answer.status_code == 400 and answer.json()["error"]["message"], path


# ---- processes that are killed --------------------------------------------------------------------------------------
@contextmanager
def _served(folder: Path, socket_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    run = subprocess.Popen(
        [sys.executable, "-c", "from agentspeed.cli import main; main()", "serve", str(folder), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "AGENTSPEED_ENGINE": str(socket_path)},
    )
    try:
        assert run.stderr is not None
        while not (line := run.stderr.readline()).startswith("agentspeed serves"):
            assert line, "the server did not start"
        drain = threading.Thread(target=run.stderr.read, daemon=True)
        drain.start()
        yield run, line.split()[-1]
    finally:
        run.kill()
        _ = run.wait(10)
        drain.join(10)
        if run.stderr is not None:
            run.stderr.close()


@pytest.mark.slow
def test_a_killed_server_leaves_nothing_in_its_engine_and_another_serves(folder: Path, process: EngineProcess) -> None:
    with _served(folder, process.path) as (run, url), _connected(url) as peer:
        peer.sendall(_asked(1, 3000))
        assert peer.recv(1000).startswith(b"HTTP/1.1 200")
        run.send_signal(signal.SIGKILL)
        _ = run.wait(10)
        with pytest.raises(ConnectionResetError):
            while peer.recv(65536):
                pass
            raise ConnectionResetError
    front = process.connect()
    until("its branches are gone", lambda: front.counts()["branches_decoding"] == 0, 20)
    front.close()
    with _served(folder, process.path) as (_, url):
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200


def test_a_killed_engine_ends_streams_with_an_error_and_the_server_goes_on_with_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "e"
    place.mkdir()
    with engine(place, model="noop:512:1", pages=80, context_limit=4096) as first:
        monkeypatch.setenv("AGENTSPEED_ENGINE", str(first.path))
        with server(folder, ServerOptions(port=0, drain_seconds=2.0)) as url:
            with _connected(url) as peer:
                peer.sendall(_asked(1, 3000))
                assert peer.recv(1000).startswith(b"HTTP/1.1 200")
                os.kill(first.process.pid, signal.SIGKILL)
                (said,) = _all([peer])
            assert b'"error"' in said and b"[DONE]" not in said
            question = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3}
            refused = httpx.post(f"{url}/v1/chat/completions", json=question, timeout=30)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert httpx.get(f"{url}/health", timeout=30).status_code == 503
            began = time.monotonic()
            with engine(place, model="noop:512:1", pages=80, context_limit=4096):
                again = httpx.post(f"{url}/v1/chat/completions", json=question, timeout=30)
                assert again.status_code == 200 and time.monotonic() - began < 60
