"""How much memory this process may use: the machine's, or less where its container says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import final

_GROUPS = Path("sys/fs/cgroup")


@final
@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The bytes, and who sets them: "the machine", "this container" or a GPU."""

    bytes: int
    owner: str
    idle: bool = False
    """Whether the memory lies idle, as what is free of a GPU does: a pool may take most of it."""


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """The least of the machine's memory and the limits of all control groups around this process (both versions).

    `root` is where `proc` and `sys` are found.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    least = min(_group_limits(root), default=machine)
    return MemoryLimit(least, "this container") if least < machine else MemoryLimit(machine, "the machine")


def _group_limits(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            yield from _upwards(root / _GROUPS, path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(root / _GROUPS / "memory", path, "memory.limit_in_bytes")


def _upwards(top: Path, path: str, name: str) -> Iterator[int]:
    """A group may use what it and every group around it may. Inside a container the path may be one of the host's,
    which is not there; the container's own limit then stands at the top."""
    inner = PurePosixPath(path.lstrip("/"))
    for group in (inner, *inner.parents):
        limit = _text(top / group / name).strip()
        if limit.isdecimal():  # "max" is none
            yield int(limit)


def _text(path: Path) -> str:
    """Empty where the kernel has no such file for this process."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
