"""The feed-forward of a layer: dense, or routed and shared experts as one module, the experts spread over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models.layers import Dense, piece
from agentspeed_engine.models.moe_config import MoeConfig
from agentspeed_engine.models.state import StepState
from agentspeed_engine.models.weights import WeightSource
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import Rank
from agentspeed_engine.spmd.spec import EVERYWHERE, PARTIAL_EVERYWHERE, Boundary
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.selection import Kernels


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
        shared: FeedForward | None,
        rank: Rank,
        kernels: Kernels,
    ) -> None:
        """`experts` are this rank's own (`own_experts`), `shared` is whole or absent."""
        self._router, self._bias, self._rule, self._kernels = router, bias, rule, kernels
        self._first = rank.index * len(experts) if rank.mesh.size > 1 else None
        # Few large calls: planning makes them for every expert of every layer.
        gates, ups = torch.stack([one.gate for one in experts]), torch.stack([one.up for one in experts])
        self._gate_up = kernels.weight(torch.cat([gates, ups], dim=1), parts=2)
        del gates, ups
        self._down = kernels.weight(torch.stack([one.down for one in experts]))
        cut = (rank.index, rank.mesh.size)
        self._shared_gate_up, self._shared_down = None, None
        if shared is not None:
            joined = torch.cat([piece(shared.gate, 0, *cut), piece(shared.up, 0, *cut)])[None]
            self._shared_gate_up = kernels.weight(joined, parts=2)
            self._shared_down = kernels.weight(piece(shared.down, 1, *cut)[None])
        self.boundary = Boundary(name=name, input=EVERYWHERE, output=PARTIAL_EVERYWHERE, width=router.shape[1])

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        rows = x.shape[0]
        if not rows:  # no rank has any
            return x, residual
        out = state.workspace.take("fed", (rows, x.shape[1]), x.dtype)
        ids, weights = self._kernels["route"].at(rows)(x, self._router, self._bias, self._rule)
        if self._first is not None:
            ids, weights = self._mine(ids, weights)
        run = self._kernels["experts"].at(rows)
        run(x, self._gate_up, self._down, ids, weights, state.workspace, out)
        if self._shared_gate_up is None or self._shared_down is None:
            return out, residual
        shared = state.workspace.take("shared", (rows, x.shape[1]), x.dtype)
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


def feed_forward(
    name: str, weights: WeightSource, moe: MoeConfig | None, rank: Rank, kernels: Kernels
) -> Module[StepState]:
    """The module `name` of a layer, which has the tensors of that name; dense where `moe` is None."""
    if moe is None:
        dense = _matrices(weights, name)
        return Dense(name, dense.gate, dense.up, dense.down, rank, kernels)
    # Scores decide which experts run, so the router keeps at least float32.
    wide = torch.float64 if kernels.dtype == "float64" else torch.float32
    return Moe(
        name,
        weights.tensor(name + ".gate.weight", wide),
        weights.tensor(name + ".gate.e_score_correction_bias", wide) if moe.corrected else None,
        _rule(moe),
        [_matrices(weights, f"{name}.experts.{expert}") for expert in own_experts(moe.experts, rank)],
        _matrices(weights, name + ".shared_experts") if moe.shared else None,
        rank,
        kernels,
    )


def _matrices(weights: WeightSource, at: str) -> FeedForward:
    gate, up, down = (weights.tensor(f"{at}.{name}_proj.weight") for name in ("gate", "up", "down"))
    return FeedForward(gate=gate, up=up, down=down)


def _rule(moe: MoeConfig) -> RouteRule:
    return RouteRule(
        score=moe.score,
        top=moe.top,
        groups=moe.groups,
        top_groups=moe.top_groups,
        group_score=moe.group_score,
        normalise=moe.normalise,
        scale=moe.scale,
    )
