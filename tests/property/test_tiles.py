"""Tiles cover attention exactly: every pair (row, token it may see) once, whatever the tree and the sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agentspeed_kernels.tiles import Align, Int32s, Int64s, TilePlan, plan_tiles


@dataclass(frozen=True)
class Piece:
    pages: Int32s
    start: int
    tokens: int
    queries: Int32s
    causal: bool


@dataclass(frozen=True)
class Step:
    pieces: tuple[Piece, ...]
    positions: Int64s
    page_tokens: int


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Branches that share a prefix, each with a tail of its own whose last tokens are new."""
    page_tokens = draw(st.sampled_from([1, 2, 4, 8]))
    shared = draw(st.integers(0, 20))
    branches = draw(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 12)), min_size=1, max_size=4))
    free = iter(draw(st.permutations(range(200))))
    positions: list[int] = []
    tails: list[Piece] = []
    for held, new in branches:
        queries = np.arange(len(positions), len(positions) + new, dtype=np.int32)
        positions += range(shared + held, shared + held + new)
        tails.append(Piece(some_pages(free, held + new, page_tokens), shared, held + new, queries, True))
    everyone = np.arange(len(positions), dtype=np.int32)
    prefix = [Piece(some_pages(free, shared, page_tokens), 0, shared, everyone, False)] if shared else []
    return Step((*prefix, *tails), np.array(positions, dtype=np.int64), page_tokens)


def some_pages(free: object, tokens: int, page_tokens: int) -> Int32s:
    return np.array([next(free) for _ in range(-(-tokens // page_tokens))], dtype=np.int32)  # type: ignore[call-overload]


def wanted_pairs(step: Step) -> Counter[tuple[int, int, int]]:
    """(row, page, offset in page) of every token a row may see."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for piece in step.pieces:
        for row in piece.queries.tolist():
            seen = int(step.positions[row]) - piece.start + 1 if piece.causal else piece.tokens
            for token in range(min(seen, piece.tokens)):
                pairs[row, int(piece.pages[token // step.page_tokens]), token % step.page_tokens] += 1
    return pairs


def planned_pairs(plan: TilePlan, page_tokens: int) -> Counter[tuple[int, int, int]]:
    """Read back from the flat arrays, as a kernel in C does."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for tile in range(plan.count):
        pages = plan.pages[plan.page_at[tile] : plan.page_at[tile + 1]]
        for entry in range(plan.row_at[tile], plan.row_at[tile + 1]):
            assert 1 <= plan.visible[entry] <= plan.tokens[tile]
            for token in range(plan.visible[entry]):
                place = int(plan.offset[tile]) + token
                pairs[int(plan.rows[entry]), int(pages[place // page_tokens]), place % page_tokens] += 1
    return pairs


@settings(deadline=None)
@given(steps(), st.integers(1, 16), st.integers(1, 9), st.sampled_from(["page", "query"]))
def test_every_visible_pair_is_in_exactly_one_tile(step: Step, chunk: int, block: int, align: Align) -> None:
    plan = plan_tiles(
        step.pieces, step.positions, page_tokens=step.page_tokens, chunk_tokens=chunk, block_rows=block, align=align
    )
    pairs = planned_pairs(plan, step.page_tokens)
    assert pairs == wanted_pairs(step)
    assert set(pairs.values()) == {1}


@settings(deadline=None)
@given(steps(), st.integers(1, 16), st.integers(1, 9))
def test_every_entry_is_merged_once_into_its_own_row(step: Step, chunk: int, block: int) -> None:
    plan = plan_tiles(step.pieces, step.positions, page_tokens=step.page_tokens, chunk_tokens=chunk, block_rows=block)
    assert sorted(plan.merge.tolist()) == list(range(plan.entries))
    for index, row in enumerate(plan.merge_rows.tolist()):
        entries = plan.merge[plan.merge_at[index] : plan.merge_at[index + 1]]
        assert set(plan.rows[entries].tolist()) == {row}


@settings(deadline=None)
@given(steps(), st.integers(1, 16), st.integers(1, 9), st.sampled_from(["page", "query"]))
def test_the_tile_views_say_what_the_flat_arrays_say(step: Step, chunk: int, block: int, align: Align) -> None:
    plan = plan_tiles(
        step.pieces, step.positions, page_tokens=step.page_tokens, chunk_tokens=chunk, block_rows=block, align=align
    )
    for index, tile in enumerate(plan.tiles):
        assert tile.tokens == plan.tokens[index] <= chunk
        assert tile.rows.size == plan.row_at[index + 1] - plan.row_at[index] <= block
        if tile.shape == "full":
            assert (tile.visible == tile.tokens).all()
        if tile.shape == "diagonal":
            assert tile.visible.tolist() == list(range(1, tile.tokens + 1))
        assert tile.contiguous == (tile.pages.tolist() == list(range(tile.pages[0], tile.pages[0] + tile.pages.size)))
