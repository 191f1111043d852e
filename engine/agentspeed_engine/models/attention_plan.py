"""Splits a step's rows between absorbed and decompressed attention, and plans the tiles of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.tiles import Int64s, TilePlan, plan_tiles

EXTEND_FROM = 160
"""From this many new tokens of one branch on, decompressing the context costs less than absorbed attention."""
FEW_CHUNK, FEW_BLOCK = 512, 32
MANY_CHUNK, MANY_BLOCK = 512, 512


def plan_attention(runs: Sequence[Run], positions: Int64s, page_tokens: int) -> tuple[TilePlan | None, TilePlan | None]:
    """(few, many): every row is in exactly one of them, with everything it sees."""
    long = np.zeros(positions.size, dtype=bool)
    for run in runs:
        if run.causal and run.queries.size >= EXTEND_FROM:
            long[run.queries] = True
    few_runs = [part for run in runs if (part := _only(run, ~long)) is not None]
    many_runs = [part for run in runs if (part := _only(run, long)) is not None]
    few = plan_tiles(few_runs, positions, page_tokens=page_tokens, chunk_tokens=FEW_CHUNK, block_rows=FEW_BLOCK)
    many = plan_tiles(
        many_runs,
        positions,
        page_tokens=page_tokens,
        chunk_tokens=MANY_CHUNK,
        block_rows=MANY_BLOCK,
        align="query",
    )
    return (few if few.count else None), (many if many.count else None)


def _only(run: Run, kept: np.ndarray) -> Run | None:
    mask = kept[run.queries]
    if mask.all():
        return run
    return replace(run, queries=run.queries[mask]) if mask.any() else None
