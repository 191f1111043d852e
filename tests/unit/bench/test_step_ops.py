"""What the bench of a step says that ops read and compute is what they do."""

from __future__ import annotations

import numpy as np

from agentspeed_engine.models.inputs import FlatBatch, Run
from bench.step_ops import Attended, attended, cost_of, label

ITEM = 2


def batch(rows: int, first: int, *runs: Run) -> FlatBatch:
    at = np.full(rows, first, dtype=np.int64) if len(runs) > 1 else np.arange(first, first + rows, dtype=np.int64)
    return FlatBatch(ids=at, positions=at, slots=at, runs=runs, select=np.array([rows - 1]))


def run(start: int, tokens: int, queries: list[int], causal: bool) -> Run:
    pages = np.arange(-(-(start + tokens) // 64), dtype=np.int32)
    return Run(pages=pages, start=start, tokens=tokens, queries=np.array(queries, dtype=np.int32), causal=causal)


def test_a_chunk_reads_each_token_once_and_a_row_those_before_it() -> None:
    chunk = batch(3, 10, run(0, 13, [0, 1, 2], causal=True))
    assert attended(chunk) == Attended(tokens=13, pairs=11 + 12 + 13)


def test_branches_read_what_they_share_once() -> None:
    own = [run(128, 3, [row], causal=True) for row in range(2)]
    step = batch(2, 130, run(0, 128, [0, 1], causal=False), *own)
    assert attended(step) == Attended(tokens=128 + 2 * 3, pairs=2 * 131)


def test_a_product_reads_its_weight_and_its_rows() -> None:
    given = (0, 0, 0, 0, 0, 0, 4, 32, 16, 1)
    cost = cost_of("linear", given, Attended(1, 1), ITEM)
    assert cost is not None
    assert (cost.bytes, cost.flops) == (ITEM * (32 * 16 + 4 * (32 + 16)), 2 * 4 * 32 * 16)
    assert label("linear", given, vocabulary=32) == "head 32x16"
    assert label("linear", given, vocabulary=99) == "linear 32x16"


def test_attention_computes_for_pairs_and_reads_tokens() -> None:
    width, heads, groups = 8, 4, 2
    cost = cost_of("gqa_rows", (0, 0, 0, 0, 0, 64, width, heads, groups), Attended(tokens=100, pairs=500), ITEM)
    assert cost is not None
    assert (cost.bytes, cost.flops) == (ITEM * 2 * 100 * groups * width, 4 * 500 * heads * width)


def test_small_ops_have_no_cost_of_their_own() -> None:
    assert cost_of("rms_norm", (), Attended(1, 1), ITEM) is None
    assert label("rms_norm", (), vocabulary=1) == label("rope", (), vocabulary=1)
