"""From a token's projections to what attention takes: absorbed queries, turned rope parts, and the new latent's row."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from agentspeed_kernels.triton.device.elementwise import append_row


@triton.jit
def _turn(q, cos, sin, out, heads, q_head, out_head, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The rope parts of some heads of one token, at `q`, turned to `out`."""
    i = tl.arange(0, BLOCK_HALF)
    inside = (i < HALF)[None, :] & (heads < HEADS)[:, None]
    c = tl.load(cos + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    at = q + heads[:, None] * q_head + i[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = out + heads[:, None] * out_head + i[None, :]
    tl.store(to, (low * c - high * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (high * c + low * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def queries_few(
    q, raw, gain, cos, sin, slots, key_up, pool, out, q_token, q_head, raw_token, eps,
    HEADS: tl.constexpr, H2: tl.constexpr, RANK: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr,
    BN: tl.constexpr, BLOCKS: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[t, h] = key_up[h] @ q[t, h, :NOPE], then the turned rest of q[t, h]; the pool gets the token's row.

    Grid (HEADS * BLOCKS + 1, T): the last program of a token turns and appends, the others multiply."""
    part = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    head = (part // BLOCKS).to(tl.int64)
    n = (part % BLOCKS) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    D: tl.constexpr = RANK + 2 * HALF
    mine = part < HEADS * BLOCKS
    inside = k < NOPE
    w = tl.load(
        key_up + (head * RANK + n[:, None]) * NOPE + k[None, :], mask=(n < RANK)[:, None] & inside[None, :] & mine,
        other=0.0,
    )  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if mine:
        value = tl.load(q + token * q_token + head * q_head + k, mask=inside, other=0.0).to(tl.float32)
        result = tl.sum(w.to(tl.float32) * value[None, :], 1)
        tl.store(out + (token * HEADS + head) * D + n, result.to(out.dtype.element_ty), mask=n < RANK)
    else:
        cos_row = cos + token * HALF
        sin_row = sin + token * HALF
        append_row(
            raw + token * raw_token, gain, cos_row, sin_row, tl.load(slots + token), pool, eps, RANK, HALF, BLOCK,
            BLOCK_HALF,
        )  # fmt: skip
        _turn(
            q + token * q_token + NOPE, cos_row, sin_row, out + token * HEADS * D + RANK, tl.arange(0, H2), q_head, D,
            HEADS, HALF, BLOCK_HALF,
        )  # fmt: skip


@triton.jit
def turn_and_append(
    q, raw, gain, cos, sin, slots, pool, out, q_token, q_head, raw_token, eps,
    HEADS: tl.constexpr, H2: tl.constexpr, RANK: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """What `queries_few` does beside its products; grid (T, 2): one program turns, one appends."""
    token = tl.program_id(0).to(tl.int64)
    cos_row = cos + token * HALF
    sin_row = sin + token * HALF
    D: tl.constexpr = RANK + 2 * HALF
    if tl.program_id(1) == 0:
        _turn(
            q + token * q_token + NOPE, cos_row, sin_row, out + token * HEADS * D + RANK, tl.arange(0, H2), q_head, D,
            HEADS, HALF, BLOCK_HALF,
        )  # fmt: skip
    else:
        append_row(
            raw + token * raw_token, gain, cos_row, sin_row, tl.load(slots + token), pool, eps, RANK, HALF, BLOCK,
            BLOCK_HALF,
        )  # fmt: skip
