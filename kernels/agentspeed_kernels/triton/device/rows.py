"""Latent attention of a block of query rows over paged latents, split over the context, in portable Triton.

An item is a block of R query rows × a range of one segment's tokens. Each program walks its items, keeps a running
softmax in float32 and writes either the result (the block has one item) or a partial for `merge`. The same latent tile
serves scores and values. Rows stand on the first axis of the products: for 16 rows this compiles to `mma.sync`, which
keeps more loads in flight on Hopper than `wgmma` with the operands swapped (docs/performance.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ITEM = tl.constexpr(8)
"""int32 fields of an item; see `plan.ItemField`."""
NEVER = tl.constexpr(-1e30)
"""Where a running maximum starts: finite, so that a row which sees nothing never computes inf - inf."""


@triton.jit
def items_of(bounds, program, ONE: tl.constexpr):
    """The first item of a program, and the one after its last. ONE: program i does item i."""
    if ONE:
        first = program
        last = program + 1
    else:
        first = tl.load(bounds + program)
        last = tl.load(bounds + program + 1)
    return first, last


@triton.jit
def item_of(items, item, pages, rows, R: tl.constexpr, RUN: tl.constexpr):
    """Of an item its block, where its pages begin, the first of them, how many tokens it reads, its partial slot, the R
    rows of its block, 0 where it has fewer, and which there are. RUN: they follow one another."""
    block = tl.load(items + item * ITEM)
    page_at = tl.load(items + item * ITEM + 1)
    tokens = tl.load(items + item * ITEM + 2)
    slot = tl.load(items + item * ITEM + 3)
    page = tl.load(pages + page_at)
    r = tl.arange(0, R)
    if RUN:
        row = tl.load(items + item * ITEM + 4) + r
        live = r < tl.load(items + item * ITEM + 5)
    else:
        row = tl.load(rows + block * R + r)
        live = row >= 0
    return block, page_at, page, tokens, slot, tl.where(live, row, 0), live


@triton.jit
def seen_of(visible, items, item, block, tokens, R: tl.constexpr, EDGE: tl.constexpr):
    """How many of an item's tokens each row of its block sees: without EDGE all of them, which is one number."""
    if EDGE:
        sees = tl.load(visible + block * R + tl.arange(0, R)) - tl.load(items + item * ITEM + 6)
        sees = tl.minimum(sees, tokens)
    else:
        sees = tokens
    return sees


@triton.jit
def tile_of(pages, page_at, page, i, T: tl.constexpr, PAGE: tl.constexpr):
    """The first row of tile i, which is in `page`, and the page of the next tile: of the last one no page of the item,
    but plans have an entry there."""
    ahead = tl.load(pages + page_at + (i + 1) // (PAGE // T))
    return page * PAGE + (i % (PAGE // T)) * T, ahead


@triton.jit
def seen_in(token, sees, EDGE: tl.constexpr):
    """Which of a tile's tokens are seen, by each row or by all of them; `sees` as `seen_of` gives it."""
    if EDGE:
        seen = token[None, :] < sees[:, None]
    else:
        seen = (token < sees)[None, :]
    return seen


@triton.jit
def soften(s, peak, scale2):
    """Of a tile's scores [rows, tokens] the shares, what earlier ones shrink by, and the maximum of each row so far."""
    higher = tl.maximum(peak, tl.max(s, 1) * scale2)
    shrink = tl.exp2(peak - higher)
    p = tl.exp2(s * scale2 - higher[:, None])
    return p, shrink, higher


@triton.jit
def weight_of(peak, mass):
    """log2 of a row's sum of exp2: -inf where it saw nothing."""
    return tl.where(mass > 0, peak + tl.log2(tl.where(mass > 0, mass, 1.0)), -float("inf"))


@triton.jit
def attend_rows(
    q,
    latents,
    turned,
    rows,
    visible,
    pages,
    items,
    bounds,
    part,
    part_weight,
    out,
    scale2,
    R: tl.constexpr,
    T: tl.constexpr,
    PAGE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE: tl.constexpr,
    RUN: tl.constexpr,
    EDGE: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """q [rows, RANK + ROPE], out [rows, RANK]; `latents` and `turned` describe the pool as rows of the same width.

    SPLIT: rank and rope are read as two tiles (both are powers of two); else one tile of WIDE columns holds both, and
    columns past the row are zeros. ONE: program i does item i. RUN: the rows of a block follow one another. EDGE: rows
    of an item may see fewer tokens than the item has. scale2 is the softmax scale times log2(e).
    """
    program = tl.program_id(0)
    D: tl.constexpr = RANK + ROPE
    first, last = items_of(bounds, program, ONE)
    r = tl.arange(0, R)
    t = tl.arange(0, T)
    c = tl.arange(0, WIDE)
    if EARLY:
        # Plans are written before a step's first launch. Dependents begin when this kernel ends: merging programs that
        # wait beside running ones cost more than they save.
        gdc_wait()
    for item in range(first, last):
        block, page_at, page, tokens, slot, row, live = item_of(items, item, pages, rows, R, RUN)
        sees = seen_of(visible, items, item, block, tokens, R, EDGE)
        if SPLIT:
            x = tl.arange(0, ROPE)
            q_rank = tl.load(q + row[:, None].to(tl.int64) * D + c[None, :])
            q_rope = tl.load(q + row[:, None].to(tl.int64) * D + RANK + x[None, :])
        else:
            q_rank = tl.load(q + row[:, None].to(tl.int64) * D + c[None, :], mask=(c < D)[None, :], other=0.0)
        peak = tl.full((R,), NEVER, tl.float32)
        total = tl.zeros((R, T), tl.float32)
        held = tl.zeros((R, WIDE), tl.float32)
        for i in tl.range(0, tl.cdiv(tokens, T), num_stages=STAGES):
            at, page = tile_of(pages, page_at, page, i, T, PAGE)
            k = latents.load([at, 0])
            if SPLIT:
                k_rope = turned.load([at, RANK])
                s = tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
                s = tl.dot(q_rank, tl.trans(k), s, input_precision="ieee")
            else:
                s = tl.dot(q_rank, tl.trans(k), input_precision="ieee")
            s = tl.where(seen_in(i * T + t, sees, EDGE), s, -float("inf"))
            p, shrink, higher = soften(s, peak, scale2)
            total = total * shrink[:, None] + p
            held = held * shrink[:, None]
            held = tl.dot(p.to(k.dtype), k, held, input_precision="ieee")
            peak = higher
        mass = tl.sum(total, 1)
        share = tl.where(mass > 0, 1.0 / mass, 0.0)
        kept = (c < RANK)[None, :]
        if slot >= 0:
            at_part = slot * R + r
            tl.store(part + at_part[:, None].to(tl.int64) * RANK + c[None, :], held * share[:, None], mask=kept)
            weight = weight_of(peak, mass)
            tl.store(part_weight + at_part, weight)
        else:
            result = (held * share[:, None]).to(out.dtype.element_ty)
            tl.store(out + row[:, None].to(tl.int64) * RANK + c[None, :], result, mask=kept & live[:, None])


@triton.jit(do_not_specialize=["PARTS", "slots"])
def merge(
    part,
    part_weight,
    out,
    unit_row,
    table,
    PARTS,
    heads,
    slots,
    UNIT: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAKE: tl.constexpr,
    SHOT: tl.constexpr,
    GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Joins the partials of each row by their log2-sum-exp2. Grid: (units * UNIT, ceil(RANK / COLUMNS), GROUPS).

    A unit is UNIT neighbouring rows of one query. `unit_row[u]` is the first row of a unit, or -1; `table[u, PARTS]`
    its first partial rows, padded with -1; PARTS is a multiple of TAKE. A row whose partials are empty becomes zeros.
    With several groups all are one group's, which has `heads` rows of each query and `slots` partial rows.
    """
    i = tl.program_id(0)
    unit = i // UNIT
    within = i % UNIT
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < RANK
    row = tl.load(unit_row + unit)
    if GROUPS > 1:
        group = tl.program_id(2)
        own = row + within
        to = (own // heads * GROUPS + group) * heads + own % heads
        before = group * slots + within
    else:
        to = row + within
        before = within
    take = tl.arange(0, TAKE)
    peak = NEVER
    mass = 0.0
    held = tl.zeros((COLUMNS,), tl.float32)
    if SHOT:
        at = tl.load(table + unit * PARTS + take)
        there = at >= 0
        at = tl.where(there, at + before, 0)
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        w = tl.load(part_weight + at, mask=there, other=-float("inf"))
        x = tl.load(
            part + at[:, None].to(tl.int64) * RANK + d[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        peak = tl.maximum(peak, tl.max(w, 0))
        share = tl.exp2(w - peak)
        held = tl.sum(x * share[:, None], 0)
        mass = tl.sum(share, 0)
    else:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        for j in range(0, PARTS, TAKE):
            at = tl.load(table + unit * PARTS + j + take)
            there = at >= 0
            at = tl.where(there, at + before, 0)
            w = tl.load(part_weight + at, mask=there, other=-float("inf"))
            x = tl.load(
                part + at[:, None].to(tl.int64) * RANK + d[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            higher = tl.maximum(peak, tl.max(w, 0))
            share = tl.exp2(w - higher)
            shrink = tl.exp2(peak - higher)
            held = held * shrink + tl.sum(x * share[:, None], 0)
            mass = mass * shrink + tl.sum(share, 0)
            peak = higher
    whole = tl.where(mass > 0, 1.0 / mass, 0.0)
    tl.store(out + to.to(tl.int64) * RANK + d, (held * whole).to(out.dtype.element_ty), mask=inside & (row >= 0))
