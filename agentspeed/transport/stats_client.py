"""A watcher's end of a link: it finds running engines and asks for pictures, each in a thread; it owns no session."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Container
from pathlib import Path
from typing import final

from agentspeed import errors
from agentspeed.transport.engine_process import ATTACH, open_socket
from agentspeed.transport.error_map import public_error, shown_credential
from agentspeed_engine.protocol import messages as wire
from agentspeed_engine.protocol.frames import BadFrame, encode_command, outbox_reader
from agentspeed_engine.serve import engine_registry


def registry_folder() -> Path:
    """Where this user's engines list themselves."""
    return engine_registry.folder(os.environ)


def sockets(*, known: Container[Path] = ()) -> list[Path]:
    """Of this user's running engines, the one in AGENTSPEED_ENGINE first. Those in `known` are not asked again."""
    found = [entry.socket for entry in engine_registry.running(registry_folder(), known=known)]
    attach = os.environ.get(ATTACH)
    first = [Path(attach).resolve()] if attach else []
    return list(dict.fromkeys([*first, *found]))


@final
class Watcher:
    """One engine watched in a thread of its own, so that one that hangs holds up no other; `close` it.

    A link that is not answered stays open: an engine that goes on answers there, and one that ends closes it."""

    def __init__(self, path: Path, branches: int) -> None:
        """Asks for the first picture, as `ask` does."""
        self.path = path
        self.welcome: wire.Welcome | None = None
        self.seen: tuple[wire.Picture, wire.Picture | None] | None = None
        """The newest picture and the one before it."""
        self.ended: Exception | None = None
        """Why there will be no more: `EngineDied`; `ConnectFailed` when no process listens there, or none that speaks
        our protocol; or a bug."""
        self._branches = branches
        self._asked_at = time.monotonic()
        self._wanted = threading.Event()
        self._answered = threading.Event()
        self._closed = False
        self._socket: socket.socket | None = None
        self._reader = outbox_reader()
        self._request = 0
        threading.Thread(target=self._watch, name="agentspeed-watcher", daemon=True).start()

    def ask(self, branches: int) -> None:
        """For a picture in which at most so many branches are described, unless it still owes one."""
        if self._answered.is_set() and self.ended is None:
            self._branches, self._asked_at = branches, time.monotonic()
            self._answered.clear()
            self._wanted.set()

    def wait(self, seconds: float) -> None:
        """Until it has answered, at most so long after it was asked."""
        _ = self._answered.wait(max(0.0, self._asked_at + seconds - time.monotonic()))

    @property
    def silent(self) -> float:
        """Seconds for which it owes an answer."""
        return 0.0 if self._answered.is_set() else time.monotonic() - self._asked_at

    def close(self) -> None:
        """Its thread ends by itself, even one that waits for an answer."""
        self._closed = True
        self._wanted.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    # ---- the thread -----------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        try:
            with open_socket(self.path) as self._socket:
                self.welcome = self._greeted()
                while not self._closed:
                    picture = self._look()
                    self.seen = picture, None if self.seen is None else self.seen[0]
                    self._answered.set()
                    _ = self._wanted.wait()
                    self._wanted.clear()
        except Exception as error:  # noqa: BLE001 - a bug too is told by who reads it, in the main thread
            self.ended = error
        finally:
            self._answered.set()

    def _greeted(self) -> wire.Welcome:
        try:
            welcome = self._ask(
                wire.Hello(request=self._number(), client="agentspeed top", credential=shown_credential())
            )
        except errors.EngineDied as error:
            raise errors.ConnectFailed(
                f"What listens at {self.path} did not greet: {error}",
                remedy="Give the socket of an engine that runs this version.",
            ) from error
        if not isinstance(welcome, wire.Welcome):
            raise errors.InternalError(f"The engine answered a greeting with {type(welcome).__name__}.")
        return welcome

    def _look(self) -> wire.Picture:
        picture = self._ask(wire.Look(request=self._number(), branches=self._branches))
        if not isinstance(picture, wire.Picture):
            raise errors.InternalError(f"The engine answered Look with {type(picture).__name__}.")
        return picture

    def _number(self) -> int:
        self._request += 1
        return self._request

    def _ask(self, command: wire.Command) -> wire.Outgoing:
        assert self._socket is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended: its last words may still wait to be read
                self._socket.sendall(encode_command(command))
            while True:
                for message in self._frame():
                    if isinstance(message, wire.Failed):
                        raise self._refusal(message)
                    if not isinstance(message, wire.Event) and message.request == command.request:
                        return message
        except (OSError, BadFrame) as error:
            raise errors.EngineDied(f"The engine at {self.path} ended: {error}.") from error

    def _refusal(self, failed: wire.Failed) -> errors.AgentspeedError:
        """To a watcher an engine that stops, even by a bug of its own, has ended: it is not the watcher's bug."""
        if failed.code in ("bad_frame", "protocol_mismatch"):
            return errors.ConnectFailed(
                f"The engine at {self.path} cannot be watched: {failed.message}",
                remedy="Use the `agentspeed` of the version that the engine has.",
            )
        if failed.request == 0:
            return errors.EngineDied(f"The engine at {self.path} ended: {failed.message}", remedy=failed.remedy)
        return public_error(failed.code, failed.message, failed.remedy)

    def _frame(self) -> tuple[wire.Outgoing, ...]:
        assert self._socket is not None
        while (frame := self._reader.next()) is None:
            data = self._socket.recv(1 << 18)
            if not data:
                raise ConnectionResetError("it closed the link")
            self._reader.feed(data)
        return frame
