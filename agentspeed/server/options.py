"""What a server is told when it starts: where it listens, who may come in, and what is too much."""

from __future__ import annotations

import base64
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from agentspeed import errors


@final
@dataclass(frozen=True, slots=True)
class ApiKey:
    """One secret, and the tenant whose rows, sessions and quotas its holder has."""

    secret: str = field(repr=False)
    tenant: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """All of them; times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[ApiKey, ...] = ()
    """Without a key only this machine can be listened to."""
    max_body: int = 16 * 1024 * 1024
    header_seconds: float = 10.0
    """For a request's line and headers to come whole."""
    body_seconds: float = 30.0
    """Between two pieces of a body."""
    max_tokens: int | None = None
    """The most that one request may ask for; None: what the context has room for."""
    default_max_tokens: int | None = None
    """Of a request that says nothing; None: what the context has room for, as OpenAI's endpoints do."""
    max_requests: int = 1024
    """Requests in work at once; one more is told to come back (429)."""
    turn_seconds: float = 600.0
    """The longest that one request may take."""
    drain_seconds: float = 30.0
    """After SIGTERM, how long running requests may go on."""
    idle_sessions: int = 256
    """Sessions of stateless conversations that wait to go on."""
    max_links: int = 64
    """Programs that may use `Session("http://...")` at once; each event loop of one is a link."""
    max_sessions: int = 1024
    """Sessions that clients of `/v1/sessions` may hold open."""
    grace_seconds: float = 30.0
    """For how long a turn runs on that nobody reads any more."""
    idle_seconds: float = 600.0
    snapshots: str | None = None
    """A folder where sessions wait for the next server; None: they end with this one."""
    snapshot_bytes: int = 1 << 30
    """Of one tenant's sessions, and of its conversations; the oldest go first."""
    snapshot_seconds: float = 7 * 24 * 3600.0
    """For how long they wait."""

    def __post_init__(self) -> None:
        if not self.keys and not _is_loopback(self.host):
            raise errors.InvalidRequest(
                f"host is {self.host!r}, which other machines reach, and there is no API key.",
                remedy="Give --api-key (or AGENTSPEED_API_KEY), or listen on 127.0.0.1.",
            )
        if not 0 <= self.port <= 65535:
            raise errors.InvalidRequest(f"port is {self.port}; it must be from 0 to 65535.")
        for name in ("max_body", "max_requests", "idle_sessions"):
            if getattr(self, name) < 1:
                raise errors.InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if any(not key.secret for key in self.keys):
            raise errors.InvalidRequest("An API key is empty.")


def keys_from(texts: Sequence[str]) -> tuple[ApiKey, ...]:
    """`SECRET`, or `TENANT:SECRET` for a tenant of its own. Raises `InvalidRequest` for an empty one."""
    found = []
    for text in texts:
        tenant, colon, secret = text.rpartition(":")
        if not secret:
            raise errors.InvalidRequest("An API key is empty.", remedy="Write SECRET or TENANT:SECRET.")
        found.append(ApiKey(secret, tenant if colon else ""))
    return tuple(found)


def tenant_of(keys: Sequence[ApiKey], authorization: str | None, x_api_key: str | None) -> str | None:
    """The tenant of the key that a request shows; None when it shows no valid one. Without keys everyone is let in.

    Every key is compared, each in constant time, so that the time says nothing about how much was right."""
    if not keys:
        return ""
    shown = x_api_key
    if authorization is not None:
        shown = _shown_in(authorization)
    found: str | None = None
    for key in keys:
        if hmac.compare_digest(key.secret.encode(), (shown or "").encode()):
            found = key.tenant
    return found


def _shown_in(authorization: str) -> str | None:
    """The key of a bearer, or the password that a browser was asked for."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
