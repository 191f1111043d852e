"""Processes that learn together: each computes gradients of its own batch with one thread, all apply their average.

On a shared machine two processes with one thread each learn faster than one with two: no thread spins for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
    """One process among `count`; with `count` 1 nothing is exchanged."""

    def __init__(self, rank: int = 0, count: int = 1, meeting: Path | None = None) -> None:
        self.rank, self.count = rank, count
        if count > 1:
            if meeting is None:
                raise ValueError("several processes need a file to meet at")
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)

    @property
    def leads(self) -> bool:
        """The one that writes and scores."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """In place, in one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def agreed(self, value: float) -> float:
        """The average of everyone's value: the same number for all, so that all stop at the same step."""
        shared = torch.tensor([value], dtype=torch.float64)
        self.average([shared])
        return float(shared)
