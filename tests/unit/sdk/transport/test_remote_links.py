"""A link that is carried over HTTP ends with its client, without a word."""

from __future__ import annotations

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
