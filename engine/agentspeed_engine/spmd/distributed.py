"""One rank's collectives on torch.distributed: the same transitions as `logical`, between real processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from agentspeed_engine.spmd.logical import groups, shard_sizes
from agentspeed_engine.spmd.placement import AXES, Axis, Rank
from agentspeed_engine.spmd.plan import Collective


@final
class DistributedComm:
    """Built on every rank of an initialised process group of the mesh's size, in the same order."""

    __slots__ = ("_group", "_rank")

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._group: dict[Axis, dist.ProcessGroup] = {}
        for axis in AXES:
            for members in groups(rank.mesh, axis):
                # Every rank takes part in making every group, also in those it is not a member of.
                made = dist.new_group(members)
                if rank.index in members:
                    assert isinstance(made, dist.ProcessGroup)
                    self._group[axis] = made

    def apply(self, step: Collective, value: Tensor, tokens_per_rank: Sequence[int]) -> Tensor:
        """Shards of tokens may be uneven or empty; their sizes come from the step."""
        if step.kind == "slice":
            return self._mine(step, value, tokens_per_rank)
        if step.kind == "all_gather":
            return self._gathered(step, value, tokens_per_rank)
        total = value.contiguous().clone()
        dist.all_reduce(total, group=self._group[step.axis])
        # Uneven shards have no reduce-scatter in gloo: the sum is cut afterwards.
        return total if step.kind == "all_reduce" else self._mine(step, total, tokens_per_rank)

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
        dist.all_gather(pieces, padded, group=self._group[step.axis])
        return torch.cat(
            [piece.narrow(step.dim, 0, size) for piece, size in zip(pieces, sizes, strict=True)], dim=step.dim
        )

    def _extent(self, axis: Axis) -> int:
        return self._rank.mesh.extent(axis)

    def _index(self, axis: Axis) -> int:
        return self._rank.dp if axis == "dp" else self._rank.tp
