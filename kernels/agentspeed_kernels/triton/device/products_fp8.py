"""Products with weights in e4m3 that share a float32 scale in blocks of 128 outputs by 128 inputs.

Scales are [ceil(N / 128), ceil(K / 128)]. Few rows: a thread has 16 neighbours of a weight's row, one load, and gives
the scale to their sum; what they are multiplied with is loaded in four dimensions and gets the fifth, of the rows, by
a view, since the compiler then moves it into the layout of the weights and not the other way. EARLY: as in
`device.products`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def blocks(first, CUTS: tl.constexpr):
    """Numbers [1, 4, CUTS, 1] of 4 * CUTS blocks of columns from `first` on."""
    return first + tl.arange(0, 4)[None, :, None, None] + 4 * tl.arange(0, CUTS)[None, None, :, None]


@triton.jit
def within():
    """Numbers [8, 1, 1, 16] of the columns of a block."""
    return tl.arange(0, 8)[:, None, None, None] * 16 + tl.arange(0, 16)[None, None, None, :]


@triton.jit
def columns(first, CUTS: tl.constexpr):
    """Numbers [8, 4, CUTS, 16] of the columns from block `first` on: a warp has 512 at once, a thread 16."""
    return blocks(first, CUTS) * 128 + within()


@triton.jit
def scales_of(scales, first, BLOCKS: tl.constexpr, CUTS: tl.constexpr):
    """[1, 4, 1, CUTS]: of a row of BLOCKS scales those of the columns that `columns` gives."""
    block = first + tl.arange(0, 4)[None, :, None, None] + 4 * tl.arange(0, CUTS)[None, None, None, :]
    return tl.load(scales + block, mask=block < BLOCKS, other=0.0)


@triton.jit
def linear(
    x, residual, gain, weight, scales, bias, out, total, x_stride, out_stride, eps, N,
    K: tl.constexpr, BN: tl.constexpr, CUTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`products.linear` for weights in e4m3; grid (ceil(N / BN), T). BN divides 128: a program's rows share scales."""
    BLOCKS: tl.constexpr = (K + 127) // 128
    first_row = tl.program_id(0) * BN
    n = first_row + tl.arange(0, BN)
    rows = weight + n[None, None, :, None, None].to(tl.int64) * K
    inside_rows = (n < N)[None, None, :, None, None]
    own_scales = scales + (first_row // 128) * BLOCKS
    token = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((8, 4, BN), tl.float32)
    squares = tl.zeros((8, 4), tl.float32)
    for first in tl.static_range(0, BLOCKS, 4 * CUTS):
        k = columns(first, CUTS)
        inside = k < K
        w = tl.load(rows + k[:, :, None, :, :], mask=inside_rows & inside[:, :, None, :, :], other=0.0)
        scale = scales_of(own_scales, first, BLOCKS, CUTS)
        if EARLY and first == 0:
            gdc_wait()
            gdc_launch_dependents()
        value = tl.load(x + token * x_stride + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value += tl.load(residual + token * K + k, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            if tl.program_id(0) == 0:
                tl.store(total + token * K + k, rounded, mask=inside)
            value = rounded.to(tl.float32)
            squares += tl.sum(tl.sum(value * value, 3), 2)
            value = value * tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(tl.sum(w.to(tl.float32) * value[:, :, None, :, :], 4) * scale, 3)
    result = tl.sum(tl.reshape(sums, (32, BN)), 0)
    if NORM:
        result = result * tl.rsqrt(tl.sum(squares) / K + eps)
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["T"])
def linear_many(
    x, weight, scales, bias, out, x_stride, out_stride, T, N,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t] = x[t] @ weight[N, K]^T (+ bias) with matrix instructions; grid (ceil(N / BN), ceil(T / BM)).

    Weights become the format of x, which holds each exactly; the scale of a block goes to its sums in float32."""
    CUTS: tl.constexpr = (K + 127) // 128
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    first_row = tl.program_id(0) * BN
    n = first_row + tl.arange(0, BN)
    t = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, 128)
    rows = weight + n[:, None].to(tl.int64) * K + k[None, :]
    tokens = x + t.to(tl.int64)[:, None] * x_stride + k[None, :]
    own_scales = scales + (first_row // 128) * CUTS
    sums = tl.zeros((BM, BN), tl.float32)
    for cut in range(CUTS):
        inside = cut * 128 + k < K
        w = tl.load(rows + cut * 128, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        value = tl.load(tokens + cut * 128, mask=(t < T)[:, None] & inside[None, :], other=0.0)
        part = tl.dot(value, tl.trans(w.to(tl.float32).to(x.dtype.element_ty)), input_precision="ieee")
        sums += part * tl.load(own_scales + cut)
    if BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out + t.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def widen(weight, scales, out, N, K: tl.constexpr, BN: tl.constexpr):
    """out[N, K] = weight * scales, in the format of out; grid (ceil(N / BN), ceil(K / 128))."""
    CUTS: tl.constexpr = (K + 127) // 128
    first_row = tl.program_id(0) * BN
    n = first_row + tl.arange(0, BN)
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None].to(tl.int64) * K + k[None, :]
    scale = tl.load(scales + (first_row // 128) * CUTS + tl.program_id(1))
    value = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
