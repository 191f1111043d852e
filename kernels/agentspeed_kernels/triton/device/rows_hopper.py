"""Latent attention of 64-row blocks on Hopper, in Gluon: one producer and two consumer warpgroups.

The producer (the default partition, so that descriptors stay in its registers) streams latent tiles into a ring with
bulk tensor copies. Consumer 0 scores the even tiles, consumer 1 the odd ones; each owns 256 of the 512 output columns
and multiplies both tiles' shares into them, so running maxima and shares pass through shared memory. Full and empty
barriers are kept for each half of a tile's columns, so that a half is refilled as soon as its owner is done with it.
FlashMLA schedules its two warpgroups alike (github.com/deepseek-ai/FlashMLA, docs of the dense decode kernel).

Items, slots and edges are those of `rows.attend_rows`; rank 512, rope 64, bfloat16.
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


@gluon.jit
def _produce(
    latents, turned, pages, items, bounds, bars, bufs, PAGE: gl.constexpr, T: gl.constexpr, RING: gl.constexpr
):
    _, left, right, rope, _, _, _ = bufs
    full_left, full_right, empty_left, empty_right, _, _, _, _, _ = bars
    TILES: gl.constexpr = PAGE // T
    program = gl.program_id(0)
    first = gl.load(bounds + program)
    last = gl.load(bounds + program + 1)
    count = 0
    for item in range(first, last):
        page_at = gl.load(items + item * 8 + 1)
        tokens = gl.load(items + item * 8 + 2)
        tiles = (tokens + T - 1) // T
        paired = (tiles + 1) // 2 * 2  # consumers take tiles two by two; the last may be hidden whole
        page = gl.load(pages + page_at)
        for i in range(paired):
            at = page * PAGE + (i % TILES) * T
            page = gl.load(pages + page_at + gl.minimum(i + 1, tiles - 1) // TILES)
            b = count % RING
            phase = ((count // RING) & 1) ^ 1
            bar = full_left.index(b)
            mbarrier.wait(empty_left.index(b), phase)
            mbarrier.expect(bar, T * 256 * 2)
            tma.async_copy_global_to_shared(latents, [at, 0], bar, left.index(b))
            bar = full_right.index(b)
            mbarrier.wait(empty_right.index(b), phase)
            mbarrier.expect(bar, T * 320 * 2)
            tma.async_copy_global_to_shared(latents, [at, 256], bar, right.index(b))
            tma.async_copy_global_to_shared(turned, [at, 512], bar, rope.index(b))
            count += 1


@gluon.jit
def _consume(
    q, rows, visible, items, bounds, part, part_weight, out, scale2, bars, bufs,
    W: gl.constexpr, T: gl.constexpr, RING: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    queries, left, right, rope, shares, peaks, masses = bufs
    full_left, full_right, empty_left, empty_right, shares_full, queries_full, masses_full, peak_full, shares_free = (
        bars
    )
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    Q_L: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_L)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_L)
    B_L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    program = gl.program_id(0)
    first = gl.load(bounds + program)
    last = gl.load(bounds + program + 1)
    count = 0
    done = 0
    pairs = 0
    if W == 0:
        values = left
        empty = empty_left
        full = full_left
    else:
        values = right
        empty = empty_right
        full = full_right
    for item in range(first, last):
        block = gl.load(items + item * 8)
        tokens = gl.load(items + item * 8 + 2)
        slot = gl.load(items + item * 8 + 3)
        tiles = (tokens + T - 1) // T
        row = gl.maximum(gl.load(rows + block * 64 + gl.arange(0, 64, gl.SliceLayout(1, B_L))), 0)
        half = gl.load(
            q + row[:, None].to(gl.int64) * 576 + (W * 256 + gl.arange(0, 256, gl.SliceLayout(0, B_L)))[None, :]
        )
        queries.index(W).store(half)
        row_q = gl.maximum(gl.load(rows + block * 64 + gl.arange(0, 64, gl.SliceLayout(1, Q_L))), 0)
        q_rope = gl.load(
            q + row_q[:, None].to(gl.int64) * 576 + (512 + gl.arange(0, 64, gl.SliceLayout(0, Q_L)))[None, :]
        )
        fence_async_shared()
        mbarrier.arrive(queries_full, count=1)
        mbarrier.wait(queries_full, done & 1)
        if EDGE:
            sees = gl.load(visible + block * 64 + gl.arange(0, 64, S_ROW)) - gl.load(items + item * 8 + 6)
            sees = gl.minimum(sees, tokens)
        peak = gl.full([64], -1e30, gl.float32, S_ROW)
        mass = gl.full([64], 0.0, gl.float32, S_ROW)
        held = gl.zeros([64, 256], gl.float32, O_L)
        t = gl.arange(0, T, gl.SliceLayout(0, S_L))
        for i in range((tiles + 1) // 2):
            x0 = count % RING
            x1 = (count + 1) % RING
            phase = (count // RING) & 1  # RING is even: both tiles of a pair share the phase
            turn = pairs & 1
            if W == 0:
                own = x0
            else:
                own = x1
            s = gl.zeros([64, T], gl.float32, S_L)
            mbarrier.wait(full_left.index(own), phase)
            s = warpgroup_mma(queries.index(0), left.index(own).permute([1, 0]), s, use_acc=False, is_async=True)
            mbarrier.wait(full_right.index(own), phase)
            s = warpgroup_mma(queries.index(1), right.index(own).permute([1, 0]), s, is_async=True)
            s = warpgroup_mma(q_rope, rope.index(own).permute([1, 0]), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if EDGE:
                s = gl.where(((2 * i + W) * T + t)[None, :] < sees[:, None], s, -float("inf"))
            else:
                s = gl.where(((2 * i + W) * T + t < tokens)[None, :], s, -float("inf"))
            top = gl.max(s, 1) * scale2
            if W == 0:
                peak0 = gl.maximum(peak, top)
                peaks.index(0).store(peak0)
                mbarrier.arrive(peak_full, count=1)
                p = gl.exp2(s * scale2 - peak0[:, None])
                pb = p.to(gl.bfloat16)
                mbarrier.wait(shares_free, turn ^ 1)  # the other group has read the even shares of the pair before
                shares.index(0).store(pb)
                fence_async_shared()
                mbarrier.arrive(shares_full.index(0), count=1)
                shrink0 = gl.exp2(peak - peak0)
                mass = mass * shrink0 + gl.sum(p, 1)
                held = held * gl.convert_layout(shrink0, O_ROW)[:, None]
                held = warpgroup_mma(gl.convert_layout(pb, P_L), values.index(x0), held, is_async=True)
                mbarrier.wait(shares_full.index(1), turn)
                mbarrier.wait(full.index(x1), phase)
                peak1 = peaks.index(1).load(S_ROW)
                shrink1 = gl.exp2(peak0 - peak1)
                mass = mass * shrink1
                held = warpgroup_mma_wait(0, deps=[held])
                mbarrier.arrive(empty.index(x0), count=1)
                held = held * gl.convert_layout(shrink1, O_ROW)[:, None]
                held = warpgroup_mma(shares.index(1), values.index(x1), held, is_async=True)
                held = warpgroup_mma_wait(0, deps=[held])
                mbarrier.arrive(empty.index(x1), count=1)
                peak = peak1
            else:
                mbarrier.wait(peak_full, turn)
                peak0 = peaks.index(0).load(S_ROW)
                peak1 = gl.maximum(peak0, top)
                p = gl.exp2(s * scale2 - peak1[:, None])
                pb = p.to(gl.bfloat16)
                peaks.index(1).store(peak1)
                shares.index(1).store(pb)
                fence_async_shared()
                mbarrier.arrive(shares_full.index(1), count=1)
                shrink0 = gl.exp2(peak - peak0)
                shrink1 = gl.exp2(peak0 - peak1)
                mass = mass * (shrink0 * shrink1) + gl.sum(p, 1)
                held = held * gl.convert_layout(shrink0, O_ROW)[:, None]
                mbarrier.wait(shares_full.index(0), turn)
                mbarrier.wait(full.index(x0), phase)
                held = warpgroup_mma(shares.index(0), values.index(x0), held, is_async=True)
                held = warpgroup_mma_wait(0, deps=[held])
                mbarrier.arrive(empty.index(x0), count=1)
                mbarrier.arrive(shares_free, count=1)
                held = held * gl.convert_layout(shrink1, O_ROW)[:, None]
                held = warpgroup_mma(gl.convert_layout(pb, P_L), values.index(x1), held, is_async=True)
                held = warpgroup_mma_wait(0, deps=[held])
                mbarrier.arrive(empty.index(x1), count=1)
                peak = peak1
            count += 2
            pairs += 1
        masses.index(W).store(mass)
        mbarrier.arrive(masses_full.index(W), count=1)
        mbarrier.wait(masses_full.index(1 - W), done & 1)
        mass = mass + masses.index(1 - W).load(S_ROW)
        # The next item's masses cannot overwrite these: `queries_full` waits for both groups, which read them before.
        share = gl.where(mass > 0, 1.0 / mass, 0.0)
        held = held * gl.convert_layout(share, O_ROW)[:, None]
        r = gl.arange(0, 64, O_ROW)
        column = W * 256 + gl.arange(0, 256, gl.SliceLayout(0, O_L))
        if slot >= 0:
            gl.store(part + (slot * 64 + r)[:, None].to(gl.int64) * 512 + column[None, :], held)
            if W == 0:
                weight = gl.where(mass > 0, peak + gl.log2(gl.where(mass > 0, mass, 1.0)), -float("inf"))
                gl.store(part_weight + slot * 64 + gl.arange(0, 64, S_ROW), weight)
        else:
            row_o = gl.load(rows + block * 64 + r)
            live = (row_o >= 0)[:, None] & (column >= 0)[None, :]
            gl.store(
                out + gl.maximum(row_o, 0)[:, None].to(gl.int64) * 512 + column[None, :],
                held.to(gl.bfloat16),
                mask=live,
            )
        done += 1


@gluon.jit
def attend_rows_hopper(
    q, latents, turned, rows, visible, pages, items, bounds, part, part_weight, out, scale2,
    PAGE: gl.constexpr, T: gl.constexpr, RING: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """As `attend_rows` with R = 64. T is 64 with RING 2 for large batches, 32 with RING 4 for small ones."""
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SHARES: gl.constexpr = gl.NVMMASharedLayout(T * 2, 16)
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], SH)
    left = gl.allocate_shared_memory(gl.bfloat16, [RING, T, 256], SH)
    right = gl.allocate_shared_memory(gl.bfloat16, [RING, T, 256], SH)
    rope = gl.allocate_shared_memory(gl.bfloat16, [RING, T, 64], SH)
    shares = gl.allocate_shared_memory(gl.bfloat16, [2, 64, T], SHARES)
    peaks = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    masses = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
    full_left = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    full_right = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty_left = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty_right = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    shares_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    masses_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    queries_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    peak_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    shares_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for b in gl.static_range(RING):
        mbarrier.init(full_left.index(b), count=1)
        mbarrier.init(full_right.index(b), count=1)
        mbarrier.init(empty_left.index(b), count=1)
        mbarrier.init(empty_right.index(b), count=1)
    for b in gl.static_range(2):
        mbarrier.init(shares_full.index(b), count=1)
        mbarrier.init(masses_full.index(b), count=1)
    mbarrier.init(queries_full, count=2)
    mbarrier.init(peak_full, count=1)
    mbarrier.init(shares_free, count=1)
    bufs = (queries, left, right, rope, shares, peaks, masses)
    bars = (
        full_left,
        full_right,
        empty_left,
        empty_right,
        shares_full,
        queries_full,
        masses_full,
        peak_full,
        shares_free,
    )
    gl.warp_specialize(
        [
            (_produce, (latents, turned, pages, items, bounds, bars, bufs, PAGE, T, RING)),
            (
                _consume,
                (
                    q,
                    rows,
                    visible,
                    items,
                    bounds,
                    part,
                    part_weight,
                    out,
                    scale2,
                    bars,
                    bufs,
                    gl.constexpr(0),
                    T,
                    RING,
                    EDGE,
                ),
            ),
            (
                _consume,
                (
                    q,
                    rows,
                    visible,
                    items,
                    bounds,
                    part,
                    part_weight,
                    out,
                    scale2,
                    bars,
                    bufs,
                    gl.constexpr(1),
                    T,
                    RING,
                    EDGE,
                ),
            ),
        ],
        [4, 4],
        [240, 240],
    )
