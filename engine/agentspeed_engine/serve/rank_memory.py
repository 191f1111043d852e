"""The memory that ranks of one machine share: a file for those of each dp rank, and where dp ranks are in lock-step one
for those that have the same place on all of them."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, final

from agentspeed_engine.serve.rank_options import Files, RankOptions
from agentspeed_kernels.cpu.group_layout import shared_bytes

if TYPE_CHECKING:
    from agentspeed_kernels.cpu.process_group import SharedGroup


@final
class RankMemory:
    """Rank 0's process makes it before anything is loaded."""

    def __init__(self, options: RankOptions) -> None:
        """Raises `OSError`."""
        self._options = options
        self._tp: list[int] = []
        self._dp: list[int] = []
        self._groups: dict[int, SharedGroup] = {}
        try:
            if options.tp > 1:
                for _ in range(options.dp):
                    self._tp.append(_file(options.tp))
            if options.lock_step:
                for _ in range(options.tp):
                    self._dp.append(_file(options.dp))
        except BaseException:
            self.close()
            raise

    def files(self, rank: int) -> Files:
        dp, tp = divmod(rank, self._options.tp)
        return Files(self._tp[dp] if self._tp else None, self._dp[tp] if self._dp else None)

    def waited(self, rank: int) -> float:
        """Seconds that a rank has waited for others. The C library is there, since the ranks use it."""
        dp, tp = divmod(rank, self._options.tp)
        files = self.files(rank)
        return sum(
            self._group(file, extent).waited(place)
            for file, extent, place in ((files.tp, self._options.tp, tp), (files.dp, self._options.dp, dp))
            if file is not None
        )

    def close(self) -> None:
        for file in (*self._tp, *self._dp):
            with contextlib.suppress(OSError):
                os.close(file)
        self._tp, self._dp = [], []

    def _group(self, file: int, extent: int) -> SharedGroup:
        if file not in self._groups:
            # Imported late, with the tensors that it is for.
            from agentspeed_kernels.cpu.process_group import SharedGroup

            self._groups[file] = SharedGroup(file, 0, extent, seconds=self._options.seconds)
        return self._groups[file]


def memory_of(options: RankOptions) -> RankMemory | None:
    """None where ranks share none. Raises `OSError`."""
    if options.device != "cpu" or not hasattr(os, "memfd_create"):
        return None
    return RankMemory(options)


def _file(extent: int) -> int:
    """Of zeros."""
    file = os.memfd_create("agentspeed-ranks")
    os.truncate(file, shared_bytes(extent))
    return file
