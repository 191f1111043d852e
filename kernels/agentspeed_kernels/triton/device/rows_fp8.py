"""Latent attention of a block of query rows over paged latents in 8 bits, split over the context, in portable Triton.

Items, slots, edges and what leaves are those of `rows.attend_rows`. A tile of numbers is read as 16 bits that hold two
neighbours: matrix units take their transposition for both products, bits are moved into bfloat16 in registers
(`fp8_numbers`), and even and odd coordinates are products of their own. The scale of a token multiplies its column of
scores, and its column of shares before the second product. What a row does not see is selected away, so hidden rows of
a page may hold any bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from agentspeed_kernels.triton.device.fp8_numbers import HALF_POWER, pairs
from agentspeed_kernels.triton.device.rows import NEVER, item_of, items_of, seen_in, seen_of, soften, tile_of, weight_of


@triton.jit
def asked_by(at, mask):
    """Even and odd coordinates of queries, of which the even ones are at `at`, by half of the power."""
    even = tl.load(at, mask=mask, other=0.0)
    odd = tl.load(at + 1, mask=mask, other=0.0)
    return (even.to(tl.float32) * HALF_POWER).to(even.dtype), (odd.to(tl.float32) * HALF_POWER).to(odd.dtype)


@triton.jit
def scale_in(four, mine):
    """Of each token the one of four scales [tokens, 4] that is `mine`, by half of the power."""
    return tl.sum(tl.where(mine[None, :], four, 0.0), 1) * HALF_POWER


@triton.jit
def put_pairs(to, even, odd, mask):
    """Even and odd columns, of which the even ones go to `to`, in the format that is there."""
    tl.store(to, even.to(to.dtype.element_ty), mask=mask)
    tl.store(to + 1, odd.to(to.dtype.element_ty), mask=mask)


@triton.jit
def attend_rows(
    q, latents, scales, turned, rows, visible, pages, items, bounds, part, part_weight, out, scale2, R: tl.constexpr,
    T: tl.constexpr, PAGE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
    WIDE_ROPE: tl.constexpr, SCALES_AT: tl.constexpr, TURNED_AT: tl.constexpr, ONE: tl.constexpr, RUN: tl.constexpr,
    EDGE: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """q [rows, RANK + ROPE], out [rows, RANK]; the pool as rows is described thrice: `latents` of int16 in tiles of
    WIDE columns, `scales` of float32 in tiles of 4 from SCALES_AT on, `turned` of bfloat16 in tiles of WIDE_ROPE from
    TURNED_AT on. Columns past a section are met by zeros of q. The others as of `rows.attend_rows`."""
    program = tl.program_id(0)
    D: tl.constexpr = RANK + ROPE
    first, last = items_of(bounds, program, ONE)
    r = tl.arange(0, R)
    t = tl.arange(0, T)
    c = 2 * tl.arange(0, WIDE)
    x = tl.arange(0, WIDE_ROPE)
    inside = (c < RANK)[None, :]
    if EARLY:
        # As in `rows.attend_rows`: dependents begin when this kernel ends.
        gdc_wait()
    for item in range(first, last):
        block, page_at, page, tokens, slot, row, live = item_of(items, item, pages, rows, R, RUN)
        sees = seen_of(visible, items, item, block, tokens, R, EDGE)
        own = q + row[:, None].to(tl.int64) * D
        q_even, q_odd = asked_by(own + c[None, :], inside)
        q_rope = tl.load(own + RANK + x[None, :], mask=(x < ROPE)[None, :], other=0.0)
        peak = tl.full((R,), NEVER, tl.float32)
        total = tl.zeros((R, T), tl.float32)
        held_even = tl.zeros((R, WIDE), tl.float32)
        held_odd = tl.zeros((R, WIDE), tl.float32)
        for i in tl.range(0, tl.cdiv(tokens, T), num_stages=STAGES):
            at, page = tile_of(pages, page_at, page, i, T, PAGE)
            k_even, k_odd = pairs(latents.load([at, 0]), ASM)
            k_even = k_even.to(q.dtype.element_ty)
            k_odd = k_odd.to(q.dtype.element_ty)
            k_rope = turned.load([at, TURNED_AT]).to(q.dtype.element_ty)
            by = scale_in(scales.load([at, SCALES_AT]), tl.arange(0, 4) == 0)
            s = tl.dot(q_even, tl.trans(k_even), input_precision="ieee")
            s = tl.dot(q_odd, tl.trans(k_odd), s, input_precision="ieee")
            s = s * by[None, :] + tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
            seen = seen_in(i * T + t, sees, EDGE)
            s = tl.where(seen, s, -float("inf"))
            p, shrink, higher = soften(s, peak, scale2)
            total = total * shrink[:, None] + p
            share = tl.where(seen, p * by[None, :], 0.0).to(q.dtype.element_ty)
            held_even = tl.dot(share, k_even, held_even * shrink[:, None], input_precision="ieee")
            held_odd = tl.dot(share, k_odd, held_odd * shrink[:, None], input_precision="ieee")
            peak = higher
        mass = tl.sum(total, 1)
        whole = tl.where(mass > 0, HALF_POWER / mass, 0.0)[:, None]
        held_even = held_even * whole
        held_odd = held_odd * whole
        if slot >= 0:
            at_part = slot * R + r
            left = part + at_part[:, None].to(tl.int64) * RANK + c[None, :]
            put_pairs(left, held_even, held_odd, inside)
            weight = weight_of(peak, mass)
            tl.store(part_weight + at_part, weight)
        else:
            to = out + row[:, None].to(tl.int64) * RANK + c[None, :]
            kept = inside & live[:, None]
            put_pairs(to, held_even, held_odd, kept)
