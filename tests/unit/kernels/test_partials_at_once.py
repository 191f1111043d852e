"""Rows of a batch-invariant step run together as far as their partials have room, which blocks take full or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentspeed_kernels.testing import conformance
from agentspeed_kernels.tiles import Piece
from agentspeed_kernels.triton.attention import AttentionShape, plan_step
from agentspeed_kernels.triton.backend import grouped_shape_of, shape_of, split_rows

PAGE, CONTEXT, WIDTH = 16, 2000, 64


def step(branches: int, new: int) -> tuple[list[Piece], np.ndarray]:
    """Branches of `CONTEXT` tokens, the last `new` of which are rows."""
    pages = np.zeros(-(-CONTEXT // PAGE), np.int32)
    rows = np.arange(branches * new, dtype=np.int32).reshape(branches, new)
    pieces = [conformance.piece(pages, 0, CONTEXT, mine, True) for mine in rows]
    return pieces, np.tile(np.arange(CONTEXT - new, CONTEXT, dtype=np.int64), branches)


def taken(pieces: list[Piece], positions: np.ndarray, shape: AttentionShape) -> int:
    """Bytes of the partials of a plan."""
    plan, form = plan_step(pieces, positions, shape, cut="fixed")
    return plan.slots * form.block_rows * (shape.groups or 1) * WIDTH * 4


@pytest.mark.parametrize("new", [1, 7, 40])
@pytest.mark.parametrize(("heads", "groups"), [(16, 16), (6, 2), (32, 1), (16, None), (40, None), (100, None)])
def test_rows_that_run_at_once_have_room(heads: int, groups: int | None, new: int) -> None:
    given = PAGE, torch.device("cpu")
    shape = shape_of(heads, WIDTH, 16, *given) if groups is None else grouped_shape_of(heads, groups, WIDTH, *given)
    pieces, positions = step(9, new)
    most = 3 * taken(*step(1, 1), shape)
    lists = [list(some) for some in split_rows(pieces, shape, most)]
    assert max(taken(some, positions, shape) for some in lists) <= most
    rows = np.concatenate([piece.queries for some in lists for piece in some])
    assert np.array_equal(rows, np.arange(positions.size))
    assert len(lists) < positions.size, "several run at once"
