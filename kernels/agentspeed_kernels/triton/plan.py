"""Cuts a step's latent attention into items of equal work, as flat arrays: NumPy alone, some tens of microseconds.

A segment is a stretch of cached tokens with the queries that read it. Its rows (query, head) are packed into blocks of
R rows; blocks are cut along the tokens, at page borders, so that every program gets about the same number of pages.
Heads are kept together as *units*: the largest divisor of the head count that fits a block.

Rule: every pair (row, token the row may see) is in exactly one item, and every row with more than one item is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import numpy as np

from agentspeed_kernels.tiles import Int32s, Int64s, Piece

Cut = Literal["even", "stream", "fixed"]
FIELDS = 8
BLOCK, PAGE_AT, TOKENS, SLOT, FIRST_ROW, ROWS, BEFORE = range(7)
"""Fields of an item: its block, where its pages begin, how many tokens it reads, its partial slot (-1: it writes the
result), the block's first row and count of rows, and how many of the segment's tokens come before it."""
SWITCH_PAGES, SWITCH_PAGES_WIDE = 3, 6
"""What starting another item costs a program, in pages of work: for blocks of up to 32 rows, and for wider ones, whose
partials are larger (measured, docs/performance.md)."""
WIDE_ROWS = 33
STREAM_GAIN = 1.08
"""A stream must be this much shorter than the even cut: its blocks are in more pieces, and of blocks that read the same
pages at the same time only the first reads memory."""
FIXED_STEPS = ((4096, 256), (32_768, 1024), (None, 4096))
"""Tokens of an item of the fixed cut, up to so many tokens of context. Short ones where a step of one row would leave
most of a device without work, longer ones where each more is a partial more to merge."""
FIXED_TAKE = 16
"""Partials that are merged at once under the fixed cut, however many a row has: another number is another order."""
SPARE_PAGES = 4
"""Room behind the pages of a segment, so that decode steps extend a plan instead of making one."""
_ROOM = SPARE_PAGES + 1
"""Entries behind the pages of a segment: kernels read the page of the tile after an item's last one, which may be one
entry past a segment that has used its room up."""


class Layout(Protocol):
    """What of a kernel's form the plan depends on."""

    @property
    def block_rows(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def programs(self) -> int: ...


@final
@dataclass(slots=True, eq=False)
class RowsPlan:
    """Int32 arrays for one launch of rows and one of merge. `extend` changes it in place; nothing else does."""

    items: Int32s
    """[n, 8]"""
    bounds: Int32s
    """[programs + 1]: program i does items bounds[i] to bounds[i + 1]."""
    rows: Int32s
    """[blocks, R], -1 where a block has fewer."""
    visible: Int32s
    """[blocks, R]: how many of its segment's tokens a row sees."""
    pages: Int32s
    slots: int
    """Partial slots, of R rows each."""
    unit: int
    unit_row: Int32s
    """[units to merge]"""
    table: Int32s
    """[units to merge, parts]: first partial row of each part, -1 where a unit has fewer; a multiple of what `merge`
    takes at once."""
    one: bool
    """Program i does item i."""
    run: bool
    """The rows of every block follow one another."""
    edge: bool
    """Some row sees fewer tokens than its item has."""
    fixed: bool
    """The cut depends on positions alone, and so does how partials are merged."""
    tokens_read: int
    """Tokens of all items, each as often as a block reads it."""
    tails: _Tails

    @property
    def programs(self) -> int:
        return self.bounds.size - 1

    def extend(self, more: Int64s, pages: Sequence[Int32s]) -> bool:
        """Adds `more[s]` tokens and `pages[s]` new pages to segment s, seen by all its rows; False if it has no room.

        What a decode step does to plans whose segments have one query each: the last item of every segment grows. When
        it says no, nothing has changed and a new plan is due."""
        tails = self.tails
        if tails is None or self.edge or more.size != tails.tokens.size:
            return False
        used = np.array([new.size for new in pages], dtype=np.int32)
        if (tails.spare < used).any() or (tails.tokens + more > (tails.held + used) * tails.page_tokens).any():
            return False
        for segment in np.flatnonzero(used).tolist():
            at = tails.pages_end[segment]
            self.pages[at : at + used[segment]] = pages[segment]
        tails.tokens += more
        tails.held += used
        tails.spare -= used
        tails.pages_end += used
        self.items[tails.item, TOKENS] += more[tails.segment].astype(np.int32)
        self.visible[tails.block] += more[tails.segment].astype(np.int32)[:, None]
        self.tokens_read += int(more[tails.segment].sum())
        return True


@final
@dataclass(slots=True, eq=False)
class _Tails:
    """Where segments end, for `RowsPlan.extend`; item, segment and block are one entry per block."""

    item: Int64s
    block: Int64s
    segment: Int64s
    tokens: Int64s
    held: Int64s
    spare: Int64s
    pages_end: Int64s
    page_tokens: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Stretches of context as flat arrays; `queries[query_at[s]:query_at[s+1]]` read segment s."""

    tokens: Int64s
    pages: Int32s
    """Each segment's pages followed by room for SPARE_PAGES more, and an entry that stays 0."""
    page_at: Int64s
    held: Int64s
    """Pages of each segment without the room."""
    queries: Int64s
    query_at: Int64s
    visible: Int64s
    """Of each query: how many tokens, from the first, it sees."""


def segments(pieces: Sequence[Piece], positions: Int64s, page_tokens: int) -> Segments:
    """Joins neighbouring pieces that the same queries read, where the earlier one ends at a page border."""
    chains: dict[bytes, list[Piece]] = {}
    finished: list[list[Piece]] = []
    for piece in pieces:
        if not piece.tokens or not piece.queries.size:
            continue
        key = piece.queries.tobytes()
        open_chain = chains.get(key)
        if open_chain is not None and _follows(open_chain[-1], piece, page_tokens):
            open_chain.append(piece)
            continue
        chain = [piece]
        chains[key] = chain
        finished.append(chain)
    held = np.array([sum(-(-piece.tokens // page_tokens) for piece in chain) for chain in finished], dtype=np.int64)
    room = np.zeros(_ROOM, np.int32)
    parts = [array for chain in finished for array in (*(_own_pages(piece, page_tokens) for piece in chain), room)]
    counts = [chain[0].queries.size for chain in finished]
    queries = _joined([chain[0].queries for chain in finished]).astype(np.int64)
    before = np.array([sum(piece.tokens for piece in chain[:-1]) for chain in finished], dtype=np.int64)
    last = [chain[-1] for chain in finished]
    tokens = before + np.array([piece.tokens for piece in last], dtype=np.int64)
    causal = np.array([piece.causal for piece in last], dtype=bool)
    start = np.array([piece.start for piece in last], dtype=np.int64)
    of = np.repeat(np.arange(len(finished)), counts)
    seen = np.clip(positions[queries] - start[of] + 1, 0, None) + before[of]
    visible = np.where(causal[of], np.minimum(seen, tokens[of]), tokens[of])
    return Segments(
        tokens=tokens,
        pages=_joined(parts),
        page_at=_starts(held + _ROOM)[:-1],
        held=held,
        queries=queries,
        query_at=_starts(np.array(counts, dtype=np.int64)),
        visible=visible,
    )


def _follows(earlier: Piece, later: Piece, page_tokens: int) -> bool:
    """Both are one stretch: nothing of the earlier is hidden from a query, and its last page is full."""
    return not earlier.causal and earlier.tokens % page_tokens == 0 and later.start == earlier.start + earlier.tokens


def _own_pages(piece: Piece, page_tokens: int) -> Int32s:
    return piece.pages[: -(-piece.tokens // page_tokens)]


def plan_rows(held: Segments, layout: Layout, *, cut: Cut | None = None) -> RowsPlan:
    """The cheapest of an even cut (one item a program) and a balanced stream, or the one that `cut` names.

    `cut="fixed"` cuts every segment at the places of `FIXED_STEPS` and never says what the kernel may skip, so that one
    compiled form runs whatever else is in the step."""
    R, heads, page_tokens = layout.block_rows, layout.heads, layout.page_tokens
    unit = unit_rows(heads, R)
    per_query, per_block = heads // unit, R // unit
    # Units of all segments on one axis, then blocks of `per_block` of them; a block never crosses a segment.
    counts = np.diff(held.query_at)
    units_at = held.query_at * per_query
    unit_row = (held.queries[:, None] * heads + np.arange(per_query) * unit).reshape(-1)
    unit_sees = np.repeat(held.visible, per_query)
    blocks_of = -(-counts * per_query // per_block)
    segment = np.repeat(np.arange(counts.size), blocks_of)
    nth = np.arange(segment.size) - np.repeat(_starts(blocks_of)[:-1], blocks_of)
    at = (units_at[segment] + nth * per_block)[:, None] + np.arange(per_block)
    there = at < units_at[segment + 1][:, None]
    at = np.where(there, at, 0)
    sees = np.where(there, unit_sees[at], 0)
    tokens = sees.max(1, initial=0)
    pages = -(-tokens // page_tokens)
    rows = np.full((segment.size, R), -1, np.int32)
    rows[:, : per_block * unit] = np.where(there[:, :, None], unit_row[at][:, :, None] + np.arange(unit), -1).reshape(
        segment.size, -1
    )
    visible = np.zeros((segment.size, R), np.int32)
    visible[:, : per_block * unit] = np.repeat(sees, unit, axis=1)

    switch = SWITCH_PAGES_WIDE if R >= WIDE_ROWS else SWITCH_PAGES
    fixed = cut == "fixed"
    if fixed:
        block, low, high, bounds = _fixed(pages, segment, layout.programs, page_tokens)
    else:
        block, low, high, bounds = _cut(pages, segment, layout.programs, cut, switch)
    items = np.zeros((block.size, FIELDS), np.int32)
    before = low * page_tokens
    items[:, BLOCK] = block
    items[:, PAGE_AT] = held.page_at[segment[block]] + low
    items[:, TOKENS] = np.minimum(tokens[block], high * page_tokens) - before
    items[:, BEFORE] = before
    items[:, FIRST_ROW] = rows[block, 0]
    filled = there.sum(1) * unit
    items[:, ROWS] = filled[block]

    # A unit is merged when more than one item writes it; a block goes through partials when one of its units does.
    number = np.where(there, unit_row[at] // unit, -1)
    written = number[block]
    times = np.bincount(written[written >= 0], minlength=1)
    many = (there & (times[np.maximum(number, 0)] > 1)).any(axis=1)
    split = np.asarray(many)[block]
    slots = int(split.sum())
    items[:, SLOT] = np.where(split, np.cumsum(split) - 1, -1)
    merged_row, table = _merge_table(written[split], items[split, SLOT], unit, R, FIXED_TAKE if fixed else None)
    last = np.zeros(segment.size, np.int64)
    np.maximum.at(last, block, np.arange(block.size)) if block.size else None
    return RowsPlan(
        items=items,
        bounds=bounds.astype(np.int32),
        rows=rows,
        visible=visible,
        pages=held.pages,
        slots=slots,
        unit=unit,
        unit_row=merged_row,
        table=table,
        one=not fixed and bool((np.diff(bounds) == 1).all()),
        run=not fixed
        and bool(
            (
                rows[:, : per_block * unit]
                == np.where(
                    np.arange(per_block * unit) < filled[:, None], rows[:, :1] + np.arange(per_block * unit), -1
                )
            ).all()
        ),
        edge=fixed or bool((np.where(there, sees, tokens[:, None]) != tokens[:, None]).any()),
        fixed=fixed,
        tokens_read=int(items[:, TOKENS].sum()),
        tails=_Tails(
            item=last,
            block=np.arange(segment.size),
            segment=segment,
            tokens=held.tokens.copy(),
            held=held.held.copy(),
            spare=np.full(counts.size, SPARE_PAGES, np.int64),
            pages_end=held.page_at + held.held,
            page_tokens=page_tokens,
        ),
    )


def unit_rows(heads: int, block_rows: int) -> int:
    """Rows of one query that stay together: the largest divisor of `heads` that fits a block."""
    return max(size for size in range(1, min(heads, block_rows) + 1) if heads % size == 0)


def _cut(
    pages: Int64s, segment: Int64s, programs: int, cut: Cut | None, switch: int
) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """(block, first page, end page) of each item in the order of programs, and the bounds of programs."""
    if not pages.size:
        none = np.zeros(0, np.int64)
        return none, none, none, np.zeros(2, np.int64)
    step = _least_step(pages, programs)
    stream = -(-int(pages.sum() + switch * pages.size) // programs)
    if cut == "even" or (cut is None and step is not None and step <= STREAM_GAIN * stream):
        step = step or int(pages.max())
        block, low, high = _pieces(pages, segment, np.maximum(-(-pages // step), 1))
        return block, low, high, _even_bounds(block.size, programs)
    return _stream(pages, stream, switch)


def _least_step(pages: Int64s, programs: int) -> int | None:
    """The smallest number of pages an item may have so that there are at most `programs` items."""
    if pages.size > programs:
        return None
    low, high = 1, int(pages.max())
    while low < high:
        middle = (low + high) // 2
        if int((-(-pages // middle)).sum()) <= programs:
            high = middle
        else:
            low = middle + 1
    return low


def _fixed(pages: Int64s, segment: Int64s, programs: int, page_tokens: int) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """What `_cut` gives, each block cut at fixed places and programs with about as many pages each."""
    starts = fixed_starts(int(pages.max(initial=0)), page_tokens)
    block, nth = _numbered(np.searchsorted(starts, pages))
    low, high = starts[nth], np.minimum(np.append(starts, pages.max(initial=0))[nth + 1], pages[block])
    order = np.lexsort((block, nth, segment[block]))
    block, low, high = block[order], low[order], high[order]
    done = np.cumsum(high - low)
    shares = np.arange(1, programs) * (int(done[-1]) if done.size else 0) // programs
    bounds = np.concatenate([np.zeros(1, np.int64), np.searchsorted(done, shares), np.array([done.size])])
    return block, low, high, bounds


def fixed_starts(pages: int, page_tokens: int) -> Int64s:
    """The first page of every item of the fixed cut below `pages`; fewer pages have the first of them."""
    found, first = [], 0
    for until, tokens in FIXED_STEPS:
        end = pages if until is None else min(pages, until // page_tokens)
        found.append(np.arange(first, end, max(tokens // page_tokens, 1)))
        first = end
    return np.concatenate(found)


def _pieces(pages: Int64s, segment: Int64s, counts: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Every block in `counts` equal pieces; pieces of the same tokens stand side by side."""
    block, nth = _numbered(counts)
    low, high = pages[block] * nth // counts[block], pages[block] * (nth + 1) // counts[block]
    order = np.lexsort((block, nth, segment[block]))
    return block[order], low[order], high[order]


def _numbered(counts: Int64s) -> tuple[Int64s, Int64s]:
    """(whose it is, which of its own it is) of counts[i] things of each i."""
    of = np.repeat(np.arange(counts.size), counts)
    return of, np.arange(of.size) - np.repeat(_starts(counts)[:-1], counts)


def _even_bounds(items: int, programs: int) -> Int64s:
    programs = min(items, programs)
    return np.arange(programs + 1) * items // max(programs, 1)


def _stream(pages: Int64s, share: int, switch: int) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """All blocks on one line, each behind `switch` pages of cost, cut every `share`."""
    begin = _starts(pages + switch)[:-1] + switch
    first, last = begin // share, np.maximum(begin + pages - 1, begin) // share
    counts = last - first + 1
    block = np.repeat(np.arange(pages.size), counts)
    program = first[block] + np.arange(block.size) - np.repeat(_starts(counts)[:-1], counts)
    low = np.maximum(program * share - begin[block], 0)
    high = np.minimum((program + 1) * share - begin[block], pages[block])
    bounds = np.searchsorted(program, np.arange(int(program[-1]) + 2))
    return block, low, high, bounds


def _merge_table(written: Int64s, slot: Int32s, unit: int, block_rows: int, take: int | None) -> tuple[Int32s, Int32s]:
    """(first row, parts) of each unit that `written` [items, units of a block] names, parts in the order of items;
    `take`: what is merged at once, None: what is fastest."""
    if not written.size:
        return np.zeros(0, np.int32), np.zeros((0, 1), np.int32)
    at = (slot.astype(np.int64)[:, None] * block_rows + np.arange(written.shape[1]) * unit).reshape(-1)
    flat = written.reshape(-1)
    at, flat = at[flat >= 0], flat[flat >= 0]
    order = np.argsort(flat, kind="stable")
    numbers, counts = np.unique(flat, return_counts=True)
    index = np.repeat(np.arange(numbers.size), counts)
    nth = np.arange(flat.size) - np.repeat(_starts(counts)[:-1], counts)
    take = take or merge_shape(int(counts.max()))[1]
    table = np.full((numbers.size, -(-int(counts.max()) // take) * take), -1, np.int32)
    table[index, nth] = at[order]
    return (numbers * unit).astype(np.int32), table


def merge_shape(parts: int) -> tuple[int, int, int]:
    """(columns, parts taken at once, warps) for the largest number of partials a row has."""
    if parts <= 4:
        return 512, 2 if parts <= 2 else 4, 4
    if parts <= 8:
        return 256, 8, 4
    if parts <= 16:
        return 256, 16, 2
    if parts <= 32:
        return 64, 32, 1
    return (64, 64, 2) if parts <= 64 else (64, 128, 4)


def _starts(sizes: Int64s) -> Int64s:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _joined(parts: Sequence[Int32s]) -> Int32s:
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else np.zeros(0, np.int32)
