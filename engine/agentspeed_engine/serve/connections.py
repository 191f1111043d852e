"""One connected front: frames in, frames out, and a bound on what waits to be sent.

The engine never waits for a reader. What a slow one has not taken yet is bounded without losing anything: the token
deltas of a branch are joined into one, so a turn waits as at most its ids (the context limit bounds those) and its two
events; and who leaves a thousand replies unread on top of a full outbox has no further command read. (Not earlier: a
front that blocks while it sends must still find a reader here, even if it is late with its own reading.)
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import final

from agentspeed_engine.ids import LinkId
from agentspeed_engine.protocol.frames import command_reader, encode_outbox
from agentspeed_engine.protocol.messages import Command, Event, Outgoing, Tokens

_READ_BYTES = 1 << 18
_MOST_REPLIES = 1024
"""Unsent replies beside a full outbox at which a link's commands are no longer read."""
_MOST_MESSAGES = 512
"""Messages that may wait before deltas are joined; a reader that keeps up never has so many."""


@final
class Link:
    """A non-blocking socket. `greeted` after a good `Hello`."""

    def __init__(self, link_id: LinkId, peer: socket.socket, outbox_bytes: int) -> None:
        self.id = link_id
        self.socket = peer
        self.greeted = False
        self.closing = False
        """Close once everything was sent."""
        self._reader = command_reader()
        self._sending = bytearray()
        self._pending: list[Outgoing] = []
        self._outbox_bytes = outbox_bytes
        self._coalesce_at = _MOST_MESSAGES
        self._replies = 0

    def read(self) -> Iterator[Command] | None:
        """Commands that came, to be taken at once; None when the peer is gone. The iterator raises `BadFrame` behind
        the last good one."""
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return iter(())
        except ConnectionError:
            return None
        if not data:
            return None
        self._reader.feed(data)
        return iter(self._reader)

    def put(self, message: Outgoing) -> None:
        """Takes a message for the next frame. Never blocks."""
        self._pending.append(message)
        if not isinstance(message, Event):
            self._replies += 1
        if len(self._pending) >= self._coalesce_at:
            self._pending = coalesce(self._pending)
            # What cannot be joined is not looked at again until as much has come on top of it.
            self._coalesce_at = max(_MOST_MESSAGES, 2 * len(self._pending))

    @property
    def has_output(self) -> bool:
        return bool(self._sending or self._pending)

    def owes(self, kind: type[Outgoing]) -> bool:
        """A message of this kind was taken and its reader has not made place for it."""
        return any(isinstance(message, kind) for message in self._pending)

    @property
    def behind(self) -> bool:
        """Too many replies wait: the reader has to catch up before it may ask for more."""
        return len(self._sending) >= self._outbox_bytes and self._replies >= _MOST_REPLIES

    def write(self) -> bool:
        """Sends what the socket takes; False when the peer is gone. Nothing is encoded that would only wait."""
        try:
            while self._sending or self._pending:
                if self._pending and len(self._sending) < self._outbox_bytes:
                    self._sending += encode_outbox(tuple(self._pending))
                    self._pending.clear()
                    self._coalesce_at = _MOST_MESSAGES
                    self._replies = 0
                sent = self.socket.send(self._sending)
                del self._sending[:sent]
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        return True


def coalesce(messages: list[Outgoing]) -> list[Outgoing]:
    """Joins the deltas of each branch up to its next other message; nothing else is touched or reordered."""
    joined: list[Outgoing] = []
    open_at: dict[int, int] = {}
    parts: dict[int, list[Tokens]] = {}
    for message in messages:
        branch = getattr(message, "branch", None)
        if isinstance(message, Tokens):
            if message.branch in open_at:
                parts[open_at[message.branch]].append(message)
                continue
            open_at[message.branch] = len(joined)
            parts[len(joined)] = [message]
        elif isinstance(branch, int):
            open_at.pop(branch, None)
        joined.append(message)
    for index, tokens in parts.items():
        if len(tokens) > 1:
            joined[index] = Tokens(
                branch=tokens[0].branch,
                ids=b"".join(part.ids for part in tokens),
                logprobs=tuple(value for part in tokens for value in part.logprobs),
                top=tuple(value for part in tokens for value in part.top),
                draw_logprobs=tuple(value for part in tokens for value in part.draw_logprobs),
            )
    return joined
