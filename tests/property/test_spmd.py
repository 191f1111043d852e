"""Random chains on random meshes: the planned result over N logical ranks equals one rank's, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentspeed_engine.spmd.logical import distribute, run_logical
from agentspeed_engine.spmd.lower import lower, run
from agentspeed_engine.spmd.placement import FEATURES, TOKENS, Layout, Mesh, Partial, Rank, Replicate, Shard
from agentspeed_engine.spmd.plan import plan
from agentspeed_engine.spmd.spec import EVERYWHERE, Boundary

WIDTH = 12
R, P = Replicate(), Partial()


@dataclass(frozen=True)
class Matrix:
    """One product, cut as its boundary says: by columns of the input (R -> P needs a slice), or of the output."""

    boundary: Boundary
    weight: Tensor

    def __call__(self, x: Tensor, residual: Any, state: Any) -> tuple[Tensor, Any]:
        return x @ self.weight, residual


@dataclass(frozen=True)
class Add:
    """Adds its input to the residual and gives a shifted copy; works on any shard of tokens."""

    boundary: Boundary

    def __call__(self, x: Tensor, residual: Any, state: Any) -> tuple[Tensor, Any]:
        total = x if residual is None else residual + x
        return torch.tanh(total), total


Kind = str


def build(kinds: Sequence[Kind], dp_tokens: bool, rank: Rank, seed: int) -> list[Any]:
    """One rank's modules: rows S(features)@tp -> P, columns R -> S(features)@tp, wide R -> P over both."""
    noise = torch.Generator().manual_seed(seed)
    dp = Shard(TOKENS) if dp_tokens else R
    modules: list[Any] = []
    for index, kind in enumerate(kinds):
        weight = torch.randn(WIDTH, WIDTH, generator=noise, dtype=torch.float64) / WIDTH**0.5
        layouts = {
            "rows": (Layout(dp=dp, tp=Shard(FEATURES)), Layout(dp=dp, tp=P)),
            "columns": (Layout(dp=dp, tp=R), Layout(dp=dp, tp=Shard(FEATURES))),
            "wide": (EVERYWHERE, Layout(dp=P, tp=P)),
            "add": (Layout(dp=dp, tp=R), Layout(dp=dp, tp=R)),
            "add_tokens": (Layout(dp=R, tp=Shard(TOKENS)), Layout(dp=R, tp=Shard(TOKENS))),
        }
        takes, gives = layouts[kind]
        boundary = Boundary(
            name=f"{kind} {index}",
            input=takes,
            output=gives,
            width=WIDTH,
            residual=takes if kind.startswith("add") else None,
        )
        modules.append(Add(boundary) if kind.startswith("add") else Matrix(boundary, cut(kind, weight, rank)))
    return modules


def cut(kind: Kind, weight: Tensor, rank: Rank) -> Tensor:
    if kind == "rows":
        return weight.chunk(rank.mesh.tp, 0)[rank.tp]
    if kind == "columns":
        return weight.chunk(rank.mesh.tp, 1)[rank.tp]
    part = torch.zeros_like(weight)
    share = WIDTH // rank.mesh.size
    part[rank.index * share : (rank.index + 1) * share] = weight[rank.index * share : (rank.index + 1) * share]
    return part


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["rows", "columns", "wide", "add"]), min_size=1, max_size=7),
    st.sampled_from([Mesh(), Mesh(tp=2), Mesh(dp=2), Mesh(dp=2, tp=2), Mesh(tp=3), Mesh(dp=3, tp=2)]),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    st.integers(0, 5),
)
def test_planned_chains_give_what_one_rank_gives(kinds: list[Kind], mesh: Mesh, sizes: list[int], seed: int) -> None:
    """Token shards are uneven and may be empty."""
    per_rank = [*sizes[: mesh.dp - 1], sizes[-1] + 1]
    x = torch.randn(sum(per_rank), WIDTH, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    alone = build(kinds, True, Mesh().rank(0), seed)
    start = Layout(dp=Shard(TOKENS), tp=R)
    single = plan([m.boundary for m in alone], Mesh(), start=start, finish=EVERYWHERE)
    wanted = run(lower(single, alone, None), x, None, (len(x),))
    ranks = [build(kinds, True, rank, seed) for rank in mesh.ranks()]
    made = plan([m.boundary for m in ranks[0]], mesh, start=start, finish=EVERYWHERE)
    got = run_logical(made, ranks, distribute(x, start, mesh, per_rank), [None] * mesh.size, per_rank)
    for piece in got:
        assert torch.allclose(piece, wanted, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["wide", "add", "add_tokens"]), min_size=1, max_size=6), st.integers(0, 5))
def test_a_residual_cut_by_tokens_is_the_same_residual(kinds: list[Kind], seed: int) -> None:
    mesh, x = Mesh(tp=2), torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    alone = build(kinds, False, Mesh().rank(0), seed)
    single = plan([m.boundary for m in alone], Mesh(), start=EVERYWHERE, finish=EVERYWHERE)
    wanted = run(lower(single, alone, None), x, None, (len(x),))
    ranks = [build(kinds, False, rank, seed) for rank in mesh.ranks()]
    made = plan([m.boundary for m in ranks[0]], mesh, start=EVERYWHERE, finish=EVERYWHERE)
    for piece in run_logical(made, ranks, [x, x.clone()], [None, None], (3, 3)):
        assert torch.allclose(piece, wanted, rtol=0, atol=1e-11)
