"""The attention backend of the CPU, and of torch anywhere: tiles for absorbed and for decompressed attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from agentspeed_kernels.attention import NEVER, AttentionStep, split_long, whole_paths
from agentspeed_kernels.tiles import Int64s, Piece, plan_tiles

EXTEND_FROM = 160
"""From this many new tokens of one branch on, decompressing the context costs less than absorbed attention. A kernel
may say another number of itself."""
FEW_CHUNK, FEW_BLOCK = 512, 32
MANY_CHUNK, MANY_BLOCK = 512, 512


@final
@dataclass(frozen=True, slots=True)
class CpuAttention:
    """Plans are `TilePlan`s."""

    page_tokens: int
    extend_from: int = EXTEND_FROM
    invariant: bool = False
    """Every row reads its branch by itself, cut at fixed positions: the sums of a row are the same in any step."""

    def prepare(self, pieces: Sequence[Piece], positions: Int64s) -> AttentionStep:
        pieces = whole_paths(pieces, self.page_tokens) if self.invariant else pieces
        extend_from = NEVER if self.invariant else self.extend_from
        few_pieces, many_pieces, rows = split_long(pieces, positions.size, extend_from)
        few = plan_tiles(
            few_pieces, positions, page_tokens=self.page_tokens, chunk_tokens=FEW_CHUNK, block_rows=FEW_BLOCK
        )
        many = plan_tiles(
            many_pieces,
            positions,
            page_tokens=self.page_tokens,
            chunk_tokens=MANY_CHUNK,
            block_rows=MANY_BLOCK,
            align="query",
        ) if many_pieces else None  # fmt: skip
        return AttentionStep(
            few=few if few.count else None,
            many=many if many is not None and many.count else None,
            many_rows=torch.from_numpy(rows),
        )
