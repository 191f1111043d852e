"""Ranks of a tensor-parallel mesh as threads of a test, with the sums that they make together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from agentspeed_engine.models.catalog import load
from agentspeed_engine.models.loaded import LoadedModel
from agentspeed_engine.spmd.placement import Mesh
from agentspeed_engine.spmd.plan import Collective


class Meets:
    """Collectives of two ranks that are threads; of a plan with tp alone."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._given: list[torch.Tensor] = [torch.zeros(0)] * 2

    def summed(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        """Of both; each waits for the other."""
        self._given[rank] = value.clone()
        self._barrier.wait(60)
        total = self._given[0] + self._given[1]
        self._barrier.wait(60)
        return total


class Sums:
    """What one rank is given for its collectives."""

    def __init__(self, meets: Meets, rank: int) -> None:
        self._meets, self._rank = meets, rank

    def apply(self, step: Collective, value: Any, sizes: Sequence[int]) -> Any:
        assert step.kind == "all_reduce"
        return self._meets.summed(self._rank, value)


def on_two_ranks(folder: Path, **given: Any) -> list[LoadedModel]:
    """The model of each rank; every step must be taken by both at once."""
    meets = Meets()
    return [
        load(folder, threads=1, rank=rank, comm=Sums(meets, rank.index), recordable=False, **given)
        for rank in Mesh(tp=2).ranks()
    ]


def logits_of(models: Sequence[LoadedModel], run: Callable[[LoadedModel], torch.Tensor]) -> torch.Tensor:
    """What `run` gives on both, side by side."""
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(run, models)), dim=-1)
