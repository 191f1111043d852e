"""A folder for the socket of one engine process: short enough for a socket's path, private, and gone after any end.

The folder is locked for as long as its maker or the engine lives, whichever is longer: both hold the same open file.
Making a folder removes those that no process holds any more: so the last trace of two killed processes goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from agentspeed.errors import EngineStartFailed

_PREFIX: Final = "engine-"
_SOCKET: Final = "engine.sock"
_LONGEST: Final = 103 if sys.platform == "darwin" else 107
"""Bytes of a socket's path: `sun_path` without its final zero."""
_RANDOM_CHARACTERS: Final = 8
"""That `mkdtemp` puts behind the prefix."""


@final
class SocketFolder:
    """Made at construction. `descriptor` is to be inherited by the engine."""

    def __init__(self) -> None:
        """Raises `EngineStartFailed` when there is no place for one."""
        self.path, self.descriptor = _made()
        self.socket = self.path / _SOCKET

    def remove(self) -> None:
        """After the engine has ended. The folder around it goes too when nobody else has one there."""
        from agentspeed_engine.serve.engine_registry import leave

        shutil.rmtree(self.path, ignore_errors=True)
        leave(self.path.parent)
        self.let_go()

    def let_go(self) -> None:
        """Gives up this process's hold, and nothing of the folder."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _made() -> tuple[Path, int]:
    refused: list[str] = []
    for place in dict.fromkeys(_places()):
        if len(os.fsencode(place / f"{_PREFIX}{'x' * _RANDOM_CHARACTERS}" / _SOCKET)) > _LONGEST:
            refused.append(f"{place} is too long for a socket's path ({_LONGEST} bytes)")
            continue
        try:
            return _made_in(place)
        except OSError as error:
            refused.append(f"{place} cannot be used: {error}")
    raise EngineStartFailed(
        f"There is no folder for an engine's socket: {'; '.join(refused)}.",
        remedy="Set AGENTSPEED_RUNTIME_DIR to a folder of yours with a short path.",
    )


def _places() -> Iterator[Path]:
    """The user's runtime folder; where that has too long a path, or cannot be used, one beside temporary files."""
    from agentspeed_engine.serve.engine_registry import folder  # late: `import agentspeed` needs the protocol alone

    yield folder(os.environ)
    for shared in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        yield Path(shared) / f"agentspeed-{os.getuid()}"


def _made_in(place: Path) -> tuple[Path, int]:
    """Raises `OSError`."""
    from agentspeed_engine.serve.engine_registry import in_place

    return in_place(place, lambda: _made_here(place))


def _made_here(place: Path) -> tuple[Path, int]:
    with _locked(place, fcntl.LOCK_EX):  # no other process sweeps between the making and the locking
        _sweep(place)
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return path, descriptor


def _sweep(place: Path) -> None:
    for path in place.glob(f"{_PREFIX}{'?' * _RANDOM_CHARACTERS}"):
        with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):  # else a process holds it
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
