"""A watcher's end of a link: it finds running engines and asks for pictures, owns no session, and may block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container
from pathlib import Path
from typing import final

import msgspec

from agentspeed import errors
from agentspeed.backends.faults import public_error
from agentspeed.backends.process import ATTACH, open_socket
from agentspeed_engine import wire
from agentspeed_engine.run import registry

_ANSWER_SECONDS = 5.0
"""An engine answers between two callbacks of its loop, which never waits for a step."""
_SOON_SECONDS = 0.2
"""For one that has not answered before: others are watched meanwhile."""


def registry_folder() -> Path:
    """Where this user's engines list themselves."""
    return registry.folder(os.environ)


def sockets(*, known: Container[Path] = ()) -> list[Path]:
    """Of this user's running engines, the one in AGENTSPEED_ENGINE first. Those in `known` are not asked again."""
    found = [entry.socket for entry in registry.running(registry_folder(), known=known)]
    attach = os.environ.get(ATTACH)
    first = [Path(attach).resolve()] if attach else []
    return list(dict.fromkeys([*first, *found]))


@final
class Watcher:
    """One engine watched; `close` it."""

    def __init__(self, path: Path, *, patient: bool = True) -> None:
        """Raises `ConnectFailed` when nobody listens there, or speaks our protocol, or greets in time: soon, unless
        `patient`."""
        self.path = path
        self._socket = open_socket(path)
        self._socket.settimeout(_ANSWER_SECONDS if patient else _SOON_SECONDS)
        self._inbox = bytearray()
        self._request = 0
        try:
            welcome = self._ask(wire.Hello(request=self._number(), client="agentspeed top"))
        except errors.EngineDied as error:
            raise errors.ConnectFailed(f"What listens at {path} did not greet: {error}") from error
        if not isinstance(welcome, wire.Welcome):
            raise errors.InternalError(f"The engine answered a greeting with {type(welcome).__name__}.")
        self._socket.settimeout(_ANSWER_SECONDS)
        self.welcome = welcome

    def look(self, branches: int) -> wire.Picture:
        """At most so many branches described. Raises `EngineDied` when the engine is gone."""
        picture = self._ask(wire.Look(request=self._number(), branches=branches))
        if not isinstance(picture, wire.Picture):
            raise errors.InternalError(f"The engine answered Look with {type(picture).__name__}.")
        return picture

    def close(self) -> None:
        self._socket.close()

    def _number(self) -> int:
        self._request += 1
        return self._request

    def _ask(self, command: wire.Command) -> wire.Outgoing:
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended: its last words may still wait to be read
                self._socket.sendall(wire.encode_command(command))
            while True:
                for message in self._frame():
                    if isinstance(message, wire.Failed):
                        raise self._refusal(message)
                    if not isinstance(message, wire.Event) and message.request == command.request:
                        return message
        except TimeoutError as error:
            self.close()
            raise errors.EngineDied(f"The engine at {self.path} has not answered for {_ANSWER_SECONDS:g} s.",
                                    remedy="It hangs or was stopped; end its process and start another.") from error
        except (OSError, msgspec.DecodeError) as error:
            self.close()
            raise errors.EngineDied(f"The engine at {self.path} ended: {error}.") from error
        except errors.AgentspeedError:
            self.close()
            raise

    def _refusal(self, failed: wire.Failed) -> errors.AgentspeedError:
        """To a watcher an engine that stops, even by a bug of its own, has ended: it is not the watcher's bug."""
        if failed.code in ("bad_frame", "protocol_mismatch"):
            return errors.ConnectFailed(f"The engine at {self.path} cannot be watched: {failed.message}",
                                        remedy="Use the `agentspeed` of the version that the engine has.")
        if failed.request == 0:
            return errors.EngineDied(f"The engine at {self.path} ended: {failed.message}", remedy=failed.remedy)
        return public_error(failed.code, failed.message, failed.remedy)

    def _frame(self) -> tuple[wire.Outgoing, ...]:
        head = self._exactly(4)
        return wire.decode_outbox(self._exactly(int.from_bytes(head, "little")))

    def _exactly(self, count: int) -> bytes:
        while len(self._inbox) < count:
            data = self._socket.recv(1 << 18)
            if not data:
                raise ConnectionResetError("it closed the link")
            self._inbox += data
        taken = bytes(self._inbox[:count])
        del self._inbox[:count]
        return taken
