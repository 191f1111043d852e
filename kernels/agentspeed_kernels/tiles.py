"""Cuts a step's attention into tiles (a block of query rows × a range of cached tokens), once for all layers.

The rule: every pair (row, token the row may see) is in exactly one tile. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Align = Literal["page", "query"]


class Piece(Protocol):
    """Cached tokens that several rows read (see the engine's `Run`)."""

    @property
    def pages(self) -> Int32s: ...
    @property
    def start(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def queries(self) -> Int32s: ...
    @property
    def causal(self) -> bool: ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """A view of one tile for kernels that go tile by tile."""

    start: int
    """Position of its first token."""
    pages: Int32s
    offset: int
    """Of the first token within the first page."""
    tokens: int
    rows: Int32s
    visible: Int32s
    """How many of the tokens, from the first, each row sees; at least 1."""
    shape: Literal["full", "diagonal", "ragged"]
    """full: every row sees all tokens. diagonal: row i sees i + 1 of as many tokens as rows."""
    contiguous: bool
    """The pages are neighbours in ascending order: the tokens are one view of the pool."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class TilePlan:
    """Flat arrays: tile i has pages `pages[page_at[i]:page_at[i+1]]` and entries `row_at[i]:row_at[i+1]`."""

    count: int
    page_at: Int32s
    pages: Int32s
    offset: Int32s
    tokens: Int32s
    row_at: Int32s
    rows: Int32s
    visible: Int32s
    merge_rows: Int32s
    """The rows that occur, ascending; row `merge_rows[j]` has the partials `merge[merge_at[j]:merge_at[j+1]]`."""
    merge_at: Int32s
    merge: Int32s
    """Entry numbers; entry e writes partial slot e."""
    tiles: tuple[Tile, ...]
    addresses: tuple[int, ...]
    """Of the int32 arrays above, in order: looked up once a step, not once a layer."""

    @property
    def entries(self) -> int:
        return int(self.rows.size)

    @property
    def context_tokens(self) -> int:
        """Cached tokens that are read, each as often as a tile names it."""
        return int(self.tokens.sum())


def plan_tiles(
    pieces: Sequence[Piece],
    positions: Int64s,
    *,
    page_tokens: int,
    chunk_tokens: int,
    block_rows: int,
    align: Align = "page",
) -> TilePlan:
    """Tiles of at most `chunk_tokens` tokens × `block_rows` rows.

    `align="page"` cuts tokens at multiples of `chunk_tokens` from the start of a piece. `align="query"` cuts a causal
    piece at its first query, so that a prompt's own block is a square triangle.
    """
    tiles = [
        tile
        for piece in pieces
        for tile in _piece_tiles(piece, positions, page_tokens, chunk_tokens, block_rows, align)
    ]
    rows = _joined([tile.rows for tile in tiles])
    order = np.argsort(rows, kind="stable").astype(np.int32)
    merge_rows, counts = np.unique(rows, return_counts=True)
    arrays = (
        _bounds([tile.pages.size for tile in tiles]),
        _joined([tile.pages for tile in tiles]),
        np.array([tile.offset for tile in tiles], dtype=np.int32),
        np.array([tile.tokens for tile in tiles], dtype=np.int32),
        _bounds([tile.rows.size for tile in tiles]),
        rows,
        _joined([tile.visible for tile in tiles]),
        merge_rows.astype(np.int32),
        _bounds(counts.tolist()),
        order,
    )
    return TilePlan(len(tiles), *arrays, tiles=tuple(tiles), addresses=tuple(array.ctypes.data for array in arrays))


def _piece_tiles(
    piece: Piece, positions: Int64s, page_tokens: int, chunk_tokens: int, block_rows: int, align: Align
) -> Iterator[Tile]:
    seen = _seen(piece, positions)
    for first in range(0, piece.queries.size, block_rows):
        rows = piece.queries[first : first + block_rows]
        seen_by = seen[first : first + block_rows]
        cut = int(seen_by.min()) - 1 if align == "query" and piece.causal else 0
        for low, high in _ranges(int(seen_by.max()), max(cut, 0), chunk_tokens):
            visible = np.clip(seen_by - low, 0, high - low)
            sees = visible > 0
            if sees.any():
                yield _tile(piece, low, high, rows[sees], visible[sees], page_tokens)


def _seen(piece: Piece, positions: Int64s) -> Int64s:
    """How many tokens of the piece each of its queries sees."""
    if not piece.causal:
        return np.full(piece.queries.size, piece.tokens, dtype=np.int64)
    return np.clip(positions[piece.queries] - piece.start + 1, 0, piece.tokens)


def _ranges(end: int, cut: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """[0, cut) and [cut, end), each in chunks."""
    for low, high in ((0, min(cut, end)), (cut, end)):
        for at in range(low, high, chunk_tokens):
            yield at, min(at + chunk_tokens, high)


def _tile(piece: Piece, low: int, high: int, rows: Int32s, visible: Int64s, page_tokens: int) -> Tile:
    tokens = high - low
    pages = piece.pages[low // page_tokens : -(-high // page_tokens)]
    shape: Literal["full", "diagonal", "ragged"] = "ragged"
    if int(visible.min()) == tokens:
        shape = "full"
    elif rows.size == tokens and bool((visible == np.arange(1, tokens + 1)).all()):
        shape = "diagonal"
    return Tile(
        start=piece.start + low,
        pages=pages,
        offset=low % page_tokens,
        tokens=tokens,
        rows=rows,
        visible=visible.astype(np.int32),
        shape=shape,
        contiguous=bool((np.diff(pages) == 1).all()),
    )


def _bounds(sizes: Sequence[int]) -> Int32s:
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(np.array(sizes, dtype=np.int32), dtype=np.int32)])


def _joined(parts: Sequence[Int32s]) -> Int32s:
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else np.zeros(0, np.int32)
