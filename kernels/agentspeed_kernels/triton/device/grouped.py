"""Grouped-query attention over paged keys and values: the append, blocks of few rows, and the rows of long extends.

A head of the pools is read once for all heads of queries that belong to it: these are the rows of a tile, after each
other for each token (row i of a group is head i % heads of token i // heads). One axis of the grid is the group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from agentspeed_kernels.triton.device.fp8_numbers import coded, scale_of, sizes
from agentspeed_kernels.triton.device.rows import NEVER, item_of, items_of, seen_in, seen_of, soften, tile_of, weight_of


@triton.jit
def qkv_append(
    qkv, q_gain, k_gain, cos, sin, slots, q, keys, values, qkv_token, qkv_head, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ROW: tl.constexpr, SCALES_AT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Heads of queries and keys normed and turned, keys and values to the rows of their slots (negative: nowhere).

    ROW: elements of a row of the pools, bytes where they are in 8 bits; then scales are SCALES_AT bytes behind its
    begin (`fp8_cache.heads_row`).

    Grid (T, ceil((HEADS + 2 * GROUPS) / BH)): a program has BH heads of a token, of whatever kind."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    i = tl.arange(0, BLOCK)
    half = i < HALF
    inside = (head < HEADS + 2 * GROUPS)[:, None] & half[None, :]
    asks = (head < HEADS)[:, None]
    turns = (head < HEADS + GROUPS)[:, None]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    at = qkv + token * qkv_token + head[:, None] * qkv_head + i[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if Q_NORM or K_NORM:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        if Q_NORM:
            gain = tl.load(q_gain + i, mask=half, other=0.0).to(tl.float32)[None, :]
            gain_high = tl.load(q_gain + HALF + i, mask=half, other=0.0).to(tl.float32)[None, :]
            low = tl.where(asks, low * scale * gain, low)
            high = tl.where(asks, high * scale * gain_high, high)
        if K_NORM:
            gain = tl.load(k_gain + i, mask=half, other=0.0).to(tl.float32)[None, :]
            gain_high = tl.load(k_gain + HALF + i, mask=half, other=0.0).to(tl.float32)[None, :]
            low = tl.where(turns & (head >= HEADS)[:, None], low * scale * gain, low)
            high = tl.where(turns & (head >= HEADS)[:, None], high * scale * gain_high, high)
    c = tl.load(cos + token * HALF + i, mask=half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + i, mask=half, other=0.0).to(tl.float32)[None, :]
    turned = tl.where(turns, low * c - high * s, low)
    turned_high = tl.where(turns, high * c + low * s, high)
    to = q + (token * HEADS + head)[:, None] * (2 * HALF) + i[None, :]
    tl.store(to, turned.to(q.dtype.element_ty), mask=inside & asks)
    tl.store(to + HALF, turned_high.to(q.dtype.element_ty), mask=inside & asks)
    slot = tl.load(slots + token).to(tl.int64)
    live = inside & (slot >= 0)
    key = live & turns & (head >= HEADS)[:, None]
    value = live & (head >= HEADS + GROUPS)[:, None]
    row = slot * ROW + i[None, :]
    to_key = keys + row + (head - HEADS)[:, None] * (2 * HALF)
    to_value = values + row + (head - HEADS - GROUPS)[:, None] * (2 * HALF)
    if keys.dtype.element_ty == tl.uint8:
        # What is not turned is what it was: of keys and values alike these are the halves of their heads.
        by = scale_of(tl.maximum(tl.max(sizes(turned), 1), tl.max(sizes(turned_high), 1)))
        inverse = (1.0 / by)[:, None]
        byte = coded(turned, inverse)
        byte_high = coded(turned_high, inverse)
        tl.store(to_key, byte, mask=key)
        tl.store(to_key + HALF, byte_high, mask=key)
        tl.store(to_value, byte, mask=value)
        tl.store(to_value + HALF, byte_high, mask=value)
        at_key = (keys + slot * ROW + SCALES_AT).to(tl.pointer_type(tl.float32), bitcast=True) + (head - HEADS)
        at_value = (values + slot * ROW + SCALES_AT).to(tl.pointer_type(tl.float32), bitcast=True)
        at_value = at_value + (head - HEADS - GROUPS)
        tl.store(at_key, by, mask=(slot >= 0) & (head >= HEADS) & (head < HEADS + GROUPS))
        tl.store(at_value, by, mask=(slot >= 0) & (head >= HEADS + GROUPS) & (head < HEADS + 2 * GROUPS))
    else:
        tl.store(to_key, turned.to(keys.dtype.element_ty), mask=key)
        tl.store(to_key + HALF, turned_high.to(keys.dtype.element_ty), mask=key)
        tl.store(to_value, low.to(values.dtype.element_ty), mask=value)
        tl.store(to_value + HALF, high.to(values.dtype.element_ty), mask=value)


@triton.jit(do_not_specialize=["slots"])
def attend_groups(
    q, keys, values, rows, visible, pages, items, bounds, part, part_weight, out, q_token, q_head, heads, slots, scale2,
    R: tl.constexpr, T: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, ONE: tl.constexpr,
    RUN: tl.constexpr, EDGE: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`rows.attend_rows` for each group of `heads` heads of queries; grid (programs, groups).

    q [T, heads * groups, W] of any strides but the last, out the same contiguous. `keys` and `values` describe the
    pools as rows of groups * W columns, in tiles of WIDE columns: past W they are another head's, which queries of zero
    meet. The plan is one group's, and so are its `slots` partial slots, of which each group has as many."""
    program = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    first, last = items_of(bounds, program, ONE)
    r = tl.arange(0, R)
    t = tl.arange(0, T)
    c = tl.arange(0, WIDE)
    column = group * W
    if EARLY:
        # As in `attend_rows`: dependents begin when this kernel ends.
        gdc_wait()
    for item in range(first, last):
        block, page_at, page, tokens, slot, row, live = item_of(items, item, pages, rows, R, RUN)
        token = row // heads
        head = group * heads + row % heads
        sees = seen_of(visible, items, item, block, tokens, R, EDGE)
        kept = live[:, None] & (c < W)[None, :]
        at_q = token[:, None].to(tl.int64) * q_token + (head * q_head)[:, None]
        asked = tl.load(q + at_q + c[None, :], mask=kept, other=0.0)
        peak = tl.full((R,), NEVER, tl.float32)
        total = tl.zeros((R, T), tl.float32)
        held = tl.zeros((R, WIDE), tl.float32)
        for i in tl.range(0, tl.cdiv(tokens, T), num_stages=STAGES):
            at, page = tile_of(pages, page_at, page, i, T, PAGE)
            k = keys.load([at, column])
            s = tl.dot(asked, tl.trans(k), input_precision="ieee")
            s = tl.where(seen_in(i * T + t, sees, EDGE), s, -float("inf"))
            p, shrink, higher = soften(s, peak, scale2)
            total = total * shrink[:, None] + p
            v = values.load([at, column])
            held = tl.dot(p.to(v.dtype), v, held * shrink[:, None], input_precision="ieee")
            peak = higher
        mass = tl.sum(total, 1)
        share = tl.where(mass > 0, 1.0 / mass, 0.0)
        if slot >= 0:
            at_part = (group * slots + slot) * R + r
            tl.store(part + at_part[:, None].to(tl.int64) * W + c[None, :], held * share[:, None], mask=kept)
            weight = weight_of(peak, mass)
            tl.store(part_weight + at_part, weight, mask=live)
        else:
            at_out = token * (heads * groups) + head
            result = (held * share[:, None]).to(out.dtype.element_ty)
            tl.store(out + at_out[:, None].to(tl.int64) * W + c[None, :], result, mask=kept)


@triton.jit
def _tile(asked, keys, values, at, column, token, sees, peak, mass, held, scale2, BN: tl.constexpr, EDGE: tl.constexpr):
    """One tile of BN tokens from `token` on, which are rows `at` of the pools; EDGE hides what a row does not see."""
    k = keys.load([at, column])
    s = tl.dot(asked, tl.trans(k), input_precision="ieee")
    if EDGE:
        t = token + tl.arange(0, BN)
        s = tl.where(t[None, :] < sees[:, None], s, -float("inf"))
    p, shrink, higher = soften(s, peak, scale2)
    mass = mass * shrink + tl.sum(p, 1)
    v = values.load([at, column])
    held = tl.dot(p.to(v.dtype), v, held * shrink[:, None], input_precision="ieee")
    return higher, mass, held


@triton.jit(do_not_specialize=["T", "tokens", "seen_first"])
def extend_groups(
    q, keys, values, pages, part, part_weight, out, q_token, q_head, T, tokens, seen_first, heads, scale2,
    PAGE: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """T new tokens of one branch; query t sees seen_first + t of its `tokens`. Grid (ceil(T * heads / BM), groups,
    PARTS): a program reads one part of the context for BM rows of a group, as `attend_groups` has them.

    With PARTS > 1 partials are left, normalised, that of query t and head h in row (part * T + t) * H + h."""
    # The blocks that see the most come first, so that the last wave is short.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    number = tl.program_id(2)
    count = T * heads
    r = block * BM + tl.arange(0, BM)
    live = r < count
    mine = tl.where(live, r, 0)
    query = (mine // heads).to(tl.int64)
    head = group * heads + mine % heads
    c = tl.arange(0, WIDE)
    column = group * W
    asked = tl.load(
        q + (query * q_token + head * q_head)[:, None] + c[None, :], mask=live[:, None] & (c < W)[None, :], other=0.0
    )
    sees = tl.minimum(seen_first + mine // heads, tokens)
    peak = tl.full((BM,), NEVER, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    held = tl.zeros((BM, WIDE), tl.float32)
    end = tl.minimum(tokens, seen_first + (tl.minimum(block * BM + BM, count) - 1) // heads)
    share = tl.cdiv(tl.cdiv(end, PARTS), BN) * BN
    low = number * share
    high = tl.minimum(low + share, end)
    # Whole tiles below what the block's first row sees need no mask.
    plain = tl.minimum(seen_first + block * BM // heads, tokens)
    plain = tl.minimum(tl.maximum(plain // BN * BN, low), tl.maximum(high // BN * BN, low))
    page_ahead = tl.load(pages + tl.minimum(low, tokens - 1) // PAGE)
    for token in range(low, plain, BN):
        at = page_ahead * PAGE + token % PAGE
        page_ahead = tl.load(pages + tl.minimum(token + BN, tokens - 1) // PAGE)
        peak, mass, held = _tile(
            asked, keys, values, at, column, token, sees, peak, mass, held, scale2, BN, False
        )  # fmt: skip
    for token in range(plain, high, BN):
        at = page_ahead * PAGE + token % PAGE
        page_ahead = tl.load(pages + tl.minimum(token + BN, tokens - 1) // PAGE)
        peak, mass, held = _tile(
            asked, keys, values, at, column, token, sees, peak, mass, held, scale2, BN, True
        )  # fmt: skip
    held = held * tl.where(mass > 0, 1.0 / mass, 0.0)[:, None]
    row = query * (heads * tl.num_programs(1)) + head
    kept = live[:, None] & (c < W)[None, :]
    if PARTS == 1:
        tl.store(out + row[:, None] * W + c[None, :], held.to(out.dtype.element_ty), mask=kept)
    else:
        row += number.to(tl.int64) * (count * tl.num_programs(1))
        weight = weight_of(peak, mass)
        tl.store(part + row[:, None] * W + c[None, :], held, mask=kept)
        tl.store(part_weight + row, weight, mask=live)
