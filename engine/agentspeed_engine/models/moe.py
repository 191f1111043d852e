"""The feed-forward of a layer: dense, or routed and shared experts, which rows are brought to in one of two ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias, final

import torch
from torch import Tensor

from agentspeed_engine.models import boundaries
from agentspeed_engine.models.layers import AddNorm, Dense
from agentspeed_engine.models.moe_config import MoeConfig
from agentspeed_engine.models.pieces import RankWeights
from agentspeed_engine.models.state import StepState, other_sum
from agentspeed_engine.spmd.exchange import Routed
from agentspeed_engine.spmd.experts import copies_of, deal
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import Rank
from agentspeed_engine.spmd.spec import Boundary
from agentspeed_kernels.fp8_blocks import Stored
from agentspeed_kernels.packing import Weight
from agentspeed_kernels.routing import RouteRule
from agentspeed_kernels.selection import Kernels

Matrices: TypeAlias = tuple[Weight, Weight]
"""(Gate and up, down) of experts, as [experts, N, K] in the layout of the kernels."""


@final
class Places:
    """Where every expert's copies lie. A place is one copy: those of a group follow each other."""

    __slots__ = ("_copies", "_counts", "first", "groups", "held", "own")

    def __init__(self, experts: int, rank: Rank) -> None:
        spread, self.groups = rank.mesh.experts, rank.mesh.expert_groups
        dealt = deal(experts, self.groups, spread.spare, spread.loads)
        self.held = len(dealt[0])
        self.own = dealt[rank.expert_group]
        """The experts of this rank, in the order of their places."""
        self.first = rank.expert_group * self.held
        copies = copies_of(dealt, experts)
        self._copies: Tensor | None = None
        if copies != [[expert] for expert in range(experts)]:
            most = max(len(places) for places in copies)
            self._copies = torch.tensor([places + places[:1] * (most - len(places)) for places in copies])
            self._counts = torch.tensor([len(places) for places in copies])

    def of(self, ids: Tensor) -> Tensor:
        """The places [T, top] that rows go to; copies of an expert take rows in turn."""
        if self._copies is None:
            return ids
        turn = torch.arange(ids.shape[0], device=ids.device)[:, None] % self._counts.to(ids.device)[ids]
        return self._copies.to(ids.device)[ids, turn]

    def keep_own(self, places: Tensor, weights: Tensor, kernels: Kernels) -> None:
        """Choices of experts that live elsewhere count nothing here. In place."""
        if self.groups > 1 or self._copies is not None:
            kernels.own(places, weights, self.first, self.held)


@final
class Moe:
    """R -> P over dp × tp: each rank adds what its experts and its slice of the shared expert give."""

    __slots__ = (
        "_bias",
        "_down",
        "_gate_up",
        "_kernels",
        "_places",
        "_router",
        "_rule",
        "_shared_down",
        "_shared_gate_up",
        "boundary",
    )

    def __init__(
        self,
        boundary: Boundary,
        router: Tensor,
        bias: Tensor | None,
        rule: RouteRule,
        experts: Matrices,
        shared: Matrices | None,
        places: Places,
        kernels: Kernels,
    ) -> None:
        """`experts` and `shared` are this rank's own pieces."""
        self._router, self._bias, self._rule, self._kernels, self._places = router, bias, rule, kernels, places
        self._gate_up, self._down = experts
        self._shared_gate_up, self._shared_down = _both(shared)
        self.boundary = boundary

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        rows = x.shape[0]
        if not rows:  # no rank has any
            return x, residual
        out = state.workspace.take("fed", (rows, x.shape[1]), x.dtype)
        ids, weights = self._kernels["route"].at(rows)(x, self._router, self._bias, self._rule)
        ids = self._places.of(ids)
        self._places.keep_own(ids, weights, self._kernels)
        run = self._kernels["experts"].at(rows)
        run(x, self._gate_up, self._down, ids, weights, state.workspace, out)
        shared = _always(x, self._shared_gate_up, self._shared_down, self._kernels, weights.dtype, state)
        if shared is not None:
            self._kernels.add(shared, out)
        return out, residual

    def after_norm(
        self, norm: AddNorm, x: Tensor, residual: Tensor | None, state: StepState
    ) -> tuple[Tensor, Tensor | None]:
        """`joined.AfterNorm`: the norm with the scores, and the shared expert with the others. Rows that pad a step
        visit no routed expert."""
        rows, take, run = x.shape[0], state.workspace.take, self._kernels
        if not rows or residual is None or not run.has("add_norm_route"):
            return self(*norm(x, residual, state), state)
        normed, total = take("normed", (rows, x.shape[1]), x.dtype), other_sum(residual, state)
        route = run["add_norm_route"].at(rows)
        given = (x, residual, norm.gain, norm.eps, self._router, self._bias, self._rule)
        ids, weights = route(*given, state.slots, normed, total)
        ids = self._places.of(ids)
        self._places.keep_own(ids, weights, run)
        out = take("fed", (rows, x.shape[1]), x.dtype)
        own = (normed, self._gate_up, self._down, ids, weights)
        if self._shared_gate_up is None or self._shared_down is None:
            run["experts"].at(rows)(*own, state.workspace, out)
        else:
            both = run["experts_and_shared"].at(rows)
            both(*own, self._shared_gate_up, self._shared_down, state.workspace, out)
        return out, total


@final
class Router:
    """Local rows to the ranks of the experts that each chooses, with what the shared expert gives for them at home."""

    __slots__ = (
        "_bias",
        "_column",
        "_kernels",
        "_places",
        "_router",
        "_rule",
        "_shared_down",
        "_shared_gate_up",
        "boundary",
    )

    def __init__(
        self,
        boundary: Boundary,
        router: Tensor,
        bias: Tensor | None,
        rule: RouteRule,
        shared: Matrices | None,
        places: Places,
        rank: Rank,
        kernels: Kernels,
    ) -> None:
        """`shared` is cut over tp alone."""
        self._router, self._bias, self._rule, self._kernels, self._places = router, bias, rule, kernels, places
        self._shared_gate_up, self._shared_down = _both(shared)
        # Along dp alone: the other tp ranks have the same rows and bring them to the experts of their own columns.
        self._column = tuple(peer.expert_group for peer in rank.mesh.ranks() if peer.tp == rank.tp)
        self.boundary = boundary

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Routed, Tensor | None]:
        rows = x.shape[0]
        if not rows:  # a dp rank whose branches all rest: it computes for others
            places = torch.empty(0, self._rule.top, dtype=torch.int64, device=x.device)
            weights = torch.empty(0, self._rule.top, dtype=self._router.dtype, device=x.device)
            base = None
        else:
            ids, weights = self._kernels["route"].at(rows)(x, self._router, self._bias, self._rule)
            places = self._places.of(ids)
            base = _always(x, self._shared_gate_up, self._shared_down, self._kernels, weights.dtype, state)
        groups = places // self._places.held
        sends = tuple((groups == group).any(1).nonzero().squeeze(1) for group in self._column)
        return Routed(x=x, places=places, weights=weights, sends=sends, base=base, home=rows), residual


@final
class Experts:
    """Rows that were sent here, through the experts of this rank that each of them chose."""

    __slots__ = ("_down", "_gate_up", "_kernels", "_places", "boundary")

    def __init__(self, boundary: Boundary, experts: Matrices, places: Places, kernels: Kernels) -> None:
        self._kernels, self._places = kernels, places
        self._gate_up, self._down = experts
        self.boundary = boundary

    def __call__(self, x: Routed, residual: Tensor | None, state: StepState) -> tuple[Routed, Tensor | None]:
        rows = x.x.shape[0]
        if not rows:
            return x, residual
        ids, weights = x.places.clone(), x.weights.clone()
        self._places.keep_own(ids, weights, self._kernels)
        out = state.workspace.take("fed", (rows, x.x.shape[1]), x.x.dtype)
        run = self._kernels["experts"].at(rows)
        run(x.x, self._gate_up, self._down, ids, weights, state.workspace, out)
        return replace(x, x=out), residual


def feed_forward(
    name: str, width: int, weights: RankWeights, moe: MoeConfig | None, rank: Rank, kernels: Kernels
) -> list[Module[StepState]]:
    """The modules of a layer that has the tensors of this name; dense where `moe` is None. `width` is the model's."""
    if moe is None:
        return [Dense(name, _stacked([name], weights, kernels), width, kernels)]
    # Scores decide which experts run, so the router keeps at least float32.
    wide = torch.float64 if kernels.dtype == "float64" else torch.float32
    router = weights.tensor(name + ".gate.weight", wide)
    bias = weights.tensor(name + ".gate.e_score_correction_bias", wide) if moe.corrected else None
    places = Places(moe.experts, rank)
    experts = _stacked([f"{name}.experts.{expert}" for expert in places.own], weights, kernels)
    shared = _stacked([name + ".shared_experts"], weights, kernels) if moe.shared else None
    declared = boundaries.experts(name, width, moe, rank.mesh)
    if rank.mesh.exchange == "sum":
        return [Moe(declared[0], router, bias, _rule(moe), experts, shared, places, kernels)]
    to, of = declared
    return [
        Router(to, router, bias, _rule(moe), shared, places, rank, kernels),
        Experts(of, experts, places, kernels),
    ]


def _stacked(experts: Sequence[str], weights: RankWeights, kernels: Kernels) -> Matrices:
    """Of all. A matrix is read when it is asked for: a layer's are large."""

    def of(matrix: str) -> Callable[[int], Stored]:
        return lambda expert: weights.matrix(f"{experts[expert]}.{matrix}_proj.weight")

    return kernels.experts(len(experts), of("gate"), of("up")), kernels.experts(len(experts), of("down"))


def _both(shared: Matrices | None) -> tuple[Weight | None, Weight | None]:
    return (None, None) if shared is None else shared


def _always(
    x: Tensor, gate_up: Weight | None, down: Weight | None, kernels: Kernels, wide: torch.dtype, state: StepState
) -> Tensor | None:
    """What the shared expert gives: every row visits it."""
    if gate_up is None or down is None:
        return None
    rows, take = x.shape[0], state.workspace.take
    out = take("shared", (rows, x.shape[1]), x.dtype)
    ids = state.workspace.constant(0, (rows, 1), torch.int64)
    ones = state.workspace.constant(1, (rows, 1), wide)
    kernels["experts"].at(rows)(x, gate_up, down, ids, ones, state.workspace, out)
    return out


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
