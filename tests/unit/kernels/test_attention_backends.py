"""A backend splits a step between absorbed and decompressed attention, and loses no row."""

from __future__ import annotations

import numpy as np
import torch

from agentspeed_kernels.attention import Part, paths, split_long
from agentspeed_kernels.cpu.attention_plan import EXTEND_FROM, CpuAttention
from agentspeed_kernels.tiles import Piece
from agentspeed_kernels.triton.backend import TritonAttention, shape_of

TRUNK = np.arange(4, dtype=np.int32)


def step(*counts: int) -> tuple[list[Piece], np.ndarray]:
    """Branches with so many new tokens each below a trunk of 64 tokens."""
    rows = np.arange(sum(counts), dtype=np.int32)
    pieces: list[Piece] = [Part(TRUNK, 0, 64, rows, False)]
    positions: list[int] = []
    at = 0
    for i, count in enumerate(counts):
        pages = np.arange(-(-count // 16), dtype=np.int32) + 100 * (i + 1)
        pieces.append(Part(pages, 64, count, rows[at : at + count], True))
        positions += range(64, 64 + count)
        at += count
    return pieces, np.array(positions, np.int64)


def test_rows_of_long_extends_are_taken_out_of_what_they_share() -> None:
    pieces, positions = step(1, 5, 2)
    few, many, rows = split_long(pieces, positions.size, 5)
    assert rows.tolist() == [1, 2, 3, 4, 5]
    assert [piece.queries.tolist() for piece in few] == [[0, 6, 7], [0], [6, 7]]
    assert [piece.queries.tolist() for piece in many] == [[1, 2, 3, 4, 5]] * 2


def test_a_step_without_long_extends_is_handed_on_as_it_is() -> None:
    pieces, positions = step(1, 5)
    few, many, rows = split_long(pieces, positions.size, 6)
    assert (few, many, rows.size) == (pieces, [], 0)


def test_the_path_of_a_branch_names_what_it_shares_for_it_alone() -> None:
    pieces, _ = step(2, 3)
    found = paths(pieces)
    assert [[piece.queries.tolist() for piece in path] for path in found] == [[[0, 1]] * 2, [[2, 3, 4]] * 2]


def test_every_row_is_planned_once_by_the_backend_of_the_cpu() -> None:
    pieces, positions = step(1, EXTEND_FROM, 3)
    planned = CpuAttention(16).prepare(pieces, positions)
    assert planned.few is not None and planned.many is not None
    assert planned.few.merge_rows.tolist() == [0, EXTEND_FROM + 1, EXTEND_FROM + 2, EXTEND_FROM + 3]
    assert planned.many.merge_rows.tolist() == planned.many_rows.tolist() == list(range(1, EXTEND_FROM + 1))


def test_every_row_is_planned_once_by_the_backend_of_the_gpu() -> None:
    cpu = torch.device("cpu")
    backend = TritonAttention(shape=shape_of(4, 32, 16, 16, cpu), device=cpu, extend_from=8, absorbed_each=0)
    pieces, positions = step(1, 9, 3)
    planned = backend.prepare(pieces, positions)
    assert planned.many_rows.tolist() == list(range(1, 10))
    assert planned.few is not None and planned.many is not None
    rows = planned.few.plan.rows
    assert sorted({int(row) // 4 for row in rows[rows >= 0]}) == [0, 10, 11, 12]
    (branch,) = planned.many
    assert (branch.first, branch.count, branch.tokens, branch.seen_first) == (1, 9, 73, 65)


def test_a_long_extend_that_is_no_single_path_of_full_pages_runs_absorbed() -> None:
    cpu = torch.device("cpu")
    backend = TritonAttention(shape=shape_of(4, 32, 16, 16, cpu), device=cpu, extend_from=8, absorbed_each=0)
    rows = np.arange(9, dtype=np.int32)
    ragged: list[Piece] = [Part(TRUNK, 0, 63, rows, False), Part(TRUNK + 9, 63, 9, rows, True)]
    planned = backend.prepare(ragged, np.arange(63, 72, dtype=np.int64))
    assert planned.many is None and not planned.many_rows.numel()
    assert planned.few is not None and planned.few.plan.rows.max() == 35
