"""A server's engine as a transport: the same frames over HTTP, through one httpx client that may be injected.

Each connection is a socket pair. One end is an ordinary `SocketLink`; two threads carry the bytes of the other end to
and from the server. A request that fails for the network is sent again until the server's grace time is over: offsets
make that safe, and a session notices nothing but time.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Any, Final, final

import anyio.to_thread
import httpx

from agentspeed import errors
from agentspeed.transport.base import Connection
from agentspeed.transport.socket_link import open_link

_LOG: Final = logging.getLogger("agentspeed.transport")
_PAUSES: Final = (0.05, 0.1, 0.25, 0.5, 1.0)
_READ_BYTES: Final = 1 << 18
_ACKNOWLEDGE_BYTES: Final = 1 << 20
"""The server keeps what was not acknowledged; what is sent to it acknowledges what came by then."""
_CONNECT_SECONDS: Final = 10.0


def new_client(url: str, api_key: str | None) -> httpx.Client:
    """As sessions make one by themselves: no limit on how long a stream is silent, ten seconds to connect."""
    headers = {} if not api_key else {"authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
    return httpx.Client(
        base_url=url,
        headers=headers,
        timeout=timeout,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
    )


def checked(response: httpx.Response) -> httpx.Response:
    """The response, when it is a good one. Raises the public error of what the server says."""
    if response.status_code < 400:
        return response
    _ = response.read()
    try:
        found = response.json()["error"]
        message, code = str(found["message"]), found.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = f"{response.url} answered {response.status_code}", None
    if response.status_code in (401, 403):
        raise errors.ConnectFailed(message, remedy="Give api_key=, or set AGENTSPEED_API_KEY.")
    if response.status_code == 429:
        raise errors.EngineOverloaded(message)
    if response.status_code == 404 and code is None:
        raise errors.ConnectFailed(message, remedy="Is it `agentspeed serve` of this version?")
    raise errors.ConnectFailed(message)


@final
class RemoteTransport:
    """Connections to the engine of one server. `client` must have the server's address as its base URL; one that was
    given is not closed here."""

    pid = None

    def __init__(self, url: str, *, api_key: str | None = None, client: httpx.Client | None = None) -> None:
        self._url = url
        self._client = client or new_client(url, api_key)
        self._owned = client is None

    async def connect(self, *, after_death: bool) -> Connection:
        """See `base.Transport`. Raises `ConnectFailed` when the server is not reached or does not let in, and
        `EngineOverloaded` when it has too many links."""
        return await open_link(self, after_death=after_death, client="agentspeed remote")

    def want(self, change: int) -> None:
        """See `socket_link.SocketSource`: nothing is started here, so there is nothing to count."""

    def open(self, *, after_death: bool) -> socket.socket:
        """The near end of a pair whose far end is carried to the server."""
        try:
            made = checked(self._client.post("/v1/links")).json()
        except httpx.HTTPError as error:
            raise errors.ConnectFailed(
                f"{self._url} was not reached: {error or type(error).__name__}.",
                remedy="Is `agentspeed serve` running there?",
            ) from error
        near, far = socket.socketpair()
        try:
            _Carrier(self._client, str(made["link"]), float(made["grace_seconds"]), far).start()
        except RuntimeError as error:
            near.close()
            far.close()
            raise errors.ConnectFailed(
                f"No thread could be started for a link: {error}.", remedy="Raise `ulimit -u`."
            ) from error
        return near

    @property
    def client(self) -> httpx.Client:
        """What requests go through."""
        return self._client

    async def close(self) -> None:
        """Lets go of the client, if it was made here."""
        if self._owned:
            await anyio.to_thread.run_sync(self._client.close)


@final
class _Carrier:
    """Two threads that carry one link's bytes; they end with the pair or the link."""

    def __init__(self, client: httpx.Client, number: str, grace: float, far: socket.socket) -> None:
        self._client = client
        self._path = f"/v1/links/{number}"
        self._grace = grace
        self._far = far
        self._received = 0
        self._reached_at = 0.0
        """When the server last began to send what it has: from its end on it waits for the next reader."""
        self._over = threading.Event()

    def start(self) -> None:
        for carry in (self._down, self._up):
            threading.Thread(target=carry, name="agentspeed-remote", daemon=True).start()

    def _down(self) -> None:
        """From the server to the session."""
        try:
            self._again(self._read)
        except _LinkLost:
            pass
        finally:
            self._end()

    def _read(self) -> bool:
        acknowledged = self._received
        with self._client.stream("GET", f"{self._path}/frames", params={"after": self._received}) as response:
            if response.status_code != 200:
                _LOG.info("a link to %s ended: %s", self._client.base_url, response.status_code)
                return True
            self._reached_at = time.monotonic()
            for data in response.iter_raw():
                self._received += len(data)
                self._far.sendall(data)
                if self._received - acknowledged > _ACKNOWLEDGE_BYTES:
                    acknowledged = self._received
                    _ = self._client.post(f"{self._path}/frames", params={"received": acknowledged})
        return True

    def _up(self) -> None:
        """From the session to the server, each piece until the server has it."""
        sent = 0
        try:
            while data := self._far.recv(_READ_BYTES):
                at = sent

                def send(at: int = at, data: bytes = data) -> bool:
                    answer = self._client.post(
                        f"{self._path}/frames", content=data, params={"at": at, "received": self._received}
                    )
                    if answer.status_code != 200:
                        raise _LinkLost
                    return True

                self._again(send)
                sent += len(data)
        except (OSError, _LinkLost):
            pass
        finally:
            self._end()

    def _again(self, once: Any) -> None:
        """Until it succeeds, the link ends, its client is closed, or the network was gone for longer than the server
        waits."""
        tries, since = 0, None
        while not self._over.is_set():
            try:
                if once():
                    return
            except httpx.HTTPError as error:
                now = time.monotonic()
                if since is None or self._reached_at > since:  # it was there again since the break before this one
                    tries, since = 0, now
                if now - since > self._grace:
                    _LOG.warning("a link to %s is given up: %s", self._client.base_url, error)
                    raise _LinkLost from error
                _ = self._over.wait(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1
            except OSError:
                return
            except RuntimeError as error:
                if not self._client.is_closed:
                    raise
                raise _LinkLost from error  # whoever owns it has let go

    def _end(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        with contextlib.suppress(OSError):
            self._far.shutdown(socket.SHUT_RDWR)
        self._far.close()
        with contextlib.suppress(httpx.HTTPError, RuntimeError):  # a server that is gone ends the link by itself
            _ = self._client.delete(self._path)


class _LinkLost(Exception):
    """The server has no such link any more."""
