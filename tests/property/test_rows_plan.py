"""The GPU's plan covers attention exactly: every pair (row, token it may see) once, whatever the tree and the cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentspeed_kernels.attention import Part
from agentspeed_kernels.tiles import Piece
from agentspeed_kernels.triton import plan as plan_module
from agentspeed_kernels.triton.plan import (
    BEFORE,
    BLOCK,
    PAGE_AT,
    SLOT,
    SPARE_PAGES,
    TOKENS,
    Cut,
    RowsPlan,
    fixed_starts,
    plan_rows,
    segments,
    unit_rows,
)
from tests.property.test_tiles import Step, steps, wanted_pairs


@dataclass(frozen=True)
class Layout:
    block_rows: int
    heads: int
    page_tokens: int
    programs: int


def planned(plan: RowsPlan, layout: Layout) -> Counter[tuple[int, int, int]]:
    """(row, page, offset) of every token an item lets a row see, read from the arrays as the kernel does."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for item in plan.items[plan.bounds[0] : plan.bounds[-1]]:
        for row, sees in zip(plan.rows[item[BLOCK]], plan.visible[item[BLOCK]], strict=True):
            for token in range(min(int(sees) - int(item[BEFORE]), int(item[TOKENS])) if row >= 0 else 0):
                page = int(plan.pages[item[PAGE_AT] + token // layout.page_tokens])
                pairs[int(row), page, token % layout.page_tokens] += 1
    return pairs


def check_merges(plan: RowsPlan, layout: Layout) -> None:
    """Every row is written once: by its only item, or by the merge of all its partials."""
    direct: Counter[int] = Counter()
    partial: dict[int, set[int]] = {}
    for item in plan.items:
        for place, row in enumerate(plan.rows[item[BLOCK]].tolist()):
            if row >= 0 and item[SLOT] < 0:
                direct[row] += 1
            elif row >= 0:
                partial.setdefault(row, set()).add(int(item[SLOT]) * layout.block_rows + place)
    merged = {
        int(first) + i: {int(at) + i for at in parts if at >= 0}
        for first, parts in zip(plan.unit_row, plan.table, strict=True)
        for i in range(plan.unit)
    }
    assert merged == partial
    assert all(count == 1 for count in direct.values()) and not direct.keys() & merged.keys()


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed cut of contexts as short as those here."""
    monkeypatch.setattr(plan_module, "FIXED_STEPS", ((16, 4), (32, 8), (None, 12)))


@pytest.mark.usefixtures("short_steps")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=steps(),
    heads=st.sampled_from([1, 3, 4, 6]),
    block_rows=st.sampled_from([4, 8, 16]),
    programs=st.integers(1, 9),
    cut=st.sampled_from([None, "even", "stream", "fixed"]),
)
def test_every_pair_of_row_and_visible_token_is_in_exactly_one_item(
    step: Step, heads: int, block_rows: int, programs: int, cut: Cut | None
) -> None:
    layout = Layout(block_rows, heads, step.page_tokens, programs)
    plan = plan_rows(segments(step.pieces, step.positions, step.page_tokens), layout, cut=cut)
    wanted = Counter(
        {
            (row * heads + head, page, offset): count
            for (row, page, offset), count in wanted_pairs(step).items()
            for head in range(heads)
        }
    )
    assert planned(plan, layout) == wanted
    check_merges(plan, layout)
    assert plan.programs <= max(programs, 1) and plan.bounds[-1] == len(plan.items)
    assert plan.one == (cut != "fixed" and all(np.diff(plan.bounds) == 1))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    grown=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    programs=st.integers(1, 9),
)
def test_a_plan_that_grew_with_its_branches_covers_what_a_new_plan_covers(
    tokens: list[int], grown: list[int], programs: int
) -> None:
    layout = Layout(4, 2, 4, programs)
    pages = iter(range(1000))
    held = [[next(pages) for _ in range(-(-count // 4))] for count in tokens]
    plan = plan_of(tokens, held, layout)
    for step in grown:
        more = [(step + i) % 3 for i in range(len(tokens))]
        fresh = [
            [next(pages) for _ in range(-(-(n + m) // 4) - len(own))]
            for n, m, own in zip(tokens, more, held, strict=True)
        ]
        before = planned(plan, layout)
        if not plan.extend(np.array(more, np.int64), [np.array(new, np.int32) for new in fresh]):
            assert planned(plan, layout) == before
            break
        tokens = [n + m for n, m in zip(tokens, more, strict=True)]
        held = [own + new for own, new in zip(held, fresh, strict=True)]
        assert planned(plan, layout) == planned(plan_of(tokens, held, layout), layout)


def plan_of(tokens: list[int], held: list[list[int]], layout: Layout) -> RowsPlan:
    pieces: list[Piece] = [
        Part(np.array(pages, np.int32), 0, count, np.array([i], np.int32), True)
        for i, (count, pages) in enumerate(zip(tokens, held, strict=True))
    ]
    positions = np.array([count - 1 for count in tokens], np.int64)
    return plan_rows(segments(pieces, positions, layout.page_tokens), layout)


def test_a_plan_grows_by_its_spare_pages_and_then_asks_for_a_new_one() -> None:
    layout = Layout(4, 2, 4, 3)
    plan = plan_of([4], [[0]], layout)
    for page in range(SPARE_PAGES):
        assert plan.extend(np.array([4], np.int64), [np.array([10 + page], np.int32)])
    assert not plan.extend(np.array([1], np.int64), [np.array([99], np.int32)])


def test_behind_a_plan_that_has_used_its_spare_pages_up_the_entry_that_kernels_read_ahead_is_there() -> None:
    layout = Layout(4, 2, 4, 1)
    plan = plan_of([4, 4], [[7], [8]], layout)
    for _ in range(SPARE_PAGES):
        assert plan.extend(np.array([4, 4], np.int64), [np.array([9], np.int32)] * 2)
    ends = plan.items[:, PAGE_AT] + plan.items[:, TOKENS] // layout.page_tokens
    assert plan.pages[ends].tolist() == [0, 0]


@pytest.mark.parametrize(("heads", "block", "unit"), [(16, 16, 16), (128, 64, 64), (20, 16, 10), (6, 16, 6), (7, 4, 1)])
def test_a_unit_is_the_largest_divisor_of_the_heads_that_fits_a_block(heads: int, block: int, unit: int) -> None:
    assert unit_rows(heads, block) == unit


def test_branches_that_share_no_rows_but_follow_one_another_are_one_segment() -> None:
    rows = np.array([0], np.int32)
    pieces = [Part(np.array([3, 4], np.int32), 0, 8, rows, False), Part(np.array([9], np.int32), 8, 3, rows, True)]
    held = segments(pieces, np.array([10], np.int64), 4)
    assert (held.tokens.tolist(), held.held.tolist(), held.visible.tolist()) == ([11], [3], [11])


@pytest.mark.parametrize("page_tokens", [16, 48, 64, 512])
def test_the_fixed_cut_of_a_long_context_begins_with_that_of_a_short_one(page_tokens: int) -> None:
    longest = fixed_starts(max(131_072 // page_tokens, 700), page_tokens)
    assert longest[0] == 0 and (np.diff(longest) > 0).all() and longest.size <= 140
    for pages in (1, 5, 60, 64, 65, 500, 700):
        starts = fixed_starts(pages, page_tokens)
        assert (starts == longest[: starts.size]).all() and (longest[starts.size :] >= pages).all()
