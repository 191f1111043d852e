"""Cuts a step's attention into tiles (a block of query rows × a range of cached tokens), once for all layers.

The rule: every pair (row, token the row may see) is in exactly one tile. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
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
@dataclass(frozen=True, eq=False)
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
    starts: tuple[int, ...]
    """Position of each tile's first token."""
    addresses: tuple[int, ...]
    """Of the int32 arrays above, in order: looked up once a step, not once a layer."""

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Made when they are first asked for: kernels that take the arrays need none."""
        return tuple(self._tile(index) for index in range(self.count))

    def _tile(self, index: int) -> Tile:
        at = slice(self.row_at[index], self.row_at[index + 1])
        rows, visible, tokens = self.rows[at], self.visible[at], int(self.tokens[index])
        pages = self.pages[self.page_at[index] : self.page_at[index + 1]]
        shape: Literal["full", "diagonal", "ragged"] = "ragged"
        if int(visible.min()) == tokens:
            shape = "full"
        elif rows.size == tokens and bool((visible == np.arange(1, tokens + 1)).all()):
            shape = "diagonal"
        return Tile(
            start=self.starts[index],
            pages=pages,
            offset=int(self.offset[index]),
            tokens=tokens,
            rows=rows,
            visible=visible,
            shape=shape,
            contiguous=bool((np.diff(pages) == 1).all()),
        )

    @property
    def entries(self) -> int:
        return int(self.rows.size)


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
    cut = _Cut()
    for piece in pieces:
        cut.add(piece, positions, page_tokens, chunk_tokens, block_rows, align)
    return cut.plan()


@final
@dataclass(slots=True)
class _Cut:
    """Tiles as lists: a step of many branches has hundreds, so each costs a few appends and no array of its own."""

    starts: list[int] = field(default_factory=list[int])
    offset: list[int] = field(default_factory=list[int])
    tokens: list[int] = field(default_factory=list[int])
    pages: list[Int32s] = field(default_factory=list[Int32s])
    rows: list[Int32s] = field(default_factory=list[Int32s])
    partly: list[tuple[int, Int64s]] = field(default_factory=list[tuple[int, Int64s]])
    """Tiles of which not every row sees all tokens, and how many each sees."""

    def add(
        self, piece: Piece, positions: Int64s, page_tokens: int, chunk_tokens: int, block_rows: int, align: Align
    ) -> None:
        seen = _seen(piece, positions)
        for first in range(0, piece.queries.size, block_rows):
            rows, seen_by = piece.queries[first : first + block_rows], seen[first : first + block_rows]
            least, most = (int(seen_by[0]),) * 2 if rows.size == 1 else (int(seen_by.min()), int(seen_by.max()))
            before = least - 1 if align == "query" and piece.causal else 0
            for low, high in _ranges(most, max(before, 0), chunk_tokens):
                if least >= high:
                    self._append(piece, low, high, rows, page_tokens)
                    continue
                visible = np.clip(seen_by - low, 0, high - low)
                sees = visible > 0
                if sees.any():
                    self.partly.append((len(self.tokens), visible[sees]))
                    self._append(piece, low, high, rows[sees], page_tokens)

    def _append(self, piece: Piece, low: int, high: int, rows: Int32s, page_tokens: int) -> None:
        self.starts.append(piece.start + low)
        self.offset.append(low % page_tokens)
        self.tokens.append(high - low)
        self.pages.append(piece.pages[low // page_tokens : -(-high // page_tokens)])
        self.rows.append(rows)

    def plan(self) -> TilePlan:
        sizes = [rows.size for rows in self.rows]
        rows, row_at = _joined(self.rows), _bounds(sizes)
        tokens = np.array(self.tokens, dtype=np.int32)
        visible = np.repeat(tokens, sizes)
        for index, seen in self.partly:
            visible[row_at[index] : row_at[index + 1]] = seen
        counts = np.bincount(rows)
        occur = np.flatnonzero(counts)
        arrays = (
            _bounds([pages.size for pages in self.pages]),
            _joined(self.pages),
            np.array(self.offset, dtype=np.int32),
            tokens,
            row_at,
            rows,
            visible,
            occur,
            _bounds(counts[occur].tolist()),
            np.argsort(rows, kind="stable"),
        )
        # In one piece of memory: an array's address costs as much as making a small one.
        flat = np.concatenate(arrays, dtype=np.int32, casting="same_kind")
        ends = list(accumulate((array.size for array in arrays), initial=0))
        address = flat.ctypes.data
        page_at, pages, offset, tokens, row_at, rows, visible, merge_rows, merge_at, merge = (
            flat[begin:end] for begin, end in pairwise(ends)
        )
        return TilePlan(
            count=len(self.tokens),
            page_at=page_at,
            pages=pages,
            offset=offset,
            tokens=tokens,
            row_at=row_at,
            rows=rows,
            visible=visible,
            merge_rows=merge_rows,
            merge_at=merge_at,
            merge=merge,
            starts=tuple(self.starts),
            addresses=tuple(address + flat.itemsize * begin for begin in ends[:-1]),
        )


def _seen(piece: Piece, positions: Int64s) -> Int64s:
    """How many tokens of the piece each of its queries sees."""
    if not piece.causal:
        return np.full(piece.queries.size, piece.tokens, dtype=np.int64)
    if piece.queries.size == 1:
        seen = int(positions[piece.queries[0]]) - piece.start + 1
        return np.array([min(max(seen, 0), piece.tokens)], dtype=np.int64)
    return np.clip(positions[piece.queries] - piece.start + 1, 0, piece.tokens)


def _ranges(end: int, cut: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """[0, cut) and [cut, end), each in chunks."""
    for low, high in ((0, min(cut, end)), (cut, end)):
        for at in range(low, high, chunk_tokens):
            yield at, min(at + chunk_tokens, high)


def _bounds(sizes: Sequence[int]) -> Int32s:
    return np.array(list(accumulate(sizes, initial=0)), dtype=np.int32)


def _joined(parts: Sequence[Int32s]) -> Int32s:
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else np.zeros(0, np.int32)
