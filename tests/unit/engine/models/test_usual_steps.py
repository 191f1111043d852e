"""The steps that graphs are captured of: they write nothing, read one page, and stay within a pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentspeed_engine.models.usual_steps import SHORT, first_page, long_steps, usual_steps, written
from agentspeed_kernels.triton.attention import AttentionShape, plan_step
from agentspeed_kernels.triton.backend import TritonAttention, shape_of
from agentspeed_kernels.triton.padded import PARTS, PaddedShape, general, shape_for

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CPU = torch.device("cpu")
SHAPE = AttentionShape(heads=16, rank=512, rope=64, page_tokens=64, processors=132, hopper=True)
STEPS = list(usual_steps(ROWS, 8192, 100_000, 64))


def test_a_step_that_is_rehearsed_writes_nothing_and_reads_page_0_alone() -> None:
    for step in STEPS:
        assert (step.slots == -1).all() and set(step.select.tolist()) <= set(range(len(step.ids)))
        assert len(step.select) in (len(step.ids), SHORT)
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
    few = [shape for shape in found if shape.queries <= 64]
    assert len(few) <= 120 and len(found) - len(few) <= 30


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_step_that_is_checked_has_other_tokens_each_turn_and_writes_rows_of_its_own(rows: int) -> None:
    usual = next(step for step in STEPS if len(step.ids) == rows)
    turns = [written(usual, 50, turn) for turn in range(1, 4)]
    assert len({tuple(step.ids.tolist()) for step in turns}) == 3
    for step in turns:
        slots = step.slots[step.slots >= 0].tolist()
        assert slots[0] == 0 and len(set(slots)) == len(slots) and max(slots) < rows
        assert (step.slots < 0).any() == (rows > 1) and step.ids.max() < 50 and step.runs is usual.runs


def test_the_page_that_checked_steps_read_is_written_by_one_step() -> None:
    step = first_page(16, 50)
    assert step.slots.tolist() == step.positions.tolist() == list(range(16)) and len(set(step.ids.tolist())) > 8


def test_steps_of_long_prompts_take_every_form_of_their_kernels_and_stay_within_the_pool() -> None:
    shape = shape_of(16, 512, 64, 64, CPU)
    backend = TritonAttention(shape=shape, device=CPU)
    steps = list(long_steps(8192, 100_000, 64, 3072))
    found = [backend.prepare(step.runs, step.positions) for step in steps]
    assert [one.many_rows.numel() for one in found] == [256, 512, 1024, 2048]
    assert all(one.few is not None and one.many is not None for one in found)
    for step in steps:
        assert (step.slots == -1).all() and step.positions.max() < 8192
        assert sum(run.tokens for run in step.runs) <= 8192
    assert [len(step.ids) for step in long_steps(700, 100_000, 64, 3072)] == [257, 513]


@pytest.mark.parametrize(("most", "lengths"), [(200, [257]), (513, [257, 513, 1025]), (768, [257, 513, 1025])])
def test_forms_that_no_step_of_an_engine_can_have_are_not_compiled(most: int, lengths: list[int]) -> None:
    assert [len(step.ids) for step in long_steps(8192, 100_000, 64, most)] == lengths


def test_what_long_prompts_leave_to_other_kernels_is_of_forms_that_graphs_have() -> None:
    plain = plan_step(STEPS[0].runs, STEPS[0].positions, SHAPE)[0]
    held = general(plain)
    assert (held.one, held.run, held.edge) == (False, False, True) and held.table.shape[1] in PARTS
    assert (held.items == plain.items).all() and held.slots == plain.slots
