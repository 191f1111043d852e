"""Routing of tokens to experts, and their SwiGLU: a form for few tokens and one grouped by expert.

Sums over a token's experts are taken in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores(x, weight, out, x_stride, E: tl.constexpr, D: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):
    """out[t, e] = x[t] . weight[e] in float32; grid (ceil(E / BE), T)."""
    token = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    d = tl.arange(0, BD)
    sums = tl.zeros((BE, BD), tl.float32)
    for at in tl.static_range(0, D, BD):
        inside = at + d < D
        w = tl.load(weight + e[:, None] * D + (at + d)[None, :], mask=(e < E)[:, None] & inside[None, :], other=0.0)
        value = tl.load(x + token * x_stride + at + d, mask=inside, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * value[None, :]
    tl.store(out + token * E + e, tl.sum(sums, 1), mask=e < E)


@triton.jit
def choose(
    logits, bias, ids, weights, scale,
    E: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PAD_GROUP: tl.constexpr, PAD_GROUPS: tl.constexpr,
    TOP: tl.constexpr, PAD_TOP: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Scores of one token to its TOP experts by falling choice score (the lower id first among equals).

    Experts lie as [groups, experts of a group], both padded to powers of two. One program a token."""
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, PAD_GROUPS)[:, None]
    m = tl.arange(0, PAD_GROUP)[None, :]
    e = g * GROUP + m
    there = (g < GROUPS) & (m < GROUP)
    logit = tl.load(logits + token * E + e, mask=there, other=-float("inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        peak = tl.max(tl.max(logit, 1), 0)
        score = tl.exp(logit - peak)
        score = score / tl.sum(tl.sum(score, 1), 0)
    choice = score
    if BIAS:
        choice += tl.load(bias + e, mask=there, other=0.0)
    choice = tl.where(there, choice, -float("inf"))
    if GROUPS > 1:
        worth = tl.max(choice, 1)
        if SUM_OF_TWO:
            best = tl.argmax(choice, 1)
            rest = tl.where(m == best[:, None], -float("inf"), choice)
            worth += tl.max(rest, 1)
        number = tl.arange(0, PAD_GROUPS)
        left = worth
        kept = tl.zeros((PAD_GROUPS,), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            taken = tl.argmax(left, 0)
            kept = tl.where(number == taken, 1, kept)
            left = tl.where(number == taken, -float("inf"), left)
        choice = tl.where((kept == 1)[:, None], choice, -float("inf"))
    place = tl.arange(0, PAD_TOP)
    chosen = tl.zeros((PAD_TOP,), tl.int32)
    held = tl.zeros((PAD_TOP,), tl.float32)
    for i in tl.static_range(TOP):
        group = tl.argmax(tl.max(choice, 1), 0)
        in_group = tl.where(g == group, choice, -float("inf"))
        member = tl.argmax(tl.max(in_group, 0), 0)
        hit = (g == group) & (m == member)
        chosen = tl.where(place == i, group * GROUP + member, chosen)
        held = tl.where(place == i, tl.sum(tl.sum(tl.where(hit, score, 0.0), 1), 0), held)
        choice = tl.where(hit, -float("inf"), choice)
    if NORMALISE:
        held = held / (tl.sum(held, 0) + 1e-20)
    tl.store(ids + token * TOP + place, chosen.to(tl.int64), mask=place < TOP)
    tl.store(weights + token * TOP + place, held * scale, mask=place < TOP)


@triton.jit
def gate_up_few(
    x, gate_up, ids, act, TOP: tl.constexpr, D: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr
):
    """act[pair, i] = silu(gate) * up in float32 for every (token, chosen expert); grid (ceil(I / BI), pairs)."""
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    d = tl.arange(0, BD)
    inner = i < I
    base = gate_up + expert * (2 * I * D)
    gate = tl.zeros((BI, BD), tl.float32)
    up = tl.zeros((BI, BD), tl.float32)
    for at in tl.static_range(0, D, BD):
        inside = inner[:, None] & (at + d < D)[None, :]
        g = tl.load(base + i[:, None] * D + (at + d)[None, :], mask=inside, other=0.0)
        u = tl.load(base + (I + i)[:, None] * D + (at + d)[None, :], mask=inside, other=0.0)
        value = tl.load(x + pair // TOP * D + at + d, mask=at + d < D, other=0.0).to(tl.float32)
        gate += g.to(tl.float32) * value[None, :]
        up += u.to(tl.float32) * value[None, :]
    g = tl.sum(gate, 1)
    u = tl.sum(up, 1)
    tl.store(act + pair * I + i, g / (1.0 + tl.exp(-g)) * u, mask=inner)


@triton.jit
def down_few(act, down, ids, weights, part, D: tl.constexpr, I: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr):
    """part[pair] = weight of the pair * down[expert] @ act[pair], float32; grid (ceil(D / BN), pairs)."""
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.arange(0, BI)
    sums = tl.zeros((BN, BI), tl.float32)
    for at in tl.static_range(0, I, BI):
        inside = at + i < I
        w = tl.load(
            down + expert * (D * I) + n[:, None] * I + (at + i)[None, :],
            mask=(n < D)[:, None] & inside[None, :],
            other=0.0,
        )
        value = tl.load(act + pair * I + at + i, mask=inside, other=0.0)
        sums += w.to(tl.float32) * value[None, :]
    tl.store(part + pair * D + n, tl.sum(sums, 1) * tl.load(weights + pair), mask=n < D)


@triton.jit
def combine(part, out, TOP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum of a token's partial rows, first to last; grid (ceil(D / BLOCK), T)."""
    token = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP):
        held += tl.load(part + (token * TOP + k) * D + d, mask=d < D, other=0.0)
    tl.store(out + token * D + d, held.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def arrange(ids, order, starts, PAIRS, E: tl.constexpr, BLOCK: tl.constexpr):
    """order: pairs sorted by expert, stable; starts[e]: where expert e begins, starts[E] the end. Grid: experts."""
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = 0
    for at in range(0, PAIRS, BLOCK):
        expert = tl.load(ids + at + i, mask=at + i < PAIRS, other=E)
        before += tl.sum((expert < e).to(tl.int32), 0)
    tl.store(starts + e, before)
    for at in range(0, PAIRS, BLOCK):
        expert = tl.load(ids + at + i, mask=at + i < PAIRS, other=E)
        mine = (expert == e).to(tl.int32)
        place = before + tl.cumsum(mine, 0) - 1
        tl.store(order + place, at + i, mask=mine == 1)
        before += tl.sum(mine, 0)
    if e == E - 1:
        tl.store(starts + E, before)


@triton.jit
def gate_up_grouped(
    x, gate_up, order, starts, act,
    TOP: tl.constexpr, D: tl.constexpr, I: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """act[pair] as `gate_up_few`, rounded to the weights' format; grid (ceil(I / BI), blocks of rows, experts).

    A program goes on to further blocks of its expert when the grid has fewer."""
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(starts + expert) + tl.program_id(1) * BM
    last = tl.load(starts + expert + 1)
    for first in range(begin, last, tl.num_programs(1) * BM):
        r = first + tl.arange(0, BM)
        live = r < last
        pair = tl.load(order + r, mask=live, other=0).to(tl.int64)
        i = tl.program_id(0) * BI + tl.arange(0, BI)
        d = tl.arange(0, BD)
        base = gate_up + expert * (2 * I * D)
        gate = tl.zeros((BM, BI), tl.float32)
        up = tl.zeros((BM, BI), tl.float32)
        for at in range(0, D, BD):
            inside = at + d < D
            value = tl.load(
                x + (pair // TOP)[:, None] * D + (at + d)[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            mask = (i < I)[:, None] & inside[None, :]
            g = tl.load(base + i[:, None] * D + (at + d)[None, :], mask=mask, other=0.0)
            u = tl.load(base + (I + i)[:, None] * D + (at + d)[None, :], mask=mask, other=0.0)
            gate = tl.dot(value, tl.trans(g), gate, input_precision="ieee")
            up = tl.dot(value, tl.trans(u), up, input_precision="ieee")
        result = gate / (1.0 + tl.exp(-gate)) * up
        at_act = act + pair[:, None] * I + i[None, :]
        tl.store(at_act, result.to(act.dtype.element_ty), mask=live[:, None] & (i < I)[None, :])


@triton.jit
def down_grouped(
    act, down, order, starts, weights, part,
    D: tl.constexpr, I: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """part[pair] as `down_few`; grid (ceil(D / BN), blocks of rows, experts)."""
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(starts + expert) + tl.program_id(1) * BM
    last = tl.load(starts + expert + 1)
    for first in range(begin, last, tl.num_programs(1) * BM):
        r = first + tl.arange(0, BM)
        live = r < last
        pair = tl.load(order + r, mask=live, other=0).to(tl.int64)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        i = tl.arange(0, BI)
        base = down + expert * (D * I)
        sums = tl.zeros((BM, BN), tl.float32)
        for at in range(0, I, BI):
            inside = at + i < I
            value = tl.load(
                act + pair[:, None] * I + (at + i)[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            w = tl.load(base + n[:, None] * I + (at + i)[None, :], mask=(n < D)[:, None] & inside[None, :], other=0.0)
            sums = tl.dot(value, tl.trans(w), sums, input_precision="ieee")
        share = tl.load(weights + pair, mask=live, other=0.0)
        at_part = part + pair[:, None] * D + n[None, :]
        tl.store(at_part, sums * share[:, None], mask=live[:, None] & (n < D)[None, :])
