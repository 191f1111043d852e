"""Latent attention of few rows over paged latents in 8 bits on Hopper, in Gluon: both products are transposed.

Scores [tokens, rows] are products of bytes as they lie in shared memory with queries in two e4m3 numbers each: eight
bits of a bfloat16 number are four of the first and four of the second, sixteen times as small, so nothing is lost down
to 2^-22 of a row's largest. The units add such products to some 14 bits, so each part of 128 coordinates has a sum of
its own. Results [columns, rows] have the transposition of the tile as first operand, from registers, where bytes become
bfloat16 (`fp8_numbers`), and shares from shared memory. Two programs of a multiprocessor hide each other's waits.

Items, slots and edges are those of `rows.attend_rows`; 16 rows of rank 512 and rope 64, bfloat16.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from agentspeed_kernels.triton.device.fp8_numbers import HALF_POWER, PAIRS_ASM, PAIRS_REGISTERS

T = gl.constexpr(64)
"""Tokens of a tile: the rows of one wgmma."""
PARTS = gl.constexpr(4)
"""Of the columns, each 64 pairs of neighbours."""


@gluon.jit
def _pairs(x):
    """`fp8_numbers.pairs`, which a kernel of Gluon cannot call."""
    return gl.inline_asm_elementwise(
        PAIRS_ASM,
        PAIRS_REGISTERS,
        [x],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _fetch(latents, turned, at, full, numbers, rope, b):
    """One tile, rows `at` of the pool, into buffer b of the ring."""
    bar = full.index(b)
    mbarrier.expect(bar, T * (512 + 128))
    for j in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(latents, [at, j * 64], bar, numbers.index(b * PARTS + j))
    tma.async_copy_global_to_shared(turned, [at, 264], bar, rope.index(b))


@gluon.jit
def attend_rows(
    q, latents, turned, scales, rows, visible, pages, items, bounds, part, part_weight, out, scale2,
    R: gl.constexpr, PAGE: gl.constexpr, RING: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """q [rows, 576]; `latents` describes the pool as rows of int16 in tiles of 64 columns, `turned` as rows of bfloat16
    likewise, `scales` is the pool as float32, 164 of them a row."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    BYTES_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 32])
    A_L: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    TOKEN: gl.constexpr = gl.SliceLayout(1, S_L)
    ROW: gl.constexpr = gl.SliceLayout(0, S_L)
    Q_L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BYTES: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    queries = gl.allocate_shared_memory(gl.float8e4nv, [2 * PARTS, R, 128], BYTES)
    q_turned = gl.allocate_shared_memory(gl.bfloat16, [R, 64], TILE)
    numbers = gl.allocate_shared_memory(gl.int16, [RING * PARTS, T, 64], TILE)
    rope = gl.allocate_shared_memory(gl.bfloat16, [RING, T, 64], TILE)
    shares = gl.allocate_shared_memory(gl.bfloat16, [T, R], gl.NVMMASharedLayout(2 * R, 16))
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(RING):
        mbarrier.init(full.index(j), count=1)
    fence_async_shared()
    gl.thread_barrier()
    program = gl.program_id(0)
    first = gl.load(bounds + program)
    last = gl.load(bounds + program + 1)
    t = gl.arange(0, T, TOKEN)
    count = 0
    for item in range(first, last):
        block = gl.load(items + item * 8)
        page_at = gl.load(items + item * 8 + 1)
        tokens = gl.load(items + item * 8 + 2)
        slot = gl.load(items + item * 8 + 3)
        tiles = (tokens + T - 1) // T
        for j in gl.static_range(RING):
            if j < tiles:
                at = gl.load(pages + page_at + j * T // PAGE) * PAGE + j * T % PAGE
                _fetch(latents, turned, at, full, numbers, rope, (count + j) % RING)
        at = gl.load(pages + page_at) * PAGE
        by_next = gl.load(scales + (at + t).to(gl.int64) * 164 + 128)
        own = gl.maximum(gl.load(rows + block * R + gl.arange(0, R, gl.SliceLayout(1, Q_L))), 0)
        c = gl.arange(0, 128, gl.SliceLayout(0, Q_L))
        at_q = q + own[:, None].to(gl.int64) * 576 + c[None, :]
        q0 = gl.load(at_q).to(gl.float32)
        q1 = gl.load(at_q + 128).to(gl.float32)
        q2 = gl.load(at_q + 256).to(gl.float32)
        q3 = gl.load(at_q + 384).to(gl.float32)
        # A power of two that makes the largest of a row 128 or more, and less than 256.
        most = gl.maximum(gl.maximum(gl.abs(q0), gl.abs(q1)), gl.maximum(gl.abs(q2), gl.abs(q3)))
        places = gl.minimum(gl.maximum(gl.max(most, 1).to(gl.int32, bitcast=True) >> 23, 8), 253)
        inverse = ((261 - places) << 23).to(gl.float32, bitcast=True)[:, None]
        by_row = gl.convert_layout(((places - 7) << 23).to(gl.float32, bitcast=True), ROW)
        asked = (q0, q1, q2, q3)
        for j in gl.static_range(PARTS):
            value = asked[j] * inverse
            coarse = value.to(gl.float8e4nv)
            queries.index(2 * j).store(coarse)
            queries.index(2 * j + 1).store(((value - coarse.to(gl.float32)) * 16.0).to(gl.float8e4nv))
        x = gl.arange(0, 64, gl.SliceLayout(0, Q_L))
        q_turned.store(gl.load(q + own[:, None].to(gl.int64) * 576 + 512 + x[None, :]))
        fence_async_shared()
        if EDGE:
            sees = gl.load(visible + block * R + gl.arange(0, R, ROW)) - gl.load(items + item * 8 + 6)
            sees = gl.minimum(sees, tokens)
        peak = gl.full([R], -1e30, gl.float32, ROW)
        total = gl.zeros([T, R], gl.float32, S_L)
        held0 = gl.zeros([64, R], gl.float32, S_L)
        held1 = gl.zeros([64, R], gl.float32, S_L)
        held2 = gl.zeros([64, R], gl.float32, S_L)
        held3 = gl.zeros([64, R], gl.float32, S_L)
        held4 = gl.zeros([64, R], gl.float32, S_L)
        held5 = gl.zeros([64, R], gl.float32, S_L)
        held6 = gl.zeros([64, R], gl.float32, S_L)
        held7 = gl.zeros([64, R], gl.float32, S_L)
        gl.thread_barrier()
        for i in range(tiles):
            b = count % RING
            phase = (count // RING) & 1
            count += 1
            by = by_next
            ahead = gl.minimum(i + 1, tiles - 1) * T
            at = gl.load(pages + page_at + ahead // PAGE) * PAGE + ahead % PAGE
            by_next = gl.load(scales + (at + t).to(gl.int64) * 164 + 128)
            mbarrier.wait(full.index(b), phase)
            turns = gl.zeros([T, R], gl.float32, S_L)
            turns = warpgroup_mma(rope.index(b), q_turned.permute([1, 0]), turns, use_acc=False, is_async=True)
            fine = gl.zeros([T, R], gl.float32, BYTES_L)
            s0 = gl.zeros([T, R], gl.float32, BYTES_L)
            s1 = gl.zeros([T, R], gl.float32, BYTES_L)
            s2 = gl.zeros([T, R], gl.float32, BYTES_L)
            s3 = gl.zeros([T, R], gl.float32, BYTES_L)
            k0 = numbers.index(b * PARTS)._reinterpret(gl.float8e4nv, [T, 128], BYTES)
            k1 = numbers.index(b * PARTS + 1)._reinterpret(gl.float8e4nv, [T, 128], BYTES)
            k2 = numbers.index(b * PARTS + 2)._reinterpret(gl.float8e4nv, [T, 128], BYTES)
            k3 = numbers.index(b * PARTS + 3)._reinterpret(gl.float8e4nv, [T, 128], BYTES)
            s0 = warpgroup_mma(k0, queries.index(0).permute([1, 0]), s0, use_acc=False, is_async=True)
            s1 = warpgroup_mma(k1, queries.index(2).permute([1, 0]), s1, use_acc=False, is_async=True)
            s2 = warpgroup_mma(k2, queries.index(4).permute([1, 0]), s2, use_acc=False, is_async=True)
            s3 = warpgroup_mma(k3, queries.index(6).permute([1, 0]), s3, use_acc=False, is_async=True)
            fine = warpgroup_mma(k0, queries.index(1).permute([1, 0]), fine, use_acc=False, is_async=True)
            fine = warpgroup_mma(k1, queries.index(3).permute([1, 0]), fine, is_async=True)
            fine = warpgroup_mma(k2, queries.index(5).permute([1, 0]), fine, is_async=True)
            fine = warpgroup_mma(k3, queries.index(7).permute([1, 0]), fine, is_async=True)
            # Meanwhile, numbers for the first of the other products.
            even, odd = _pairs(numbers.index(b * PARTS).permute([1, 0]).load(A_L))
            turns, s0, s1, s2, s3, fine = warpgroup_mma_wait(0, deps=[turns, s0, s1, s2, s3, fine])
            s = gl.convert_layout((s0 + s1) + (s2 + s3) + fine * 0.0625, S_L)
            s = s * (by[:, None] * by_row[None, :]) + turns
            if EDGE:
                seen = (i * T + t)[:, None] < sees[None, :]
            else:
                seen = (i * T + t < tokens)[:, None]
            s = gl.where(seen, s, -float("inf"))
            higher = gl.maximum(peak, gl.max(s, 0) * scale2)
            shrink = gl.exp2(peak - higher)
            p = gl.exp2(s * scale2 - higher[None, :])
            total = total * shrink[None, :] + p
            shares.store(gl.where(seen, p * (by * HALF_POWER)[:, None], 0.0).to(gl.bfloat16))
            fence_async_shared()
            peak = higher
            gl.thread_barrier()
            held0 = warpgroup_mma(even, shares, held0 * shrink[None, :], is_async=True)
            held1 = warpgroup_mma(odd, shares, held1 * shrink[None, :], is_async=True)
            # The part before is done: its registers are free for the next one.
            held0, held1 = warpgroup_mma_wait(2, deps=[held0, held1])
            even, odd = _pairs(numbers.index(b * PARTS + 1).permute([1, 0]).load(A_L))
            held2 = warpgroup_mma(even, shares, held2 * shrink[None, :], is_async=True)
            held3 = warpgroup_mma(odd, shares, held3 * shrink[None, :], is_async=True)
            held2, held3 = warpgroup_mma_wait(2, deps=[held2, held3])
            even, odd = _pairs(numbers.index(b * PARTS + 2).permute([1, 0]).load(A_L))
            held4 = warpgroup_mma(even, shares, held4 * shrink[None, :], is_async=True)
            held5 = warpgroup_mma(odd, shares, held5 * shrink[None, :], is_async=True)
            held4, held5 = warpgroup_mma_wait(2, deps=[held4, held5])
            even, odd = _pairs(numbers.index(b * PARTS + 3).permute([1, 0]).load(A_L))
            held6 = warpgroup_mma(even, shares, held6 * shrink[None, :], is_async=True)
            held7 = warpgroup_mma(odd, shares, held7 * shrink[None, :], is_async=True)
            held0, held1, held2, held3, held4, held5, held6, held7 = warpgroup_mma_wait(
                0, deps=[held0, held1, held2, held3, held4, held5, held6, held7]
            )
            # All warps have read the buffer and the shares.
            gl.thread_barrier()
            if i + RING < tiles:
                ahead = (i + RING) * T
                at = gl.load(pages + page_at + ahead // PAGE) * PAGE + ahead % PAGE
                _fetch(latents, turned, at, full, numbers, rope, b)
        mass = gl.sum(total, 0)
        whole = gl.where(mass > 0, HALF_POWER / mass, 0.0)[None, :]
        r = gl.arange(0, R, ROW)
        n = (2 * gl.arange(0, 64, TOKEN))[:, None]
        held = (held0, held1, held2, held3, held4, held5, held6, held7)
        if slot >= 0:
            left = part + (slot * R + r)[None, :].to(gl.int64) * 512 + n
            for j in gl.static_range(2 * PARTS):
                gl.store(left + (j // 2 * 128 + j % 2), held[j] * whole)
            weight = gl.where(mass > 0, peak + gl.log2(gl.where(mass > 0, mass, 1.0)), -float("inf"))
            gl.store(part_weight + slot * R + r, weight)
        else:
            to_row = gl.load(rows + block * R + r)
            live = (to_row >= 0)[None, :] & (n >= 0)
            to = out + gl.maximum(to_row, 0)[None, :].to(gl.int64) * 512 + n
            for j in gl.static_range(2 * PARTS):
                gl.store(to + (j // 2 * 128 + j % 2), (held[j] * whole).to(gl.bfloat16), mask=live)
