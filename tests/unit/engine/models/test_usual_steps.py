"""The steps that graphs are captured of: they write nothing, read one page, and stay within a pool."""

from __future__ import annotations

import numpy as np
import pytest

from agentspeed_engine.models.usual_steps import usual_steps
from agentspeed_kernels.triton.attention import AttentionShape, plan_step
from agentspeed_kernels.triton.padded import PaddedShape, shape_for

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
STEPS = list(usual_steps(ROWS, 8192, 100_000, 64))


def test_a_step_that_is_rehearsed_writes_nothing_and_reads_page_0_alone() -> None:
    for step in STEPS:
        assert (step.slots == -1).all() and step.select.tolist() == list(range(len(step.ids)))
        assert all((run.pages == 0).all() and len(run.pages) == -(-run.tokens // 64) for run in step.runs)


def test_every_row_reads_all_that_is_before_it_and_no_step_more_than_the_pool() -> None:
    for step in STEPS:
        seen = np.zeros(len(step.ids), np.int64)
        for run in step.runs:
            last = step.positions[run.queries] + 1 - run.start
            seen[run.queries] += np.minimum(last, run.tokens) if run.causal else run.tokens
        assert (seen == step.positions + 1).all()
        assert sum(run.tokens for run in step.runs) <= 100_000 + 64 * len(step.ids)


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_the_usual_steps_of_a_large_model_share_few_graphs(heads: int) -> None:
    shape = AttentionShape(heads=heads, rank=512, rope=64, page_tokens=64, processors=132, hopper=True)
    found: set[PaddedShape] = set()
    for step in STEPS:
        plan, form = plan_step(step.runs, step.positions, shape)
        padded = shape_for(plan, form, len(step.ids), shape)
        assert padded is not None
        found.add(padded)
    assert len(found) <= 120
