"""Routed and shared experts as one module; experts are spread over all ranks, the router is on every one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models.layers import piece
from agentspeed_engine.models.state import StepState
from agentspeed_engine.spmd.placement import Rank
from agentspeed_engine.spmd.spec import EVERYWHERE, PARTIAL_EVERYWHERE, Boundary
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.select import Kernels


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """The three matrices of one SwiGLU."""

    gate: Tensor
    up: Tensor
    down: Tensor


@final
class Moe:
    """R -> P over dp × tp: each rank adds what its experts and its slice of the shared expert give."""

    __slots__ = (
        "_bias",
        "_down",
        "_first",
        "_gate_up",
        "_kernels",
        "_router",
        "_rule",
        "_shared_down",
        "_shared_gate_up",
        "boundary",
    )

    def __init__(
        self,
        name: str,
        router: Tensor,
        bias: Tensor | None,
        rule: RouteRule,
        experts: Sequence[FeedForward],
        shared: FeedForward,
        rank: Rank,
        kernels: Kernels,
    ) -> None:
        """`experts` are this rank's own (`own_experts`), `shared` is whole."""
        self._router, self._bias, self._rule, self._kernels = router, bias, rule, kernels
        self._first = rank.index * len(experts) if rank.mesh.size > 1 else None
        self._gate_up = kernels.weight(torch.stack([torch.cat([one.gate, one.up]) for one in experts]), parts=2)
        self._down = kernels.weight(torch.stack([one.down for one in experts]))
        cut = (rank.index, rank.mesh.size)
        joined = torch.cat([piece(shared.gate, 0, *cut), piece(shared.up, 0, *cut)])[None]
        self._shared_gate_up = kernels.weight(joined, parts=2)
        self._shared_down = kernels.weight(piece(shared.down, 1, *cut)[None])
        self.boundary = Boundary(name=name, input=EVERYWHERE, output=PARTIAL_EVERYWHERE, width=shared.down.shape[0])

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        rows = x.shape[0]
        out = state.workspace.take("fed", (rows, x.shape[1]), x.dtype)
        shared = state.workspace.take("shared", (rows, x.shape[1]), x.dtype)
        ids, weights = self._kernels["route"].at(rows)(x, self._router, self._bias, self._rule)
        if self._first is not None:
            ids, weights = self._mine(ids, weights)
        run = self._kernels["experts"].at(rows)
        run(x, self._gate_up, self._down, ids, weights, state.workspace, out)
        always = state.workspace.take("dense_ids", (rows, 1), torch.int64).zero_()
        ones = state.workspace.take("dense_weights", (rows, 1), weights.dtype).fill_(1)
        run(x, self._shared_gate_up, self._shared_down, always, ones, state.workspace, shared)
        self._kernels.add(shared, out)
        return out, residual

    def _mine(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Choices of experts that live elsewhere count nothing here."""
        local = ids - (self._first or 0)
        mine = (local >= 0) & (local < self._gate_up.shape[0])
        return local.clamp(0, self._gate_up.shape[0] - 1), weights * mine


def own_experts(experts: int, rank: Rank) -> range:
    """The experts that live on a rank."""
    count = experts // rank.mesh.size
    return range(rank.index * count, (rank.index + 1) * count)
