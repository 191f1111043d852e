"""A plan in the memory of a padded shape computes what it computes in its own, also in place of another one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tests.triton_interpreter as _interpreter  # noqa: F401 - before any kernel
from agentspeed_kernels.attention import Part
from agentspeed_kernels.triton import attention
from agentspeed_kernels.triton.attention import AttentionShape
from agentspeed_kernels.triton.padded import PaddedShape, PlanMemory, padded, shape_for
from agentspeed_kernels.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

CPU = torch.device("cpu")
SHAPE = AttentionShape(heads=4, rank=32, rope=16, page_tokens=16, processors=5, hopper=False)


def step(contexts: list[int], shared: int) -> tuple[list[Part], np.ndarray]:
    """One new token of each branch, below `shared` tokens that all of them read."""
    rows = np.arange(len(contexts), dtype=np.int32)
    pieces = [Part(np.arange(-(-shared // 16), dtype=np.int32), 0, shared, rows, False)] if shared else []
    at, positions = 10, []
    for row, tokens in enumerate(contexts):
        pages = np.arange(at, at - (-tokens // 16), dtype=np.int32)
        at += pages.size
        pieces.append(Part(pages, shared, tokens, rows[row : row + 1], True))
        positions.append(shared + tokens - 1)
    return pieces, np.array(positions, np.int64)


def computed(q: torch.Tensor, pool: torch.Tensor, plan: attention.RowsOnDevice) -> torch.Tensor:
    out = torch.zeros(q.shape[0], 4, 32)
    attention.mla_rows(q, pool, plan, 0.2, Workspace(), out)
    return out


STEPS = ([([40, 7, 90], 0), ([41, 8, 91], 0), ([17, 33], 0), ([5], 0)], [([20, 3, 9], 32), ([70, 4, 10], 32)])


@pytest.mark.parametrize("steps", STEPS, ids=["apart", "below a trunk"])
def test_plans_that_take_each_others_place_compute_what_they_compute_alone(
    steps: list[tuple[list[int], int]],
) -> None:
    noise = torch.Generator().manual_seed(1)
    pool = torch.randn(40, 16, 48, generator=noise)
    memory: dict[PaddedShape, PlanMemory] = {}
    for contexts, shared in steps:
        pieces, positions = step(contexts, shared)
        q = torch.randn(4, 4, 48, generator=noise)
        plan, form = attention.plan_step(pieces, positions, SHAPE)
        shape = shape_for(plan, form, 4, SHAPE)
        assert shape is not None
        if shape not in memory:
            memory[shape] = PlanMemory(shape, CPU)
        alone = computed(q, pool, attention.upload(plan, form, CPU))
        again = computed(q, pool, memory[shape].load(padded(plan, shape)))
        assert torch.equal(again, alone)
    assert len(memory) < len(steps), "some of the plans had one shape"


def test_what_has_no_room_in_a_padded_shape_runs_as_it_is() -> None:
    pieces, positions = step([16 * 100], 0)
    plan, form = attention.plan_step(pieces, positions, SHAPE)
    assert shape_for(plan, form, 1, SHAPE) is not None
    assert shape_for(plan, form, 0, SHAPE) is None


def test_forks_of_a_large_model_have_a_padded_shape_of_the_gluon_kernel() -> None:
    shape = AttentionShape(heads=16, rank=512, rope=64, page_tokens=64, processors=132, hopper=True)
    rows = np.arange(8, dtype=np.int32)
    trunk = Part(np.arange(512, dtype=np.int32), 0, 512 * 64, rows, False)
    tails = [Part(np.array([600 + row], np.int32), 512 * 64, 9, rows[row : row + 1], True) for row in range(8)]
    plan, form = attention.plan_step([trunk, *tails], np.full(8, 512 * 64 + 8, np.int64), shape)
    found = shape_for(plan, form, 8, shape)
    assert form.hopper and found is not None
    wide = padded(plan, found)
    assert wide.programs == found.programs == 132
    assert (np.diff(wide.bounds) >= 0).all() and wide.bounds[-1] == plan.bounds[-1], "the rest have no items"
