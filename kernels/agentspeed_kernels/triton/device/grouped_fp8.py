"""Grouped-query attention of blocks of few rows over paged keys and values in 8 bits: `rows_fp8` for each group."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from agentspeed_kernels.triton.device.fp8_numbers import HALF_POWER, pairs
from agentspeed_kernels.triton.device.rows import NEVER, item_of, items_of, seen_in, seen_of, soften, tile_of, weight_of
from agentspeed_kernels.triton.device.rows_fp8 import asked_by, put_pairs, scale_in


@triton.jit(do_not_specialize=["slots"])
def attend_groups(
    q, keys, key_scales, values, value_scales, rows, visible, pages, items, bounds, part, part_weight, out, q_token,
    q_head, heads, slots, scale2, R: tl.constexpr, T: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, SCALES_AT: tl.constexpr, ONE: tl.constexpr, RUN: tl.constexpr, EDGE: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`grouped.attend_groups` over pools of bytes; grid (programs, groups).

    `keys` and `values` describe the pools as rows of int16 in tiles of WIDE columns, which hold two numbers each and
    past W / 2 are another head's or its scales, finite whatever they are, which queries of zero meet; `key_scales` and
    `value_scales` as rows of float32 in tiles of 4 columns, of which one is the group's, from SCALES_AT on."""
    program = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    first, last = items_of(bounds, program, ONE)
    r = tl.arange(0, R)
    t = tl.arange(0, T)
    c = 2 * tl.arange(0, WIDE)
    mine = tl.arange(0, 4) == group % 4
    at_scales = SCALES_AT + group // 4 * 4
    column = group * (W // 2)
    if EARLY:
        # As in `rows.attend_rows`: dependents begin when this kernel ends.
        gdc_wait()
    for item in range(first, last):
        block, page_at, page, tokens, slot, row, live = item_of(items, item, pages, rows, R, RUN)
        token = row // heads
        head = group * heads + row % heads
        sees = seen_of(visible, items, item, block, tokens, R, EDGE)
        kept = live[:, None] & (c < W)[None, :]
        own = q + token[:, None].to(tl.int64) * q_token + (head * q_head)[:, None] + c[None, :]
        q_even, q_odd = asked_by(own, kept)
        peak = tl.full((R,), NEVER, tl.float32)
        total = tl.zeros((R, T), tl.float32)
        held_even = tl.zeros((R, WIDE), tl.float32)
        held_odd = tl.zeros((R, WIDE), tl.float32)
        for i in tl.range(0, tl.cdiv(tokens, T), num_stages=STAGES):
            at, page = tile_of(pages, page_at, page, i, T, PAGE)
            k_even, k_odd = pairs(keys.load([at, column]), ASM)
            by = scale_in(key_scales.load([at, at_scales]), mine)
            s = tl.dot(q_even, tl.trans(k_even.to(q.dtype.element_ty)), input_precision="ieee")
            s = tl.dot(q_odd, tl.trans(k_odd.to(q.dtype.element_ty)), s, input_precision="ieee")
            seen = seen_in(i * T + t, sees, EDGE)
            s = tl.where(seen, s * by[None, :], -float("inf"))
            p, shrink, higher = soften(s, peak, scale2)
            total = total * shrink[:, None] + p
            v_even, v_odd = pairs(values.load([at, column]), ASM)
            by = scale_in(value_scales.load([at, at_scales]), mine)
            share = tl.where(seen, p * by[None, :], 0.0).to(q.dtype.element_ty)
            shrunk = held_even * shrink[:, None]
            held_even = tl.dot(share, v_even.to(q.dtype.element_ty), shrunk, input_precision="ieee")
            shrunk = held_odd * shrink[:, None]
            held_odd = tl.dot(share, v_odd.to(q.dtype.element_ty), shrunk, input_precision="ieee")
            peak = higher
        mass = tl.sum(total, 1)
        whole = tl.where(mass > 0, HALF_POWER / mass, 0.0)[:, None]
        held_even = held_even * whole
        held_odd = held_odd * whole
        if slot >= 0:
            at_part = (group * slots + slot) * R + r
            left = part + at_part[:, None].to(tl.int64) * W + c[None, :]
            put_pairs(left, held_even, held_odd, kept)
            weight = weight_of(peak, mass)
            tl.store(part_weight + at_part, weight, mask=live)
        else:
            at_out = token * (heads * groups) + head
            to = out + at_out[:, None].to(tl.int64) * W + c[None, :]
            put_pairs(to, held_even, held_odd, kept)
