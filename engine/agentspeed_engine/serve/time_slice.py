"""How long a thread keeps its core while others wait for it: who computes steps lets go for whoever wakes."""

from __future__ import annotations

import ctypes
import platform
import struct
import threading
from typing import Final

_SECONDS: Final = 0.01
"""Of a thread that computes steps. Others have 0.7 to 2.8 ms."""
_CALLS: Final = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""(sched_setattr, sched_getattr) by machine; older C libraries have no names for them."""
_ATTRIBUTES: Final = struct.Struct("<IIQiIQQQII")
"""`struct sched_attr`: size, policy, flags, niceness, real-time priority, the slice in nanoseconds, and more."""
_SLICE: Final = 5


def yields_to_who_wakes() -> None:
    """For the calling thread and the threads that it will start: whoever wakes gets its core at once.

    A thread that wakes does not take a core from one that has a slice as short as its own before that one's slice is
    over, which Linux may notice 4 ms later. Two threads of a step hold two cores for milliseconds, and who waits for
    a core then is the client, for what this engine has just told it. Its share of a core stays the same beside other
    busy processes. Linux knows slices of threads since 6.12; where it does not, nothing changes."""
    attributes = _attributes(0)
    if attributes is None or attributes[1] != 0:  # SCHED_OTHER: what somebody has chosen stays
        return
    given = _ATTRIBUTES.pack(*attributes[:_SLICE], round(1e9 * _SECONDS), *attributes[_SLICE + 1 :])
    _ = ctypes.CDLL(None).syscall(_CALLS[platform.machine()][0], 0, given, 0)


def slice_seconds(thread: threading.Thread) -> float | None:
    """Of a thread that runs; None where Linux does not say."""
    attributes = _attributes(thread.native_id or 0)
    return attributes[_SLICE] / 1e9 if attributes is not None and attributes[_SLICE] else None


def _attributes(number: int) -> tuple[int, ...] | None:
    """Of a thread by its number; 0 is the calling one."""
    if platform.system() != "Linux" or platform.machine() not in _CALLS:
        return None
    read = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if ctypes.CDLL(None).syscall(_CALLS[platform.machine()][1], number, read, _ATTRIBUTES.size, 0):
        return None
    return _ATTRIBUTES.unpack(read.raw)
