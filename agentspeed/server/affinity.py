"""Which conversation a request belongs to, read from the request alone: requests of one go to one server.

A key is what the history component compares conversations by, of all that stands before the model's first message; or
the id of a session. Ids that a server makes for responses and conversations carry the key that it was sent with the
request (`AFFINITY`), so whoever names one later names its server too.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import msgspec

from agentspeed import errors, snapshot
from agentspeed.history import Conversation, keys, root_key
from agentspeed.messages import User
from agentspeed.server.anthropic import messages as anthropic_messages
from agentspeed.server.native.bodies import OpenBody
from agentspeed.server.openai import chat, items
from agentspeed.server.openai.responses import ResponsesRequest, conversation_named, system_of, tools_of
from agentspeed.server.problems import RequestProblem
from agentspeed.server.turns import parsed

AFFINITY: Final = "x-agentspeed-affinity"
"""The header with a request's key."""
KEY_LENGTH: Final = 16
_KEY: Final = re.compile(f"[0-9a-f]{{{KEY_LENGTH}}}")
_OF_IDS: Final = re.compile(r"/v1/(?:responses|conversations)/(?:resp|conv)_([0-9a-f]+)")
_OF_SESSIONS: Final = re.compile(r"/v1/sessions/([^/]+)")


@final
@dataclass(frozen=True, slots=True)
class Affinity:
    """`pinned`: another server than the one that has it cannot answer; otherwise it computes what it lacks."""

    key: str
    pinned: bool = False


@final
@dataclass(frozen=True, slots=True)
class Destination:
    """Where a request should go. `last`: the replica that answered this key before."""

    affinity: Affinity | None = None
    last: str | None = None


def ranked(where: Destination, replicas: Sequence[str]) -> list[list[str]]:
    """Replicas by preference, best rank first: the one that has the conversation, then by a hash of its key that moves
    few conversations when a replica comes or goes. A pinned one has a first rank alone."""
    if where.affinity is None:
        return [list(replicas)]
    key = where.affinity.key

    def weight(replica: str) -> bytes:
        return hashlib.blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest()

    order = sorted(replicas, key=lambda replica: (replica == where.last, weight(replica)), reverse=True)
    return [[replica] for replica in (order[:1] if where.affinity.pinned else order)]


def affinity_of(
    method: str, path: str, body: bytes, tenant: str, idempotency_key: str | None = None
) -> Affinity | None:
    """None for what any server can answer, and for what every server refuses."""
    try:
        if path == "/v1/chat/completions":
            return _of_messages(chat.conversation_of(parsed(body, chat.ChatRequest), tenant))
        if path == "/v1/messages":
            request = parsed(body, anthropic_messages.MessagesRequest)
            return _of_messages(replace(anthropic_messages.conversation_of(request, tenant), hint=None))
        if path == "/v1/responses":
            return _of_response(parsed(body, ResponsesRequest), tenant)
        if path == "/v1/conversations":
            return Affinity(secrets.token_hex(KEY_LENGTH // 2))
        if path == "/v1/sessions" and method == "POST":
            return _of_new_session(parsed(body or b"{}", OpenBody), tenant, idempotency_key)
        if path == "/v1/sessions/restore":
            return _of_session(snapshot.load(body).name)
    except (RequestProblem, errors.InputError):
        return None
    if found := _OF_SESSIONS.match(path):
        return _of_session(found[1])
    if found := _OF_IDS.match(path):
        return _in_id(found[1])
    return None


def key_in(header: str | None) -> str:
    """What new ids begin with: the key that a balancer sent, or nothing."""
    return header if header is not None and _KEY.fullmatch(header) else ""


def _of_messages(conversation: Conversation) -> Affinity:
    if conversation.hint is not None:
        return Affinity(_hashed(conversation.tenant, conversation.hint))
    asked = next((place for place, one in enumerate(conversation.messages) if isinstance(one, User)), 0)
    return Affinity(keys(root_key(conversation), conversation.messages[: asked + 1])[-1].hex()[:KEY_LENGTH])


def _of_response(request: ResponsesRequest, tenant: str) -> Affinity | None:
    number = request.previous_response_id or conversation_named(request)
    if number is not None:
        return _in_id(number.partition("_")[2]) if isinstance(number, str) else None
    system, messages = items.read_items(request.input or [])
    return _of_messages(
        Conversation(
            messages=messages,
            system=system_of(request, system),
            tools=tools_of(request),
            tenant=tenant,
            hint=request.prompt_cache_key,
        )
    )


def _in_id(text: str) -> Affinity | None:
    return Affinity(text[:KEY_LENGTH], pinned=True) if _KEY.match(text) else None


def _of_session(number: str) -> Affinity:
    """Children are named after their parent, and live where it does."""
    return Affinity(number.partition(".")[0], pinned=True)


def _of_new_session(body: OpenBody, tenant: str, idempotency_key: str | None) -> Affinity:
    """Sent again under its key, it comes to the same server, which opens it once."""
    if body.name is not None:
        return _of_session(body.name)
    if idempotency_key is not None:
        return Affinity(_hashed(tenant, idempotency_key))
    return Affinity(secrets.token_hex(KEY_LENGTH // 2))


def _hashed(*parts: str) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=KEY_LENGTH // 2).hexdigest()
