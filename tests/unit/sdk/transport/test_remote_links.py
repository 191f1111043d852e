"""A link that is carried over HTTP ends with its client, without a word."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx

from agentspeed.transport.remote import RemoteTransport


def served(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/links":
        return httpx.Response(200, json={"link": "one", "grace_seconds": 5})
    raise httpx.ReadTimeout("nothing yet")


def test_a_link_ends_when_its_client_is_closed_under_it() -> None:
    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(served))
    near = RemoteTransport("http://server", client=client).open(after_death=False)
    client.close()
    with near:
        near.settimeout(10)
        near.sendall(b"late")
        assert near.recv(1) == b""


class Broken(httpx.SyncByteStream):
    """A stream of a server whose network breaks after a while."""

    def __init__(self, said: bytes) -> None:
        self.said = said

    def __iter__(self) -> Iterator[bytes]:
        yield self.said
        time.sleep(0.06)
        raise httpx.ReadError("the network is gone")


def test_a_link_goes_on_after_each_break_that_is_shorter_than_the_grace_time() -> None:
    said = [b"one", b"two", b"three"]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/links":
            return httpx.Response(200, json={"link": "one", "grace_seconds": 0.05})
        if request.method != "GET":
            return httpx.Response(200)
        return httpx.Response(200, stream=Broken(said.pop(0))) if said else httpx.Response(404)

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    with RemoteTransport("http://server", client=client).open(after_death=False) as near:
        near.settimeout(10)
        heard = b""
        while data := near.recv(64):
            heard += data
    assert heard == b"onetwothree"
