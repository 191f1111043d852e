"""The attention backend for CUDA: absorbed rows and decompressed extends, planned and uploaded once a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from agentspeed_kernels.attention import NEVER, AttentionStep, pairs_of, split_long
from agentspeed_kernels.tiles import Int64s, Piece
from agentspeed_kernels.triton.attention import AttentionShape, Form, plan_step, upload
from agentspeed_kernels.triton.extend import NotOneBranch, prepare_extend
from agentspeed_kernels.triton.padded import general
from agentspeed_kernels.triton.plan import Cut, RowsPlan
from agentspeed_kernels.uploads import unwaited

log = logging.getLogger("agentspeed.kernels")

EXTEND_FROM = 256
"""From this many new tokens of one branch on, decompressing the context costs less than absorbed attention (measured on
an H200 at 32 768 cached tokens, docs/performance.md)."""
ABSORBED, ABSORBED_EACH = 1 << 25, 1 << 24
"""Pairs of a query's head and a token of its context up to which long extends run absorbed all the same: those of a
step together, where it is a graph then (512 tokens of 16 heads at 4096), and those of one. What they compute more costs
less than the launches of their own kernels."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TritonAttention:
    """Plans are `RowsOnDevice` for rows and a tuple of `ExtendedBranch` for extends."""

    shape: AttentionShape
    device: torch.device
    invariant: bool = False
    """Every row reads its branch by itself, cut at fixed places: its attention has the same bits in any step."""
    extend_from: int = EXTEND_FROM
    absorbed_each: int = ABSORBED_EACH

    def prepare(self, pieces: Sequence[Piece], positions: Int64s) -> AttentionStep:
        extend_from = NEVER if self.invariant else self.extend_from
        few, many, rows = split_long(pieces, positions.size, extend_from, self.absorbed_each // self.shape.heads)
        extended = None
        if many:
            try:
                extended = prepare_extend(many, positions, self.shape.page_tokens, self.shape.heads, self.device)
            except NotOneBranch as error:
                log.info("a long extend runs absorbed: %s", error)
                few, rows = list(pieces), np.zeros(0, np.int64)
        absorbed = None
        if few:
            plan, form = self.rows(few, positions)
            absorbed = upload(general(plan), form, self.device)
        return AttentionStep(few=absorbed, many=extended, many_rows=unwaited(rows, self.device))

    def absorbs(self, pieces: Sequence[Piece]) -> bool:
        """Whether a step's long extends may be rows like others: they compute more then, but not much."""
        long = (piece for piece in pieces if piece.causal and piece.queries.size >= self.extend_from)
        return self.shape.heads * sum(map(pairs_of, long)) <= ABSORBED

    def rows(self, pieces: Sequence[Piece], positions: Int64s) -> tuple[RowsPlan, Form]:
        """The plan for a step whose rows are all absorbed, not uploaded yet."""
        return plan_step(pieces, positions, self.shape, cut=self._cut)

    @property
    def _cut(self) -> Cut | None:
        return "fixed" if self.invariant else None


def shape_of(
    heads: int, rank: int, rope: int, page_tokens: int, device: torch.device, element_bytes: int = 2
) -> AttentionShape:
    """The shape for a model on a device; the Gluon kernel needs compute capability 9."""
    if device.type != "cuda":
        return AttentionShape(
            heads=heads,
            rank=rank,
            rope=rope,
            page_tokens=page_tokens,
            processors=4,
            hopper=False,
            element_bytes=element_bytes,
        )
    properties = torch.cuda.get_device_properties(device)
    return AttentionShape(
        heads=heads,
        rank=rank,
        rope=rope,
        page_tokens=page_tokens,
        processors=properties.multi_processor_count,
        hopper=properties.major == 9 and torch.version.hip is None and element_bytes == 2,
        element_bytes=element_bytes,
        chip="hip" if torch.version.hip else "sm_90" if properties.major == 9 else "cuda",
    )
