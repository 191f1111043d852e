"""Ranks on one machine that sum and gather through shared memory: a few microseconds where sockets take a hundred."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_kernels.cpu import native, recording
from agentspeed_kernels.cpu.group_layout import SLOT_BYTES, shared_bytes
from agentspeed_kernels.cpu.native import L, N, P

_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
"""As in native_group.c."""
_SUM = (P, N, N, L, P, L, N, L)
_ABANDONED, _DIFFER, _LATE = 1, 2, 3


class GroupBroken(Exception):
    """The ranks did not come together; the group is of no use any more."""

    def __init__(self, said: str, late: int | None = None) -> None:
        super().__init__(said)
        self.late = late
        """The rank that did not come in time, if that was it."""


@final
class SharedGroup:
    """One rank's side. All ranks make the same calls in the same order; one thread of each makes them."""

    def __init__(self, file: int, rank: int, ranks: int, *, seconds: float, names: Sequence[int] | None = None) -> None:
        """`file`: descriptor of `shared_bytes`, the same file on every rank. `seconds`: how long a rank waits for
        another. `names`: what the ranks are called, where the group is one of several; None: by their number in it.
        Raises `OSError` where the C library cannot be had."""
        self._library = _opened()
        self._names = range(ranks) if names is None else tuple(names)
        self.rank, self.ranks = rank, ranks
        assert self._library.agentspeed_group_bytes(ranks, SLOT_BYTES) == shared_bytes(ranks)
        self._milliseconds = max(1, int(seconds * 1000))
        self._memory = mmap.mmap(file, shared_bytes(ranks))
        self._at = np.frombuffer(self._memory, dtype=np.uint8).ctypes.data
        self._functions = {"group_sum": _sum(self._library)}

    def sum(self, value: Tensor) -> None:
        """Adds up every rank's `value`, in place: contiguous, of one shape on all ranks, in float32, float64 or
        bfloat16. All get the same bits. Raises `GroupBroken`."""
        given = (self._at, self.rank, self.ranks, SLOT_BYTES, value.data_ptr(), value.numel(), _KINDS[value.dtype],
                 self._milliseconds)  # fmt: skip
        recording.call(self._functions, "group_sum", (value, self._memory), *given)
        self.check()

    def gather(self, mine: NDArray[Any]) -> NDArray[Any]:
        """[ranks, *mine.shape]: what every rank gave, all of one shape and dtype. Returns when all have come, also
        where nothing is given. Raises `GroupBroken`."""
        held = np.ascontiguousarray(mine)
        every = np.empty((self.ranks, *held.shape), held.dtype)
        answer = self._library.agentspeed_group_gather(
            self._at, self.rank, self.ranks, SLOT_BYTES, held.ctypes.data, every.ctypes.data, held.nbytes,
            self._milliseconds,
        )  # fmt: skip
        if answer:
            raise self._broken(answer)
        return every

    def check(self) -> None:
        """Raises `GroupBroken` where a sum went wrong, also one within a recorded step."""
        if why := self._library.agentspeed_group_broken(self._at):
            raise self._broken(why)

    def abandon(self) -> None:
        """Whoever waits for others gives up, on every rank and soon."""
        self._library.agentspeed_group_abandon(self._at)

    def waited(self, rank: int) -> float:
        """Seconds that a rank has waited for others."""
        return float(self._library.agentspeed_group_waited(self._at, rank))

    def _broken(self, why: int) -> GroupBroken:
        if why == _ABANDONED:
            return GroupBroken("a rank gave up")
        if why == _DIFFER:
            return GroupBroken("the ranks came together for different things: a bug")
        late = self._names[why - _LATE]
        return GroupBroken(f"rank {late} did not come in time", late)


def _opened() -> ctypes.CDLL:
    found = native.library()
    if isinstance(found, native.Unavailable):
        raise OSError(found.reason)
    opened = ctypes.CDLL(str(found.path))
    opened.agentspeed_group_bytes.argtypes, opened.agentspeed_group_bytes.restype = (N, L), L
    opened.agentspeed_group_sum.argtypes, opened.agentspeed_group_sum.restype = _SUM, N
    opened.agentspeed_group_gather.argtypes = (P, N, N, L, P, P, L, L)
    opened.agentspeed_group_gather.restype = N
    opened.agentspeed_group_abandon.argtypes, opened.agentspeed_group_abandon.restype = (P,), None
    opened.agentspeed_group_broken.argtypes, opened.agentspeed_group_broken.restype = (P,), N
    opened.agentspeed_group_waited.argtypes, opened.agentspeed_group_waited.restype = (P, N), ctypes.c_double
    return opened


def _sum(opened: ctypes.CDLL) -> native.Function:
    entry = ctypes.cast(opened.agentspeed_group_sum_entry, P).value
    assert entry is not None
    return native.Function(opened.agentspeed_group_sum, _SUM, entry)
