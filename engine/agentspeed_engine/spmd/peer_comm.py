"""Collectives of GPUs that write into each other's memory: small sums and gathers there, others as torch makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from agentspeed_engine.spmd.distributed import DistributedComm
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import TOKENS
from agentspeed_engine.spmd.plan import Collective


class Peers(Protocol):
    """`agentspeed_kernels.triton.peers.PeerMemory` is one."""

    def sums(self, x: Tensor) -> bool: ...

    def sum(self, x: Tensor, out: Tensor) -> None: ...

    def gathers(self, x: Tensor) -> bool: ...

    def gather(self, x: Tensor) -> Tensor: ...


@final
class PeerComm:
    """`lower.Comm` and `lower.Fusing` of the tp ranks of one dp rank. Which way a value takes is said by its shape and
    format alone, which are the same on all ranks."""

    def __init__(self, peers: Peers, others: DistributedComm) -> None:
        self._peers, self._others = peers, others

    def apply(self, step: Collective, value: Any, tokens_per_rank: Sequence[int]) -> Any:
        if step.kind == "all_reduce" and self._peers.sums(value):
            total = torch.empty_like(value)
            self._peers.sum(value, total)
            return total
        if step.kind == "all_gather" and step.dim != TOKENS and self._peers.gathers(value):
            return self._peers.gather(value)
        return self._others.apply(step, value, tokens_per_rank)

    def sum_call(
        self,
        step: Collective,
        module: Module[Any],
        x: Tensor,
        residual: Tensor | None,
        state: Any,
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """The sum is made where the value lies, but the first of a chain, which becomes the residual itself."""
        if residual is not None and self._peers.sums(x):
            self._peers.sum(x, x)
            found: tuple[Tensor, Tensor] = module(x, residual, state)
            return found
        if residual is None:
            first: tuple[Tensor, Tensor] = module(self.apply(step, x, sizes), residual, state)
            return first
        return self._others.sum_call(step, module, x, residual, state, sizes)
