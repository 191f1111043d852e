"""Runs N ranks in one process, a value being the list of every rank's tensor: what shows that a plan is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agentspeed_engine.spmd.exchange import combined, outgoing, received, returning
from agentspeed_engine.spmd.lower import Module
from agentspeed_engine.spmd.placement import AXES, TOKENS, Axis, Layout, Mesh, Partial, Shard
from agentspeed_engine.spmd.plan import Collective, Plan, SumCall


def run_logical(
    plan: Plan,
    modules: Sequence[Sequence[Module[Any]]],
    inputs: Sequence[Tensor],
    states: Sequence[Any],
    tokens_per_rank: Sequence[int],
) -> list[Tensor]:
    """`modules[rank][i]` is rank's piece of the i-th module. Returns every rank's output."""
    x: list[Any] = list(inputs)
    residual: list[Any] = [None] * plan.mesh.size
    for step in plan.steps:
        if isinstance(step, Collective):
            if step.value == "x":
                x = apply_collective(step, x, plan.mesh, tokens_per_rank)
            else:
                residual = apply_collective(step, residual, plan.mesh, tokens_per_rank)
            continue
        if isinstance(step, SumCall):  # by its definition
            x = apply_collective(step.reduce, x, plan.mesh, tokens_per_rank)
        for rank in range(plan.mesh.size):
            x[rank], residual[rank] = modules[rank][step.module](x[rank], residual[rank], states[rank])
    return x


def apply_collective(step: Collective, values: Sequence[Any], mesh: Mesh, tokens_per_rank: Sequence[int]) -> list[Any]:
    """Every rank's value after a step: tensors, or rows with the experts that they chose."""
    out = list(values)
    for group in groups(mesh, step.axis):
        held = [values[rank] for rank in group]
        for index, (rank, moved) in enumerate(zip(group, _moved(step, held, tokens_per_rank), strict=True)):
            assert index < len(group)
            out[rank] = moved
    return out


def groups(mesh: Mesh, axis: Axis) -> list[list[int]]:
    """Ranks that differ only along `axis`."""
    if axis == "tp":
        return [[dp * mesh.tp + tp for tp in range(mesh.tp)] for dp in range(mesh.dp)]
    return [[dp * mesh.tp + tp for dp in range(mesh.dp)] for tp in range(mesh.tp)]


def _moved(step: Collective, held: list[Any], tokens_per_rank: Sequence[int]) -> list[Any]:
    if step.kind == "dispatch":
        sent = [outgoing(value) for value in held]
        return [received(value, [rows[index] for rows in sent]) for index, value in enumerate(held)]
    if step.kind == "combine":
        back = [returning(value) for value in held]
        return [combined(value, [rows[index] for rows in back]) for index, value in enumerate(held)]
    if step.kind == "all_gather":
        whole = torch.cat(held, dim=step.dim)
        return [whole.clone() for _ in held]
    whole = held[0] if step.kind == "slice" else torch.stack(held).sum(0)
    if step.kind == "all_reduce":
        return [whole.clone() for _ in held]
    source = held if step.kind == "slice" else [whole] * len(held)
    sizes = shard_sizes(whole.shape[step.dim], len(held), step.dim, tokens_per_rank)
    return [torch.split(value, sizes, dim=step.dim)[index].clone() for index, value in enumerate(source)]


def shard_sizes(extent: int, ranks: int, dim: int, tokens_per_rank: Sequence[int]) -> list[int]:
    if dim == TOKENS and len(tokens_per_rank) == ranks:
        return list(tokens_per_rank)
    return [extent // ranks] * ranks


def distribute(whole: Tensor, layout: Layout, mesh: Mesh, tokens_per_rank: Sequence[int]) -> list[Tensor]:
    """Every rank's piece of a value; a partial one is the whole on the first rank of an axis and zeros elsewhere."""
    pieces: list[Tensor] = []
    for rank in mesh.ranks():
        piece = whole
        for axis in AXES:
            placement, index, extent = layout.on(axis), rank.dp if axis == "dp" else rank.tp, mesh.extent(axis)
            if isinstance(placement, Shard):
                sizes = shard_sizes(piece.shape[placement.dim], extent, placement.dim, tokens_per_rank)
                piece = torch.split(piece, sizes, dim=placement.dim)[index]
            elif isinstance(placement, Partial) and index:
                piece = torch.zeros_like(piece)
        pieces.append(piece.clone())
    return pieces
