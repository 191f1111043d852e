"""Which piece of every tensor belongs to a rank, by the tensor's name, and a source of weights that gives no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import final

import torch
from torch import Tensor

from agentspeed_engine.models.tensor_shapes import Shape
from agentspeed_engine.models.weights import Part, WeightSource
from agentspeed_engine.spmd.experts import deal
from agentspeed_engine.spmd.placement import Rank
from agentspeed_kernels.fp8_blocks import Stored

_RULES: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"(?:^model\.embed_tokens|^lm_head|\.self_attn\.(?:q|k|v|q_b|kv_b)_proj)\.(?:weight|bias)$"), 0),
    (re.compile(r"\.self_attn\.o_proj\.weight$"), 1),
    (re.compile(r"\.mlp\.(?:gate|up)_proj\.weight$"), 0),
    (re.compile(r"\.mlp\.down_proj\.weight$"), 1),
)
"""(Names, the dim that is cut over tp): heads, the vocabulary, the inner width of a dense feed-forward."""
_EXPERT = re.compile(r"\.(?P<shared>shared_)?experts\.(?:(?P<number>\d+)\.)?(?P<matrix>gate|up|down)_proj\.weight$")


def part_of(name: str, rank: Rank) -> Part | None:
    """Of the tensors of every family, whose names are those of Hugging Face; None for what each rank has whole. A
    routed expert's piece is asked for by the ranks of its group alone."""
    expert = _EXPERT.search(name)
    if expert is not None:
        dim = 1 if expert["matrix"] == "down" else 0
        if not expert["shared"]:
            return Part(dim, *rank.expert_part)
        if rank.mesh.exchange == "all_to_all":  # rows stay at home for it
            return Part(dim, rank.tp, rank.mesh.tp)
        return Part(dim, rank.index, rank.mesh.size)
    for names, dim in _RULES:
        if names.search(name):
            return Part(dim, rank.tp, rank.mesh.tp)
    return None


def held_shapes(shapes: Iterable[tuple[str, Shape]], rank: Rank, experts: int) -> Iterator[tuple[str, Shape]]:
    """Of the tensors of a model with so many routed experts: those that a rank has, as it has them."""
    spread, mesh = rank.mesh.experts, rank.mesh
    own = deal(experts, mesh.expert_groups, spread.spare, spread.loads)[rank.expert_group] if experts else ()
    for name, shape in shapes:
        expert = _EXPERT.search(name)
        if expert is not None and expert["number"] is not None and int(expert["number"]) not in own:
            continue
        part = part_of(name, rank)
        if part is not None:
            shape = tuple(extent // part.count if dim == part.dim else extent for dim, extent in enumerate(shape))
        yield name, shape


@final
class RankWeights:
    """What one rank has of a source's tensors."""

    __slots__ = ("_parts", "_source")

    def __init__(self, source: WeightSource, shapes: Iterable[tuple[str, Shape]], rank: Rank) -> None:
        """`shapes` are the family's. Raises `EngineFault` (bad_config) for pieces that would tear blocks, before
        anything is read."""
        self._source = source
        found = ((name, part_of(name, rank)) for name, _ in shapes)
        self._parts = {name: part for name, part in found if part is not None and part.count > 1}
        source.expect(self._parts)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """This rank's piece, as `WeightSource.tensor` gives it."""
        return self._source.tensor(name, dtype, self._parts.get(name))

    def matrix(self, name: str) -> Stored:
        """This rank's piece, as `WeightSource.matrix` gives it: for what `Kernels` lays out."""
        return self._source.matrix(name, self._parts.get(name))
