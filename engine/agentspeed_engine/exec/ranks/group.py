"""How ranks sum and gather: in shared memory on one machine's CPU, in each other's on its GPUs, else by torch."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from agentspeed_engine.errors import EngineFault
from agentspeed_engine.spmd.distributed import DistributedComm
from agentspeed_engine.spmd.logical import groups, shard_sizes
from agentspeed_engine.spmd.lower import Comm
from agentspeed_engine.spmd.peer_comm import PeerComm
from agentspeed_engine.spmd.placement import Axis, Rank
from agentspeed_engine.spmd.plan import Collective
from agentspeed_kernels.cpu.process_group import GroupBroken, SharedGroup

if TYPE_CHECKING:
    from agentspeed_kernels.triton.peers import PeerMemory

__all__ = ["Alone", "Group", "GroupBroken", "SharedMemory", "TorchGroup"]
_MEETING: Final = datetime.timedelta(seconds=120)
"""How long ranks wait for each other at the start: rank 0 comes last, when all others have imported torch."""


class Group(Protocol):
    """One rank's side: of the ranks that compute with it, and among them those of its dp rank, which draw together. One
    thread of each rank uses it, and all ranks in the same order; `abandon` may be called from any thread."""

    @property
    def comm(self) -> Comm | None:
        """The collectives of its plan; None where it has none."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether its collectives may be part of a recorded step or, on a GPU, of a graph."""
        ...

    def agree(self, mine: bool) -> bool:
        """Whether all ranks of this dp rank say so. Raises `GroupBroken`."""
        ...

    @property
    def given_up(self) -> bool:
        """Whether what the ranks computed last may be of no use, because somebody did not come to a sum in it."""
        ...

    @property
    def late(self) -> int | None:
        """The rank that did not come then, where that is known."""
        ...

    def gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        """[ranks, *mine.shape]: what every rank of this dp rank gave. Raises `GroupBroken`."""
        ...

    def abandon(self) -> None:
        """Ranks that wait for others give up soon."""
        ...

    def close(self) -> None:
        """Gives back what the process has for it. Nobody uses it any more."""
        ...


@final
class Alone:
    """`Group` of one rank, whose plan has no collectives."""

    recordable = True
    comm = None
    given_up = False
    late = None

    def agree(self, mine: bool) -> bool:
        return mine

    def gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        return mine[None]

    def abandon(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """It has nothing."""


@final
class SharedMemory:
    """`Group` of the ranks of one machine, in the memory of files that all of them have mapped."""

    given_up = False
    late = None
    """Sums end before a step does here, and say so themselves."""

    def __init__(
        self, file: int | None, rank: Rank, *, seconds: float, dp_file: int | None = None, first: int = 0
    ) -> None:
        """`file`: of the ranks that share this one's dp rank; None where it is the only one. `dp_file`: of those that
        have its place on the others, where dp ranks are in lock-step. `first`: what the first rank of the mesh is
        called. Raises `OSError` where the C library cannot be had."""
        mesh = rank.mesh
        self._groups: dict[Axis, SharedGroup] = {}
        if file is not None:
            names = range(first + rank.dp * mesh.tp, first + (rank.dp + 1) * mesh.tp)
            self._groups["tp"] = SharedGroup(file, rank.tp, mesh.tp, seconds=seconds, names=names)
        if dp_file is not None:
            names = range(first + rank.tp, first + mesh.size, mesh.tp)
            self._groups["dp"] = SharedGroup(dp_file, rank.dp, mesh.dp, seconds=seconds, names=names)
        self.recordable = mesh.dp == 1
        """Shapes of steps in lock-step are not those of a rank's own rows."""
        self.comm: Comm | None = _SharedComm(self._groups)

    def gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._groups["tp"].gather(mine) if "tp" in self._groups else mine[None]

    def agree(self, mine: bool) -> bool:
        return bool(self.gather(np.array([float(mine)])).all())

    def abandon(self) -> None:
        for group in self._groups.values():
            group.abandon()

    def close(self) -> None:
        """The memory goes with the last tensor in it."""


@final
class _SharedComm:
    """`spmd.lower.Comm` over the groups that a rank is in, one an axis."""

    def __init__(self, groups: Mapping[Axis, SharedGroup]) -> None:
        self._groups = groups

    def apply(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        """A sum is made in place: nobody needs a rank's own part afterwards. Shards of tokens may be uneven or empty;
        their sizes come from the step."""
        if step.kind == "slice":
            return self._mine(step, value, tokens_per_rank)
        if step.kind == "all_gather":
            return self._gathered(step, value, tokens_per_rank)
        total = value.contiguous()
        self._groups[step.axis].sum(total)
        return total if step.kind == "all_reduce" else self._mine(step, total, tokens_per_rank)

    def _gathered(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        """Every piece is padded to the largest."""
        group, extent = self._groups[step.axis], value.shape[step.dim]
        sizes = shard_sizes(extent * group.ranks, group.ranks, step.dim, tokens_per_rank)
        if extent < max(sizes):
            shape = list(value.shape)
            shape[step.dim] = max(sizes)
            padded = value.new_zeros(shape)
            padded.narrow(step.dim, 0, extent).copy_(value)
            value = padded
        pieces = group.gather(value.contiguous().view(torch.uint8).numpy())
        if not pieces.size:  # there is nothing whose bytes could be read in another format
            return torch.cat([value] * group.ranks, dim=step.dim)
        whole = [torch.from_numpy(one).view(value.dtype) for one in pieces]
        return torch.cat([one.narrow(step.dim, 0, size) for one, size in zip(whole, sizes, strict=True)], dim=step.dim)

    def _mine(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        group = self._groups[step.axis]
        sizes = shard_sizes(value.shape[step.dim], group.ranks, step.dim, tokens_per_rank)
        return torch.split(value, sizes, dim=step.dim)[group.rank].contiguous()


@final
class TorchGroup:
    """`Group` over torch.distributed: gloo on CPUs, NCCL on GPUs, and gloo for what is drawn in either case. GPUs of
    one dp rank that reach each other's memory sum there what is small (`reach`)."""

    def __init__(self, folder: Path, rank: Rank, *, seconds: float, device: torch.device) -> None:
        """Returns when all ranks have met in `folder`. `seconds`: how long one waits for another from then on. Raises
        `RuntimeError` where they do not meet, `EngineFault` (bad_options) in a process that has a group already."""
        if dist.is_initialized():
            raise EngineFault(
                "bad_options",
                "This process has a default group of torch.distributed already, and the ranks need it.",
                "Call `torch.distributed.destroy_process_group()` first, or start the engine as a process of its own.",
            )
        self._rank, self._ranks = rank, rank.mesh.tp
        self._seconds, self._device = seconds, device
        self._memory: PeerMemory | None = None
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
            self._anything = DistributedComm(rank, timeout=limit, broken=GroupBroken)
            self.comm: Comm | None = self._anything
            self._host: Any = None
            for members in groups(rank.mesh, "tp"):
                made: Any = dist.new_group(members, backend="gloo", timeout=limit)
                if rank.index in members:
                    self._host = made
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

    @property
    def recordable(self) -> bool:
        return self._memory is not None

    def reach(self, *, sum_bytes: int, rows: int, row_bytes: int) -> str | None:
        """From now on sums of up to `sum_bytes`, and gathers of up to `rows` of `row_bytes` in all, are made in memory
        that all GPUs write; None where it is so, else why not, on all ranks alike. Raises `GroupBroken`."""
        mesh = self._rank.mesh
        if self._device.type != "cuda" or mesh.dp > 1:
            return "that is for GPUs of one dp rank"
        # Imported late: only a GPU's kernels need it.
        from agentspeed_kernels.triton.peers import PeerMemory, reached

        held: PeerMemory | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            held = PeerMemory(self._rank.tp, mesh.tp, self._device, sum_bytes=sum_bytes, rows=rows, row_bytes=row_bytes)
        if not self.agree(held is not None) or held is None:
            return "there is no memory for it"
        with contextlib.ExitStack() as opened:
            opened.callback(held.close)
            why = reached(held, self._bytes, self._seconds)
            if why is None:
                self._memory, self.comm = held, PeerComm(held, self._anything)
                _ = opened.pop_all()
        return why

    def agree(self, mine: bool) -> bool:
        return bool(self.gather(np.array([float(mine)])).all())

    def _bytes(self, mine: bytes) -> list[bytes]:
        given = np.frombuffer(mine, np.uint8).astype(np.float64)
        return [one.astype(np.uint8).tobytes() for one in self.gather(given)]

    @property
    def given_up(self) -> bool:
        return self._memory is not None and self._memory.given_up

    @property
    def late(self) -> int | None:
        return None if self._memory is None else self._memory.late

    def abandon(self) -> None:
        """Of the others peers notice by themselves: a connection that ends, or the time limit."""
        if self._memory is not None:
            self._memory.give_up()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()  # which ends what waits on a GPU for ranks that are gone
        if self._memory is not None:
            self._memory.close()
            self._memory = None
