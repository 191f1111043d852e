"""How ranks sum and gather: through shared memory on one machine's CPU, else through torch.distributed (gloo, NCCL)."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.spmd.distributed import DistributedComm
from agentspeed_engine.spmd.logical import shard_sizes
from agentspeed_engine.spmd.lower import Comm
from agentspeed_engine.spmd.placement import Rank
from agentspeed_engine.spmd.plan import Collective
from agentspeed_kernels.cpu.process_group import GroupBroken, SharedGroup

__all__ = ["Group", "GroupBroken", "SharedMemory", "TorchGroup"]
_MEETING: Final = datetime.timedelta(seconds=120)
"""How long ranks wait for each other at the start, where each has to import torch first."""


class Group(Protocol):
    """One rank's side. One thread of each rank uses it, and all ranks in the same order; `abandon` may be called from
    any thread."""

    @property
    def comm(self) -> Comm:
        """The collectives of its plan."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether its collectives may be part of a recorded step."""
        ...

    def gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        """[ranks, *mine.shape]: what every rank gave. Raises `GroupBroken`."""
        ...

    def abandon(self) -> None:
        """Ranks that wait for others give up soon."""
        ...

    def close(self) -> None:
        """Gives back what the process has for it. Nobody uses it any more."""
        ...

    def waited(self, rank: int) -> float | None:
        """Seconds that a rank has waited for others; None where nobody counts them."""
        ...


@final
class SharedMemory:
    """`Group` of the ranks of one machine, in the memory of a file that all of them have mapped."""

    recordable = True

    def __init__(self, file: int, rank: Rank, *, seconds: float) -> None:
        """Raises `OSError` where the C library cannot be had."""
        self._group = SharedGroup(file, rank.index, rank.mesh.size, seconds=seconds)
        self.comm: Comm = _SharedComm(self._group)

    def gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._group.gather(mine)

    def abandon(self) -> None:
        self._group.abandon()

    def close(self) -> None:
        """The memory goes with the last tensor in it."""

    def waited(self, rank: int) -> float | None:
        return self._group.waited(rank)


@final
class _SharedComm:
    """`spmd.lower.Comm` for a mesh of one axis: all its ranks are one group."""

    def __init__(self, group: SharedGroup) -> None:
        self._group = group

    def apply(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        """A sum is made in place: nobody needs a rank's own part afterwards."""
        if step.kind == "slice":
            return self._mine(step, value, tokens_per_rank)
        if step.kind == "all_gather":
            pieces = self._group.gather(value.contiguous().view(torch.uint8).numpy())
            return torch.cat([torch.from_numpy(one).view(value.dtype) for one in pieces], dim=step.dim)
        total = value.contiguous()
        self._group.sum(total)
        return total if step.kind == "all_reduce" else self._mine(step, total, tokens_per_rank)

    def _mine(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        sizes = shard_sizes(value.shape[step.dim], self._group.ranks, step.dim, tokens_per_rank)
        return torch.split(value, sizes, dim=step.dim)[self._group.rank].contiguous()


@final
class TorchGroup:
    """`Group` over torch.distributed: gloo on CPUs, NCCL on GPUs, and gloo for what is drawn in either case."""

    recordable = False

    def __init__(self, folder: Path, rank: Rank, *, seconds: float, device: torch.device) -> None:
        """Returns when all ranks have met in `folder`. `seconds`: how long one waits for another from then on. Raises
        `RuntimeError` where they do not meet, `EngineFault` (bad_options) in a process that has a group already."""
        if dist.is_initialized():
            raise EngineFault(
                "bad_options",
                "This process has a default group of torch.distributed already, and the ranks need it.",
                "Call `torch.distributed.destroy_process_group()` first, or start the engine as a process of its own.",
            )
        self._ranks = rank.mesh.size
        limit = datetime.timedelta(seconds=seconds)
        if sys.platform == "linux":  # nobody beyond this machine is to reach a rank
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank.index,
            world_size=rank.mesh.size,
            timeout=_MEETING,
        )
        try:
            self.comm: Comm = DistributedComm(rank, timeout=limit, broken=GroupBroken)
            self._host: Any = dist.new_group(backend="gloo", timeout=limit)
        except BaseException:
            self.close()
            raise

    def gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        own = torch.from_numpy(np.ascontiguousarray(mine))
        every = [torch.empty_like(own) for _ in range(self._ranks)]
        try:
            if mine.size:
                dist.all_gather(every, own, group=self._host)
            else:
                dist.barrier(group=self._host)
        except RuntimeError as error:
            raise GroupBroken(str(error)) from error
        return torch.stack(every).numpy()

    def abandon(self) -> None:
        """Peers notice by themselves: a connection that ends, or the time limit."""

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def waited(self, rank: int) -> float | None:
        del rank
        return None
