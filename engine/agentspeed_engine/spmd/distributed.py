"""One rank's collectives on torch.distributed: the same transitions as `logical`, between real processes."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from agentspeed_engine.spmd.exchange import Routed, Rows, combined, outgoing, received
from agentspeed_engine.spmd.logical import groups, shard_sizes
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import AXES, Axis, Rank
from agentspeed_engine.spmd.plan import Collective


@final
class DistributedComm:
    """Built on every rank of an initialised process group of the mesh's size, in the same order."""

    __slots__ = ("_broken", "_group", "_rank")

    def __init__(
        self,
        rank: Rank,
        *,
        timeout: datetime.timedelta | None = None,
        broken: Callable[[str], Exception] = RuntimeError,
    ) -> None:
        """`timeout`: how long a collective waits for a rank; None: as long as torch does, which is not what the default
        group was given. `broken`: what is raised where the ranks do not come together."""
        self._rank, self._broken = rank, broken
        self._group: dict[Axis, dist.ProcessGroup] = {}
        for axis in AXES:
            for members in groups(rank.mesh, axis):
                # Every rank takes part in making every group, also in those it is not a member of.
                made = dist.new_group(members, timeout=timeout)
                if rank.index in members:
                    assert isinstance(made, dist.ProcessGroup)
                    self._group[axis] = made

    def apply(self, step: Collective, value: Any, tokens_per_rank: Sequence[int]) -> Any:
        """Shards of tokens may be uneven or empty; their sizes come from the step."""
        if step.kind == "dispatch":
            return self._dispatched(step.axis, value)
        if step.kind == "combine":
            return self._combined(step.axis, value)
        if step.kind == "slice":
            return self._mine(step, value, tokens_per_rank)
        if step.kind == "all_gather":
            return self._gathered(step, value, tokens_per_rank)
        total = value.contiguous().clone()
        self._sum(total, step.axis)
        # Uneven shards have no reduce-scatter in gloo: the sum is cut afterwards.
        return total if step.kind == "all_reduce" else self._mine(step, total, tokens_per_rank)

    def sum_call(
        self,
        step: Collective,
        module: Module[Any],
        x: Tensor,
        residual: Tensor | None,
        state: Any,
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """The sum is made where the value lies, without a copy. The first of a chain becomes the residual itself and
        has to outlive the memory that it may lie in."""
        if residual is None or not x.is_contiguous():
            total = self.apply(step, x, sizes)
        else:
            total = x
            self._sum(total, step.axis)
        found: tuple[Tensor, Tensor] = module(total, residual, state)
        return found

    def _sum(self, value: Tensor, axis: Axis) -> None:
        with self._together():
            dist.all_reduce(value, group=self._group[axis])

    def _exchange(
        self, into: Tensor, given: Tensor, axis: Axis, coming: list[int] | None = None, going: list[int] | None = None
    ) -> None:
        """`coming` from each rank and `going` to each: rows; None: as many for all."""
        with self._together():
            dist.all_to_all_single(into, given, coming, going, group=self._group[axis])

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around the meetings alone: what else goes wrong in a step is no lost rank."""
        try:
            yield
        except RuntimeError as error:
            raise self._broken(str(error)) from error

    def _dispatched(self, axis: Axis, value: Routed) -> Routed:
        """Rows travel with their choices in one message to each rank; before it go their numbers."""
        sent = [_packed(rows) for rows in outgoing(value)]
        counts = torch.tensor([len(rows) for rows in sent], device=value.x.device)
        coming = torch.empty_like(counts)
        self._exchange(coming, counts, axis)
        sizes = coming.tolist()
        arrived = sent[0].new_empty(sum(sizes), sent[0].shape[1])
        self._exchange(arrived, torch.cat(sent), axis, sizes, [len(rows) for rows in sent])
        return received(value, [_unpacked(rows, value) for rows in torch.split(arrived, sizes)])

    def _combined(self, axis: Axis, value: Routed) -> Tensor:
        coming = [len(index) for index in value.sends]
        arrived = value.x.new_empty(sum(coming), value.x.shape[1])
        self._exchange(arrived, value.x.contiguous(), axis, coming, list(value.counts))
        return combined(value, torch.split(arrived, coming))

    def _mine(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        sizes = shard_sizes(value.shape[step.dim], self._extent(step.axis), step.dim, tokens_per_rank)
        return torch.split(value, sizes, dim=step.dim)[self._index(step.axis)].contiguous()

    def _gathered(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        """Every piece is padded to the largest: gloo gathers equal shapes only."""
        extent = self._extent(step.axis)
        sizes = shard_sizes(value.shape[step.dim] * extent, extent, step.dim, tokens_per_rank)
        padded_shape = list(value.shape)
        padded_shape[step.dim] = max(sizes)
        padded = value.new_zeros(padded_shape)
        padded.narrow(step.dim, 0, value.shape[step.dim]).copy_(value)
        pieces = [torch.empty_like(padded) for _ in sizes]
        with self._together():
            dist.all_gather(pieces, padded, group=self._group[step.axis])
        return torch.cat(
            [piece.narrow(step.dim, 0, size) for piece, size in zip(pieces, sizes, strict=True)], dim=step.dim
        )

    def _extent(self, axis: Axis) -> int:
        return self._rank.mesh.extent(axis)

    def _index(self, axis: Axis) -> int:
        return self._rank.dp if axis == "dp" else self._rank.tp


def _packed(rows: Rows) -> Tensor:
    """[N, bytes] of rows, the experts they chose, and their weights."""
    x, places, weights = rows
    parts = (x.contiguous(), places.to(torch.int32).contiguous(), weights.contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1)


def _unpacked(data: Tensor, like: Routed) -> Rows:
    """Of `_packed`, in the formats of `like`."""
    kinds = [
        (like.x.dtype, like.x.shape[1]),
        (torch.int32, like.places.shape[1]),
        (like.weights.dtype, like.weights.shape[1]),
    ]
    x, places, weights = (
        part.clone(memory_format=torch.contiguous_format).view(dtype)  # which aligns it
        for part, (dtype, _) in zip(
            torch.split(data, [dtype.itemsize * width for dtype, width in kinds], dim=1), kinds, strict=True
        )
    )
    return x, places.to(torch.int64), weights
