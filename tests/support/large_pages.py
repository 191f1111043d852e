"""What the kernel says of this process's memory and of the pages that it lies in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_ASKED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NEEDS_LARGE_PAGES = pytest.mark.skipif(
    sys.platform != "linux" or not _ASKED.exists() or "[never]" in _ASKED.read_text(),
    reason="the kernel gives no large pages",
)


def mapped(address: int) -> dict[str, str]:
    """What the kernel says of the mapping around an address; nothing where there is none."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, rest = line.split(maxsplit=1)
        if name.endswith(":"):
            if inside:
                found[name[:-1]] = rest
            continue
        begin, end = (int(part, 16) for part in name.split("-"))
        inside = begin <= address < end
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    said = Path("/proc/self/statm").read_text().split()
    return int(said[1]) * os.sysconf("SC_PAGE_SIZE")


def advised(address: int) -> bool:
    """Whether large pages were asked for there."""
    return "hg" in mapped(address)["VmFlags"].split()


def in_large() -> int:
    """Bytes of this process that lie in large pages."""
    rolled = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in rolled if line.startswith("AnonHugePages:"))
