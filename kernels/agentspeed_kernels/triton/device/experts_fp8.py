"""SwiGLU of experts whose weights are e4m3 in scaled blocks (`device.products_fp8`): few tokens, and grouped.

Scales are [E, 2, ceil(I / 128), ceil(D / 128)] of gate and up, [E, ceil(D / 128), ceil(I / 128)] of down. Sums over a
token's experts are taken in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from agentspeed_kernels.triton.device.products_fp8 import blocks, columns, scales_of, within


@triton.jit
def _gate_up(
    x, gate_up, scales, act, block, D: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, CUTS: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """act[i] = silu(gate) * up, rounded to its format, for one block of an expert's inner rows and one token. WAIT: for
    what was launched before, once the first weights are on their way."""
    BLOCKS: tl.constexpr = (D + 127) // 128
    HIGH: tl.constexpr = (I + 127) // 128
    i = block * BI + tl.arange(0, BI)
    inner = i < I
    gate_scales = scales + (block * BI // 128) * BLOCKS
    rows = gate_up + i[None, None, :, None, None] * D
    gate = tl.zeros((8, 4, BI), tl.float32)
    up = tl.zeros((8, 4, BI), tl.float32)
    for first in tl.static_range(0, BLOCKS, 4 * CUTS):
        d = columns(first, CUTS)
        inside = inner[None, None, :, None, None] & (d < D)[:, :, None, :, :]
        g = tl.load(rows + d[:, :, None, :, :], mask=inside, other=0.0)
        u = tl.load(rows + (I * D + d)[:, :, None, :, :], mask=inside, other=0.0)
        gate_scale = scales_of(gate_scales, first, BLOCKS, CUTS)
        up_scale = scales_of(gate_scales + HIGH * BLOCKS, first, BLOCKS, CUTS)
        if WAIT and first == 0:
            gdc_wait()
            gdc_launch_dependents()
        value = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)[:, :, None, :, :]
        gate += tl.sum(tl.sum(g.to(tl.float32) * value, 4) * gate_scale, 3)
        up += tl.sum(tl.sum(u.to(tl.float32) * value, 4) * up_scale, 3)
    g = tl.sum(tl.reshape(gate, (32, BI)), 0)
    u = tl.sum(tl.reshape(up, (32, BI)), 0)
    tl.store(act + i, (g / (1.0 + tl.exp(-g)) * u).to(act.dtype.element_ty), mask=inner)


@triton.jit
def gate_up_few(
    x, gate_up, scales, shared_gate_up, shared_scales, ids, act,
    E: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, I: tl.constexpr, S: tl.constexpr, BI: tl.constexpr,
    CUTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`experts.gate_up_few`; grid (TOP * ceil(I / BI) + ceil(S / BI), T). BI divides 128."""
    PARTS: tl.constexpr = (I + BI - 1) // BI
    SCALES: tl.constexpr = 2 * ((I + 127) // 128) * ((D + 127) // 128)
    part = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    own = act + token * (TOP * I + S)
    if part < TOP * PARTS:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        expert = tl.load(ids + token * TOP + part // PARTS).to(tl.int64)
        at = own + (part // PARTS) * I
        block = part % PARTS
        if expert < E:
            _gate_up(
                x + token * D, gate_up + expert * (2 * I * D), scales + expert * SCALES, at, block, D, I, BI, CUTS,
                False,
            )  # fmt: skip
        else:
            i = block * BI + tl.arange(0, BI)
            tl.store(at + i, tl.zeros((BI,), act.dtype.element_ty), mask=i < I)
    else:
        if S > 0:
            _gate_up(
                x + token * D, shared_gate_up, shared_scales, own + TOP * I, part - TOP * PARTS, D, S, BI, CUTS, EARLY
            )


@triton.jit
def _inner(ids, block, I: tl.constexpr, S: tl.constexpr, E: tl.constexpr, TOP: tl.constexpr, FRESH: tl.constexpr):
    """Of blocks of inner columns, those of a token's TOP experts one after the other and then the shared expert's:
    whether it is a routed one's, its place among them, its expert, its number within that, and whether there is any.
    FRESH: ids come from L2, the chip's first cache may hold a line of an earlier layer."""
    OWN: tl.constexpr = (I + 127) // 128
    ALL: tl.constexpr = TOP * OWN
    MORE: tl.constexpr = (S + 127) // 128
    routed = block < ALL
    place = block // OWN
    if FRESH:
        expert = tl.load(ids + place, mask=routed, other=E, cache_modifier=".cg").to(tl.int64)
    else:
        expert = tl.load(ids + place, mask=routed, other=E).to(tl.int64)
    number = tl.where(routed, block - place * OWN, block - ALL)
    there = (routed & (expert < E)) | (~routed & (block < ALL + MORE))
    return routed, place, expert, number, there


@triton.jit
def _down_tile(
    down, shared_down, ids, n, first, D: tl.constexpr, I: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    TOP: tl.constexpr, CUTS: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Rows n of the down matrices in the blocks from `first` on; of nobody's zeros."""
    routed, _, expert, number, there = _inner(ids, blocks(first, CUTS), I, S, E, TOP, FRESH)
    column = number * 128 + within()
    inside = (column < tl.where(routed, I, S)) & there
    at = tl.where(routed, down + expert * (D * I), shared_down) + column
    rows = n[None, None, :, None, None] * tl.where(routed, I, S)[:, :, None, :, :]
    return tl.load(
        at[:, :, None, :, :] + rows, mask=(n < D)[None, None, :, None, None] & inside[:, :, None, :, :], other=0.0
    )


@triton.jit
def _down_sums(
    act, w, scales, shared_scales, ids, weights, row, first, D: tl.constexpr, I: tl.constexpr, S: tl.constexpr,
    E: tl.constexpr, TOP: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """[8, 4, rows]: what a tile of `_down_tile` adds. An expert that was chosen counts by its weight."""
    OWN: tl.constexpr = (I + 127) // 128
    MORE: tl.constexpr = (S + 127) // 128
    HIGH: tl.constexpr = (D + 127) // 128
    block = blocks(first, CUTS)
    place = tl.minimum(block // OWN, TOP)
    column = (block - place * OWN) * 128 + within()
    inside = (block < TOP * OWN + MORE) & (column < tl.where(block < TOP * OWN, I, S))
    value = tl.load(act + place * I + column, mask=inside, other=0.0).to(tl.float32)
    own = first + tl.arange(0, 4)[None, :, None, None] + 4 * tl.arange(0, CUTS)[None, None, None, :]
    routed, place, expert, number, there = _inner(ids, own, I, S, E, TOP, False)
    at = tl.where(routed, scales + (expert * HIGH + row // 128) * OWN, shared_scales + row // 128 * MORE)
    share = tl.load(weights + place, mask=routed, other=1.0)
    scale = tl.load(at + number, mask=there, other=0.0) * share
    return tl.sum(tl.sum(w.to(tl.float32) * value[:, :, None, :, :], 4) * scale, 3)


@triton.jit
def down_few(
    act, down, scales, shared_down, shared_scales, ids, weights, out,
    E: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, I: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
    CUTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`experts.down_few`; grid (ceil(D / BN), T). BN divides 128.

    The ids are older than the launch before this one, so weights are read without a wait."""
    ALL: tl.constexpr = TOP * ((I + 127) // 128) + (S + 127) // 128
    STEP: tl.constexpr = 4 * CUTS
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BN
    n = row + tl.arange(0, BN)
    own = act + token * (TOP * I + S)
    chosen = ids + token * TOP
    shares = weights + token * TOP
    w = _down_tile(down, shared_down, chosen, n, 0, D, I, S, E, TOP, CUTS, True)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    sums = _down_sums(own, w, scales, shared_scales, chosen, shares, row, 0, D, I, S, E, TOP, CUTS)
    for first in range(STEP, ALL, STEP):
        w = _down_tile(down, shared_down, chosen, n, first, D, I, S, E, TOP, CUTS, False)
        sums += _down_sums(own, w, scales, shared_scales, chosen, shares, row, first, D, I, S, E, TOP, CUTS)
    result = tl.sum(tl.reshape(sums, (32, BN)), 0)
    tl.store(out + token * D + n, result.to(out.dtype.element_ty), mask=n < D)


@triton.jit(do_not_specialize=["T"])
def gate_up_grouped(
    x, gate_up, scales, shared_gate_up, shared_scales, order, starts, act, shared_act, T,
    TOP: tl.constexpr, D: tl.constexpr, I: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`experts.gate_up_grouped`, and shared_act[t] likewise of the shared expert, whose inner rows are S (0: there is
    none); grid (ceil(I / BI), blocks of rows, experts after as many as the shared one's rows fill). BI divides 128."""
    BLOCKS: tl.constexpr = (D + 127) // 128
    TILES: tl.constexpr = (I + BI - 1) // BI
    SHARED: tl.constexpr = (S + TILES * BI - 1) // (TILES * BI)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    # Those of the shared expert have the most rows: they begin first.
    routed = tl.program_id(2) >= SHARED
    expert = tl.maximum(tl.program_id(2).to(tl.int64) - SHARED, 0)
    width = tl.where(routed, I, S)
    high = (width + 127) // 128
    row = (tl.program_id(0) + tl.where(routed, 0, tl.program_id(2) * TILES)) * BI
    begin = tl.where(routed, tl.load(starts + expert), 0) + tl.program_id(1) * BM
    last = tl.where(routed, tl.load(starts + expert + 1), T)
    i = row + tl.arange(0, BI)
    d = tl.arange(0, 128)
    base = tl.where(routed, gate_up + expert * (2 * I * D), shared_gate_up) + i[:, None].to(tl.int64) * D + d[None, :]
    up_base = base + width.to(tl.int64) * D
    gate_scales = tl.where(routed, scales + expert * (2 * high * BLOCKS), shared_scales) + row // 128 * BLOCKS
    up_scales = gate_scales + high * BLOCKS
    to = tl.where(routed, act, shared_act)
    for first in range(begin, last, tl.num_programs(1) * BM):
        r = first + tl.arange(0, BM)
        live = r < last
        pair = tl.load(order + r, mask=live & routed, other=0)
        token = tl.where(routed, pair // TOP, r).to(tl.int64)
        tokens = x + token[:, None] * D + d[None, :]
        gate = tl.zeros((BM, BI), tl.float32)
        up = tl.zeros((BM, BI), tl.float32)
        for block in range(BLOCKS):
            inside = block * 128 + d < D
            value = tl.load(tokens + block * 128, mask=live[:, None] & inside[None, :], other=0.0)
            mask = (i < width)[:, None] & inside[None, :]
            g = tl.load(base + block * 128, mask=mask, other=0.0).to(tl.float32).to(x.dtype.element_ty)
            u = tl.load(up_base + block * 128, mask=mask, other=0.0).to(tl.float32).to(x.dtype.element_ty)
            there = row < width
            gate_scale = tl.load(gate_scales + block, mask=there, other=0.0)
            up_scale = tl.load(up_scales + block, mask=there, other=0.0)
            gate += tl.dot(value, tl.trans(g), input_precision="ieee") * gate_scale
            up += tl.dot(value, tl.trans(u), input_precision="ieee") * up_scale
        result = gate / (1.0 + tl.exp(-gate)) * up
        at_act = to + tl.where(routed, pair, r).to(tl.int64)[:, None] * width + i[None, :]
        tl.store(at_act, result.to(act.dtype.element_ty), mask=live[:, None] & (i < width)[None, :])


@triton.jit(do_not_specialize=["T", "PAIRS"])
def down_grouped(
    act, shared_act, down, scales, shared_down, shared_scales, order, starts, weights, part, T, PAIRS,
    D: tl.constexpr, I: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`experts.down_grouped`, and behind the PAIRS rows of `part` one a token of the shared expert, whose inner rows
    are S (0: there is none); grid (ceil(D / BN), blocks of rows, experts after the shared one). BN divides 128."""
    SHARED: tl.constexpr = 1 if S > 0 else 0
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    routed = tl.program_id(2) >= SHARED
    expert = tl.maximum(tl.program_id(2).to(tl.int64) - SHARED, 0)
    width = tl.where(routed, I, S)
    cuts = (width + 127) // 128
    begin = tl.where(routed, tl.load(starts + expert), 0) + tl.program_id(1) * BM
    last = tl.where(routed, tl.load(starts + expert + 1), T)
    row = tl.program_id(0) * BN
    n = row + tl.arange(0, BN)
    k = tl.arange(0, 128)
    base = tl.where(routed, down + expert * (D * I), shared_down) + n[:, None] * width + k[None, :]
    HIGH: tl.constexpr = (D + 127) // 128
    own_scales = tl.where(routed, scales + expert * (HIGH * cuts), shared_scales) + row // 128 * cuts
    source = tl.where(routed, act, shared_act)
    for first in range(begin, last, tl.num_programs(1) * BM):
        r = first + tl.arange(0, BM)
        live = r < last
        pair = tl.where(routed, tl.load(order + r, mask=live & routed, other=0), r).to(tl.int64)
        rows = source + pair[:, None] * width + k[None, :]
        sums = tl.zeros((BM, BN), tl.float32)
        for block in range(cuts):
            inside = block * 128 + k < width
            value = tl.load(rows + block * 128, mask=live[:, None] & inside[None, :], other=0.0)
            w = tl.load(base + block * 128, mask=(n < D)[:, None] & inside[None, :], other=0.0)
            scale = tl.load(own_scales + block)
            product = tl.dot(value, tl.trans(w.to(tl.float32).to(act.dtype.element_ty)), input_precision="ieee")
            sums += product * scale
        share = tl.where(routed, tl.load(weights + pair, mask=live & routed, other=0.0), 1.0)
        at_part = part + (pair + tl.where(routed, 0, PAIRS))[:, None] * D + n[None, :]
        tl.store(at_part, sums * share[:, None], mask=live[:, None] & (n < D)[None, :])
