"""Attention of many new tokens over keys and values that were decompressed from a chunk of the cached latents."""

from __future__ import annotations

import triton
import triton.language as tl

from agentspeed_kernels.triton.device.rows import soften, weight_of


@triton.jit
def _tile(
    q_nope, q_rope, keys, turned, values, head_row, token, sees, tokens, peak, mass, held, scale2,
    BN: tl.constexpr, RANK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One tile of BN tokens from `token` on; EDGE hides what a row does not see, and what is past the chunk."""
    k = keys.load([head_row + token, 0])
    k_rope = turned.load([token, RANK])
    s = tl.dot(q_nope, tl.trans(k), input_precision="ieee")
    s = tl.dot(q_rope, tl.trans(k_rope), s, input_precision="ieee")
    if EDGE:
        t = token + tl.arange(0, BN)
        s = tl.where((t[None, :] < sees[:, None]) & (t < tokens)[None, :], s, -float("inf"))
    p, shrink, higher = soften(s, peak, scale2)
    mass = mass * shrink + tl.sum(p, 1)
    v = values.load([head_row + token, 0])
    held = tl.dot(p.to(v.dtype), v, held * shrink[:, None], input_precision="ieee")
    return higher, mass, held


# What changes from step to step is no form of its own: each would be compiled in the middle of a turn.
@triton.jit(do_not_specialize=["T", "tokens", "rows_of_head", "before", "seen_first"])
def attend_chunk(
    q, keys, turned, values, part, part_weight, out, q_token, q_head, out_token, out_head, T, tokens, rows_of_head,
    before, seen_first, scale2,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, VALUE: tl.constexpr,
    WIDE_NOPE: tl.constexpr, WIDE_ROPE: tl.constexpr, WIDE_VALUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PARTS: tl.constexpr, CARRY: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Query t sees seen_first + t tokens of the context; the chunk holds `tokens` of them behind the first `before`.

    keys [HEADS * rows_of_head, NOPE], values likewise, turned [tokens, RANK + ROPE] as descriptors. Partials are
    normalised, row ((part * T) + t) * HEADS + h; CARRY joins what earlier chunks left there, LAST writes the result
    where PARTS is 1. Grid (ceil(T / BM), HEADS, PARTS)."""
    # The blocks that see the most come first, so that the last wave is short.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    number = tl.program_id(2)
    r = block * BM + tl.arange(0, BM)
    live = r < T
    n = tl.arange(0, WIDE_NOPE)
    x = tl.arange(0, WIDE_ROPE)
    base = q + r[:, None].to(tl.int64) * q_token + head * q_head
    q_nope = tl.load(base + n[None, :], mask=live[:, None] & (n < NOPE)[None, :], other=0.0)
    q_rope = tl.load(base + NOPE + x[None, :], mask=live[:, None] & (x < ROPE)[None, :], other=0.0)
    sees = seen_first + r - before
    peak = tl.full((BM,), -1e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    held = tl.zeros((BM, WIDE_VALUE), tl.float32)
    end = tl.minimum(tokens, seen_first + tl.minimum(block * BM + BM, T) - 1 - before)
    share = tl.cdiv(tl.cdiv(tl.maximum(end, 0), PARTS), BN) * BN
    low = number * share
    high = tl.minimum(low + share, end)
    # Whole tiles below what the block's first row sees need no mask.
    plain = tl.minimum(seen_first + block * BM - before, tokens)
    plain = tl.minimum(tl.maximum(plain // BN * BN, low), tl.maximum(high // BN * BN, low))
    head_row = head * rows_of_head
    for token in range(low, plain, BN):
        peak, mass, held = _tile(
            q_nope,
            q_rope,
            keys,
            turned,
            values,
            head_row,
            token,
            sees,
            tokens,
            peak,
            mass,
            held,
            scale2,
            BN,
            RANK,
            False,
        )
    for token in range(plain, high, BN):
        peak, mass, held = _tile(
            q_nope,
            q_rope,
            keys,
            turned,
            values,
            head_row,
            token,
            sees,
            tokens,
            peak,
            mass,
            held,
            scale2,
            BN,
            RANK,
            True,
        )
    whole = tl.where(mass > 0, 1.0 / mass, 0.0)
    held = held * whole[:, None]
    weight = weight_of(peak, mass)
    v = tl.arange(0, WIDE_VALUE)
    at = (number * T + r) * HEADS + head
    keep = live[:, None] & (v < VALUE)[None, :]
    if CARRY:
        old_weight = tl.load(part_weight + at, mask=live, other=-float("inf"))
        old = tl.load(part + at[:, None].to(tl.int64) * VALUE + v[None, :], mask=keep, other=0.0)
        top = tl.maximum(tl.maximum(weight, old_weight), -1e30)
        mine = tl.exp2(weight - top)
        theirs = tl.exp2(old_weight - top)
        both = mine + theirs
        inverse = tl.where(both > 0, 1.0 / both, 0.0)
        held = held * (mine * inverse)[:, None] + old * (theirs * inverse)[:, None]
        weight = weight_of(top, both)
    if LAST and PARTS == 1:
        at_out = out + r[:, None].to(tl.int64) * out_token + head * out_head + v[None, :]
        tl.store(at_out, held.to(out.dtype.element_ty), mask=keep)
    else:
        tl.store(part + at[:, None].to(tl.int64) * VALUE + v[None, :], held, mask=keep)
        tl.store(part_weight + at, weight, mask=live)
