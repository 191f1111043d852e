"""What a tile plan costs: a shared prefix is read once, an idle step nothing."""

from __future__ import annotations

import numpy as np

from agentspeed_engine.models.inputs import Run
from agentspeed_kernels.tiles import plan_tiles

PAGE = 64


def decode_runs(branches: int, prefix: int) -> list[Run]:
    """`branches` branches at one token each below one prefix."""
    rows = np.arange(branches, dtype=np.int32)
    shared = Run(pages=np.arange(prefix // PAGE, dtype=np.int32), start=0, tokens=prefix, queries=rows, causal=False)
    tails = [
        Run(pages=np.array([500 + row], np.int32), start=prefix, tokens=1, queries=rows[row : row + 1], causal=True)
        for row in range(branches)
    ]
    return [shared, *tails]


def test_a_shared_prefix_is_read_once_for_all_branches_below_it() -> None:
    positions = np.full(8, 4096, dtype=np.int64)
    plan = plan_tiles(decode_runs(8, 4096), positions, page_tokens=PAGE, chunk_tokens=512, block_rows=32)
    assert plan.tokens.sum() == 4096 + 8


def test_a_long_prefix_is_split_so_that_every_core_has_a_part() -> None:
    positions = np.array([4096], dtype=np.int64)
    plan = plan_tiles(decode_runs(1, 4096), positions, page_tokens=PAGE, chunk_tokens=512, block_rows=32)
    assert plan.count == 8 + 1


def test_a_step_without_runs_has_no_tiles() -> None:
    plan = plan_tiles([], np.zeros(0, np.int64), page_tokens=PAGE, chunk_tokens=512, block_rows=32)
    assert (plan.count, plan.entries, plan.tokens.sum()) == (0, 0, 0)


def test_a_prompts_own_block_is_a_triangle_and_what_is_before_it_a_rectangle() -> None:
    run = Run(
        pages=np.arange(20, dtype=np.int32), start=0, tokens=1100, queries=np.arange(400, dtype=np.int32), causal=True
    )
    positions = np.arange(700, 1100, dtype=np.int64)
    plan = plan_tiles([run], positions, page_tokens=PAGE, chunk_tokens=512, block_rows=512, align="query")
    assert [(tile.tokens, tile.shape) for tile in plan.tiles] == [(512, "full"), (188, "full"), (400, "diagonal")]
