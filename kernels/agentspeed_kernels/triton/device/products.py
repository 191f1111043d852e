"""Products with few rows, where reading the weights once at full bandwidth is all that matters.

EARLY, here and in the other kernels of a decode step: the launch does not wait for the kernel before it (programmatic
dependent launch). Such a kernel reads weights at once, and what others wrote after `gdc_wait`; only then it lets the
next one begin. So a kernel that begins finds all done but the one before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def linear(
    x, residual, gain, weight, bias, out, total, x_stride, out_stride, eps, T, N,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t] = y[t] @ weight[N, K]^T (+ bias); y is x, or with NORM the norm of x + residual times gain.

    Grid (ceil(N / BN), T). With NORM every program adds and squares the row again, from L2; programs of column block 0
    write x + residual, rounded, to `total`, which is not `residual`: others may still read that."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BK)
    rows = n < N
    sums = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for at in tl.static_range(0, K, BK):
        inside = at + k < K
        w = tl.load(
            weight + n[:, None].to(tl.int64) * K + (at + k)[None, :], mask=rows[:, None] & inside[None, :], other=0.0
        )
        if EARLY and at == 0:
            gdc_wait()
            gdc_launch_dependents()
        value = tl.load(x + token * x_stride + at + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value += tl.load(residual + token * K + at + k, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            if tl.program_id(0) == 0:
                tl.store(total + token * K + at + k, rounded, mask=inside)
            value = rounded.to(tl.float32)
            squares += value * value
            value = value * tl.load(gain + at + k, mask=inside, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * value[None, :]
    result = tl.sum(sums, 1)
    if NORM:
        result = result * tl.rsqrt(tl.sum(squares, 0) / K + eps)
    if BIAS:
        result += tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + n, result.to(out.dtype.element_ty), mask=rows)


@triton.jit
def heads_few(
    x, weight, out, x_token, x_head, out_token, out_head,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t, h] = weight[h] @ x[t, h], reading x and weight once; grid (ceil(N / BN), heads, T)."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside = k < K
    w = tl.load(weight + (head * N + n[:, None]) * K + k[None, :], mask=(n < N)[:, None] & inside[None, :], other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + token * x_token + head * x_head + k, mask=inside, other=0.0).to(tl.float32)
    result = tl.sum(w.to(tl.float32) * value[None, :], 1)
    tl.store(out + token * out_token + head * out_head + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["T"])
def heads_many(
    x, weight, out, x_token, x_head, out_token, out_head, T,
    N: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same for many tokens, with matrix instructions; grid (ceil(T / BT), ceil(N / BN), heads)."""
    head = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BT, BN), tl.float32)
    tokens = t.to(tl.int64)[:, None]
    for at in range(0, K, BK):
        inside = at + k < K
        value = tl.load(
            x + tokens * x_token + head * x_head + (at + k)[None, :], mask=(t < T)[:, None] & inside[None, :], other=0.0
        )
        w = tl.load(
            weight + (head * N + n[:, None]) * K + (at + k)[None, :], mask=(n < N)[:, None] & inside[None, :], other=0.0
        )
        sums = tl.dot(value, tl.trans(w), sums, input_precision="ieee")
    at_out = out + tokens * out_token + head * out_head + n[None, :]
    tl.store(at_out, sums.to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def linear_blocks(
    x, weight, bias, out, x_stride, out_stride, T, N,
    K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = x @ weight[N, K]^T (+ bias) by matrix instructions, whose sums go along K from the first to the last,
    whatever the blocks; grid (ceil(N / BN), ceil(T / BT))."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    tokens = t.to(tl.int64)[:, None]
    there, rows = (t < T)[:, None], (n < N)[:, None]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    sums = tl.zeros((BT, BN), tl.float32)
    for at in range(0, K, BK):
        inside = (at + k < K)[None, :]
        value = tl.load(x + tokens * x_stride + (at + k)[None, :], mask=there & inside, other=0.0)
        w = tl.load(weight + n[:, None].to(tl.int64) * K + (at + k)[None, :], mask=rows & inside, other=0.0)
        sums = tl.dot(value, tl.trans(w), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + tokens * out_stride + n[None, :], sums.to(out.dtype.element_ty), mask=there & (n < N)[None, :])
