"""Crash recordings: every engine process makes one, and only those of engines that ended badly stay.

An engine holds a lock on its recording's folder for as long as it lives, so a reader can tell what is left of a
dead one from what a living one writes, whatever the process numbers say.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from agentspeed_engine.sched.recorder import FLIGHT

FOLDER: Final = "AGENTSPEED_STATE_DIR"
"""Environment variable: the folder to use instead of the user's state folder."""
KEPT: Final = 4
"""Recordings of dead engines that a new engine leaves; older ones go. One that a person renamed is kept."""
_NAME: Final = re.compile(rf"\d{{8}}-\d{{6}}-\d+-[0-9a-f]{{4}}{re.escape(FLIGHT)}")


def folder(environment: Mapping[str, str]) -> Path | None:
    """Of this user: below the state folder of the XDG base directory specification. None for a user without a home."""
    if environment.get(FOLDER):
        return Path(environment[FOLDER]) / "crashes"
    if environment.get("XDG_STATE_HOME"):
        return Path(environment["XDG_STATE_HOME"]) / "agentspeed" / "crashes"
    try:
        return Path.home() / ".local" / "state" / "agentspeed" / "crashes"
    except RuntimeError:
        return None


@contextlib.contextmanager
def room(place: Path) -> Iterator[None]:
    """Makes room for one more recording, which the block begins and holds. One engine at a time. Raises `OSError`."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open(place) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for path in [path for path in left(place) if _NAME.fullmatch(path.name)][:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)
        yield


def hold(path: Path) -> int:
    """Marks the recording as a living engine's until the process ends or the descriptor is closed."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def left(place: Path) -> list[Path]:
    """What dead engines left there, oldest first."""
    found: list[tuple[float, Path]] = []
    for path in place.glob(f"*{FLIGHT}"):
        with contextlib.suppress(OSError):  # another engine's clearing up, or a lock that is held
            with _open(path) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
