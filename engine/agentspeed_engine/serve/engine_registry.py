"""Where running engines of one user write down that they run, so that `agentspeed top` finds them.

One JSON file per process in a folder that only its owner can write. A killed engine leaves its file behind; whoever
reads the folder and finds nobody at the socket takes it away. Nothing else in the folder is touched: an entry is named
by its process and its socket, and says the same inside.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

FOLDER = "AGENTSPEED_RUNTIME_DIR"
"""Environment variable: the folder to use instead of the user's runtime folder."""

T = TypeVar("T")
_TRIES = 8
_PROBE_SECONDS = 1.0
_DRAFT = re.compile(r"\d+-[0-9a-f]{8}\.new")
_DRAFT_SECONDS = 60.0
"""A draft this old is a killed engine's: it is a file for a moment only."""


@final
@dataclass(frozen=True, slots=True)
class RunningEngine:
    """One engine that said it runs."""

    pid: int
    socket: Path
    model: str


def folder(environment: Mapping[str, str]) -> Path:
    """Of this user: in the system's runtime folder where there is one, else beside the temporary files."""
    if environment.get(FOLDER):
        return Path(environment[FOLDER])
    if environment.get("XDG_RUNTIME_DIR"):
        return Path(environment["XDG_RUNTIME_DIR"]) / "agentspeed"
    return Path(tempfile.gettempdir()) / f"agentspeed-{os.getuid()}"


@contextlib.contextmanager
def entered(place: Path, entry: RunningEngine) -> Iterator[None]:
    """Listed while the block runs. Raises `OSError` when the folder cannot be used or belongs to another user."""
    path = in_place(place, lambda: _written(place, entry))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        leave(place)


def in_place(place: Path, make: Callable[[], T]) -> T:
    """What `make` puts into the folder, which is made where there is none. Who leaves it empty may remove it before
    anything is there (`leave`): then it is made again. Raises `OSError`."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not ours(place):
                raise PermissionError(f"{place} belongs to somebody else, or others may write there")
            return make()
    return make()


def leave(place: Path) -> None:
    """Removes the folder when nothing is in it any more, but for one that the user has named."""
    named = os.environ.get(FOLDER)
    if not named or Path(named) != place:
        with contextlib.suppress(OSError):  # others are in it, or it is gone
            place.rmdir()


def _written(place: Path, entry: RunningEngine) -> Path:
    address = str(entry.socket.resolve())
    path = place / _name(entry.pid, address)
    draft = path.with_suffix(".new")
    said = json.dumps({"pid": entry.pid, "socket": address, "model": entry.model})
    _ = draft.write_text(said, encoding="utf-8")
    return draft.replace(path)  # a reader finds a whole entry or none


def running(place: Path, *, known: Container[Path] = ()) -> list[RunningEngine]:
    """Engines that answer at their sockets, lowest process number first; entries that nobody answers for are removed.

    Sockets in `known` are not asked. Files that are no entries are left alone."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return _running(place, known) if ours(place) else []
    return []


def _running(place: Path, known: Container[Path]) -> list[RunningEngine]:
    found: list[RunningEngine] = []
    for path in place.glob("*.json"):
        entry = _read(path)
        if entry is None:
            continue
        if entry.socket in known or answers(entry.socket):
            found.append(entry)
        else:
            path.unlink(missing_ok=True)
    _sweep_drafts(place)
    return sorted(found, key=lambda entry: entry.pid)


def answers(path: Path) -> bool:
    """Whether a process listens there, even if it is too busy to answer now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            return False
    return True


def ours(place: Path) -> bool:
    """Raises `OSError` when it is gone."""
    facts = place.stat()
    return facts.st_uid == os.getuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _name(pid: int, address: str) -> str:
    """Process numbers repeat across containers that share a folder; sockets do not."""
    return f"{pid}-{zlib.crc32(os.fsencode(address)):08x}.json"


def _read(path: Path) -> RunningEngine | None:
    """None for what is no entry, or is gone meanwhile."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entry = RunningEngine(int(data["pid"]), Path(data["socket"]), str(data["model"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if path.name == _name(entry.pid, str(entry.socket)) else None


def _sweep_drafts(place: Path) -> None:
    for path in place.glob("*.new"):
        if _DRAFT.fullmatch(path.name):
            with contextlib.suppress(OSError):  # it became an entry meanwhile
                if time.time() - path.stat().st_mtime > _DRAFT_SECONDS:
                    path.unlink()
