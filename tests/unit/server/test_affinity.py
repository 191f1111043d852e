"""Requests of one conversation have one key, and a key leads to one replica for as long as that one is there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentspeed.server.affinity import Affinity, Destination, affinity_of, key_in, ranked

SYSTEM = {"role": "system", "content": "You are brief."}
ASKED = {"role": "user", "content": "What is 17 plus 25?"}
SAID = [{"role": "assistant", "content": "42"}, {"role": "user", "content": "Again."}]


def _of(path: str, body: Any, tenant: str = "a", key: str | None = None) -> Affinity | None:
    return affinity_of("POST", path, json.dumps(body).encode(), tenant, key)


@pytest.mark.parametrize(
    ("path", "first", "later"),
    [
        ("/v1/chat/completions", {"messages": [SYSTEM, ASKED]}, {"messages": [SYSTEM, ASKED, *SAID], "stream": True}),
        ("/v1/messages", {"system": "x", "messages": [ASKED]}, {"system": "x", "messages": [ASKED, *SAID]}),
        ("/v1/responses", {"input": [ASKED], "instructions": "x"}, {"input": [ASKED, *SAID], "instructions": "x"}),
    ],
    ids=["chat", "messages", "responses"],
)
def test_a_list_of_messages_has_the_key_of_its_beginning_and_of_its_tenant(path: str, first: Any, later: Any) -> None:
    key = _of(path, first)
    assert key is not None and not key.pinned and key_in(key.key) == key.key
    assert _of(path, later) == key
    assert _of(path, later, tenant="b") != key
    other = json.loads(json.dumps(first).replace("17", "18"))
    assert _of(path, other) != key


def test_a_named_conversation_has_the_key_of_its_name() -> None:
    one = _of("/v1/chat/completions", {"messages": [ASKED], "prompt_cache_key": "mine"})
    other = _of("/v1/chat/completions", {"messages": [SYSTEM, ASKED], "prompt_cache_key": "mine"})
    assert one is not None and one == other


def test_what_goes_on_from_a_response_or_a_conversation_has_the_key_in_its_id() -> None:
    key = "0123456789abcdef"
    pinned = Affinity(key, pinned=True)
    assert _of("/v1/responses", {"input": "On.", "previous_response_id": f"resp_{key}{'f' * 32}"}) == pinned
    assert _of("/v1/responses", {"input": "On.", "conversation": {"id": f"conv_{key}{'f' * 32}"}}) == pinned
    assert affinity_of("GET", f"/v1/responses/resp_{key}{'f' * 32}", b"", "a") == pinned
    assert affinity_of("POST", f"/v1/responses/resp_{key}{'f' * 32}/cancel", b"", "a") == pinned
    assert affinity_of("GET", f"/v1/conversations/conv_{key}{'f' * 32}/items", b"", "a") == pinned


def test_a_session_its_children_and_its_name_have_one_key() -> None:
    key = Affinity("mine", pinned=True)
    assert _of("/v1/sessions", {"name": "mine"}) == key
    for path in ("mine", "mine/generate", "mine.1", "mine.1.2/events"):
        assert _of(f"/v1/sessions/{path}", {}) == key
    one, other = _of("/v1/sessions", {}), _of("/v1/sessions", {})
    assert one is not None and other is not None and one.key != other.key
    assert _of("/v1/sessions", {}, key="once") == _of("/v1/sessions", {}, key="once") != _of("/v1/sessions", {})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b"{"),
        ("/v1/chat/completions", b'{"messages": []}'),
        ("/v1/messages", b'{"messages": [{"role": "user"}]}'),
        ("/v1/responses", b'{"input": [], "previous_response_id": "other"}'),
        ("/v1/sessions", b'{"no_such": 1}'),
        ("/v1/sessions/restore", b"no snapshot"),
        ("/v1/models", b""),
    ],
)
def test_what_every_server_refuses_or_answers_has_no_key(path: str, body: bytes) -> None:
    assert affinity_of("POST", path, body, "a") is None


def test_a_header_that_is_no_key_begins_no_id() -> None:
    assert [key_in(text) for text in (None, "", "abc", "0123456789abcdef/", "0123456789ABCDEF")] == [""] * 5


def test_a_key_leads_to_the_replica_that_has_it_and_else_where_its_hash_does() -> None:
    names = ["one", "two", "three"]
    keys = [Affinity(str(number)) for number in range(300)]
    first = {key.key: ranked(Destination(key), names)[0] for key in keys}
    assert all(sorted(map(tuple, ranked(Destination(key), names))) == [("one",), ("three",), ("two",)] for key in keys)
    assert all(list(first.values()).count([name]) > 50 for name in names)
    fewer = {key.key: ranked(Destination(key), names[:2])[0] for key in keys}
    assert all(fewer[key] == first[key] for key in first if first[key] != ["three"])
    assert all(ranked(Destination(key, last="two"), names)[0] == ["two"] for key in keys)
    assert ranked(Destination(Affinity("s", pinned=True), last="two"), names) == [["two"]]
    assert ranked(Destination(Affinity("s", pinned=True), last="gone"), names)[0] != ["gone"]
    assert ranked(Destination(), names) == [names]
