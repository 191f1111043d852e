"""The listening socket: new peers come in one by one, and none while the process has no descriptor left for them."""

from __future__ import annotations

import errno
import logging
import os
import resource
import selectors
import socket
import sys
from collections.abc import Callable
from typing import final

from agentspeed_engine.clock import Clock

_LOG = logging.getLogger("agentspeed.engine")
_RESERVE = 16
"""Descriptors kept back from peers: a tokenizer, a module or a recording may still have to be opened."""
_PAUSE_SECONDS = 1.0
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@final
class Listener:
    """One listening socket in the loop's selector."""

    def __init__(
        self,
        server: socket.socket,
        selector: selectors.BaseSelector,
        clock: Clock,
        entered: Callable[[socket.socket, int], None],
    ) -> None:
        """`entered` is called with each new peer, and how many peers the descriptors suffice for."""
        server.setblocking(False)
        self._server = server
        self._selector = selector
        self._clock = clock
        self._entered = entered
        self._others = len(os.listdir("/dev/fd"))
        """Descriptors that are open before the first peer comes."""
        self._said = False
        self.opens_at: float | None = None
        """When it is tried again; None while it is open."""
        self._open()

    def open_if_due(self) -> None:
        if self.opens_at is not None and self._clock.now() >= self.opens_at:
            self.opens_at = None
            self._open()

    def _open(self) -> None:
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            peer, _ = self._server.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it has gone again
            return
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            if not self._said:  # once: its cause may last for hours
                self._said = True
                _LOG.warning("links wait, for none can be accepted now: %s", error)
            # The peer stays in the backlog, where it would wake the loop for ever.
            self._selector.unregister(self._server)
            self.opens_at = self._clock.now() + _PAUSE_SECONDS
            return
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._entered(peer, sys.maxsize if most == resource.RLIM_INFINITY else most - self._others - _RESERVE)
