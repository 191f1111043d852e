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

    __slots__ = ("_copies", "first", "groups", "held", "own")

    def __init__(self, experts: int, rank: Rank) -> None:
        spread, self.groups = rank.mesh.experts, rank.mesh.expert_groups
        dealt = deal(experts, self.groups, spread.spare, spread.loads)
        self.held = len(dealt[0])
        self.own = dealt[rank.expert_group]
        """The experts of this rank, in the order of their places."""
        self.first = rank.expert_group * self.held
        copies = copies_of(dealt, experts)
        self._copies: tuple[Tensor, Tensor] | None = None
        """Each expert's places [experts, most copies] and how many they are; None where each has its own number."""
        if copies != [[expert] for expert in range(experts)]:
            most = max(len(places) for places in copies)
            filled = torch.tensor([places + places[:1] * (most - len(places)) for places in copies])
            self._copies = filled, torch.tensor([len(places) for places in copies])

    def of(self, ids: Tensor) -> Tensor:
        """The places [T, top] that rows go to; copies of an expert take rows in turn."""
        if self._copies is None:
            return ids
        places, counts = (held.to(ids.device) for held in self._copies)
        turn = torch.arange(ids.shape[0], device=ids.device)[:, None] % counts[ids]
        return places[ids, turn]

    def keep_own(self, places: Tensor, weights: Tensor, kernels: Kernels) -> None:
        """Choices of experts that live elsewhere count nothing here. In place."""
        if self.groups > 1 or self._copies is not None:
            kernels.own(places, weights, self.first, self.held)


@final
class ExpertChoice:
    """Scores rows: the places that each goes to, and the weight of each choice."""

    __slots__ = ("_bias", "_kernels", "_places", "_router", "_rule", "top", "wide")

    def __init__(self, router: Tensor, bias: Tensor | None, rule: RouteRule, places: Places, kernels: Kernels) -> None:
        self._router, self._bias, self._rule, self._places, self._kernels = router, bias, rule, places, kernels
        self.top, self.wide = rule.top, router.dtype
        """Choices of a row, and the format of their weights."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(places, weights) [T, top] of one row or more."""
        ids, weights = self._kernels["route"].at(x.shape[0])(x, self._router, self._bias, self._rule)
        return self._places.of(ids), weights

    def after_norm(
        self, norm: AddNorm, x: Tensor, residual: Tensor, slots: Tensor, normed: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Likewise of what `norm` makes of the rows, which `normed` and `total` get. Rows without a slot go nowhere."""
        route = self._kernels["add_norm_route"].at(x.shape[0])
        given = (x, residual, norm.gain, norm.eps, self._router, self._bias, self._rule)
        ids, weights = route(*given, slots, normed, total)
        return self._places.of(ids), weights


@final
class Moe:
    """R -> P over dp × tp: each rank adds what its experts and its slice of the shared expert give."""

    __slots__ = ("_choice", "_experts", "_kernels", "_places", "_shared", "boundary")

    def __init__(
        self,
        boundary: Boundary,
        choice: ExpertChoice,
        experts: Matrices,
        shared: Matrices | None,
        places: Places,
        kernels: Kernels,
    ) -> None:
        """`experts` and `shared` are this rank's own pieces."""
        self._choice, self._experts, self._shared = choice, experts, shared
        self._places, self._kernels = places, kernels
        self.boundary = boundary

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Tensor, Tensor | None]:
        rows = x.shape[0]
        if not rows:  # no rank has any
            return x, residual
        out = state.workspace.take("fed", (rows, x.shape[1]), x.dtype)
        places, weights = self._choice(x)
        self._places.keep_own(places, weights, self._kernels)
        self._kernels["experts"].at(rows)(x, *self._experts, places, weights, state.workspace, out)
        shared = _always(x, self._shared, self._kernels, weights.dtype, state)
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
        places, weights = self._choice.after_norm(norm, x, residual, state.slots, normed, total)
        self._places.keep_own(places, weights, run)
        out = take("fed", (rows, x.shape[1]), x.dtype)
        own = (normed, *self._experts, places, weights)
        if self._shared is None:
            run["experts"].at(rows)(*own, state.workspace, out)
        else:
            run["experts_and_shared"].at(rows)(*own, *self._shared, state.workspace, out)
        return out, total


@final
class Router:
    """Local rows to the ranks of the experts that each chooses, with what the shared expert gives for them at home."""

    __slots__ = ("_choice", "_column", "_held", "_kernels", "_shared", "boundary")

    def __init__(
        self,
        boundary: Boundary,
        choice: ExpertChoice,
        shared: Matrices | None,
        held: int,
        rank: Rank,
        kernels: Kernels,
    ) -> None:
        """`shared` is cut over tp alone; each group has `held` places."""
        self._choice, self._shared, self._held, self._kernels = choice, shared, held, kernels
        # Along dp alone: the other tp ranks have the same rows and bring them to the experts of their own columns.
        self._column = tuple(peer.expert_group for peer in rank.mesh.ranks() if peer.tp == rank.tp)
        self.boundary = boundary

    def __call__(self, x: Tensor, residual: Tensor | None, state: StepState) -> tuple[Routed, Tensor | None]:
        rows = x.shape[0]
        if not rows:  # a dp rank whose branches all rest: it computes for others
            places = torch.empty(0, self._choice.top, dtype=torch.int64, device=x.device)
            weights = torch.empty(0, self._choice.top, dtype=self._choice.wide, device=x.device)
            base = None
        else:
            places, weights = self._choice(x)
            base = _always(x, self._shared, self._kernels, weights.dtype, state)
        groups = places // self._held
        sends = tuple((groups == group).any(1).nonzero().squeeze(1) for group in self._column)
        return Routed(x=x, places=places, weights=weights, sends=sends, base=base, home=rows), residual


@final
class Experts:
    """Rows that were sent here, through the experts of this rank that each of them chose."""

    __slots__ = ("_experts", "_kernels", "_places", "boundary")

    def __init__(self, boundary: Boundary, experts: Matrices, places: Places, kernels: Kernels) -> None:
        self._experts, self._places, self._kernels = experts, places, kernels
        self.boundary = boundary

    def __call__(self, x: Routed, residual: Tensor | None, state: StepState) -> tuple[Routed, Tensor | None]:
        rows = x.x.shape[0]
        if not rows:
            return x, residual
        places, weights = x.places.clone(), x.weights.clone()
        self._places.keep_own(places, weights, self._kernels)
        out = state.workspace.take("fed", (rows, x.x.shape[1]), x.x.dtype)
        self._kernels["experts"].at(rows)(x.x, *self._experts, places, weights, state.workspace, out)
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
    choice = ExpertChoice(router, bias, _rule(moe), places, kernels)
    experts = _stacked([f"{name}.experts.{expert}" for expert in places.own], weights, kernels)
    shared = _stacked([name + ".shared_experts"], weights, kernels) if moe.shared else None
    declared = boundaries.experts(name, width, moe, rank.mesh)
    if rank.mesh.exchange == "sum":
        return [Moe(declared[0], choice, experts, shared, places, kernels)]
    to, of = declared
    return [
        Router(to, choice, shared, places.held, rank, kernels),
        Experts(of, experts, places, kernels),
    ]


def _stacked(experts: Sequence[str], weights: RankWeights, kernels: Kernels) -> Matrices:
    """Of all. A matrix is read when it is asked for: a layer's are large."""

    def of(matrix: str) -> Callable[[int], Stored]:
        return lambda expert: weights.matrix(f"{experts[expert]}.{matrix}_proj.weight")

    return kernels.experts(len(experts), of("gate"), of("up")), kernels.experts(len(experts), of("down"))


def _always(x: Tensor, shared: Matrices | None, kernels: Kernels, wide: torch.dtype, state: StepState) -> Tensor | None:
    """What the shared expert gives: every row visits it."""
    if shared is None:
        return None
    rows, take = x.shape[0], state.workspace.take
    out = take("shared", (rows, x.shape[1]), x.dtype)
    ids = state.workspace.constant(0, (rows, 1), torch.int64)
    ones = state.workspace.constant(1, (rows, 1), wide)
    kernels["experts"].at(rows)(x, *shared, ids, ones, state.workspace, out)
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
