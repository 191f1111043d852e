"""Routing of tokens to experts, and their SwiGLU: a form for few tokens and one grouped by expert.

Sums over a token's experts are taken in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def scores(
    x, residual, gain, weight, out, normed, total, x_stride, eps,
    E: tl.constexpr, D: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t, e] = y[t] . weight[e] in float32; y is x, or with NORM the norm of x + residual times gain.

    Grid (ceil(E / BE), T). With NORM programs of block 0 write the rounded sum to `total`, which is not `residual`, and
    the rounded norm to `normed`; BD is then all of D."""
    token = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    d = tl.arange(0, BD)
    sums = tl.zeros((BE, BD), tl.float32)
    for at in tl.static_range(0, D, BD):
        inside = at + d < D
        w = tl.load(weight + e[:, None] * D + (at + d)[None, :], mask=(e < E)[:, None] & inside[None, :], other=0.0)
        if EARLY and at == 0:
            gdc_wait()
            gdc_launch_dependents()
        value = tl.load(x + token * x_stride + at + d, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value += tl.load(residual + token * D + d, mask=inside, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            value = rounded.to(tl.float32)
            scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
            value = value * scale * tl.load(gain + d, mask=inside, other=0.0).to(tl.float32)
            if tl.program_id(0) == 0:
                tl.store(total + token * D + d, rounded, mask=inside)
                tl.store(normed + token * D + d, value.to(normed.dtype.element_ty), mask=inside)
        sums += w.to(tl.float32) * value[None, :]
    tl.store(out + token * E + e, tl.sum(sums, 1), mask=e < E)


@triton.jit
def choose(
    logits, bias, slots, ids, weights, scale,
    E: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PAD_GROUP: tl.constexpr, PAD_GROUPS: tl.constexpr,
    TOP: tl.constexpr, PAD_TOP: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    SUM_OF_TWO: tl.constexpr, NORMALISE: tl.constexpr, SLOTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Scores of one token to its TOP experts by falling choice score (the lower id first among equals).

    With SLOTS a token whose slot is negative chooses nobody: the id E, with weight 0. Of a token with a choice score
    that is no number no weight is one. Experts lie as [groups, experts of a group], both padded to powers of two. One
    program a token."""
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, PAD_GROUPS)[:, None]
    m = tl.arange(0, PAD_GROUP)[None, :]
    e = g * GROUP + m
    there = (g < GROUPS) & (m < GROUP)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
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
    # A score that is no number would never be chosen, or padding in its place, and nobody would know.
    broken = tl.max(tl.max((there & (choice != choice)).to(tl.int32), 1), 0)
    choice = tl.where(there & (choice == choice), choice, -float("inf"))
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
    held = tl.where(broken == 0, held * scale, float("nan"))
    if SLOTS:
        there = tl.load(slots + token) >= 0
        chosen = tl.where(there, chosen, E)
        held = tl.where(there, held, 0.0)
    tl.store(ids + token * TOP + place, chosen.to(tl.int64), mask=place < TOP)
    tl.store(weights + token * TOP + place, held, mask=place < TOP)


@triton.jit(do_not_specialize=["PAIRS", "FIRST"])
def own(ids, weights, PAIRS, FIRST, HELD: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Choices of the HELD experts from FIRST on are numbered from 0, and all others are of nobody (the id HELD), with
    weight 0. In place; grid ceil(PAIRS / BLOCK)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < PAIRS
    expert = tl.load(ids + i, mask=inside, other=0) - FIRST
    here = (expert >= 0) & (expert < HELD)
    tl.store(ids + i, tl.where(here, expert, HELD), mask=inside)
    tl.store(weights + i, tl.where(here, tl.load(weights + i, mask=inside, other=0.0), 0.0), mask=inside)


@triton.jit
def _gate_up(
    x, gate_up, act, block, D: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr, WAIT: tl.constexpr
):
    """act[i] = silu(gate) * up in float32 for one block of an expert's inner rows and one token. WAIT: for what was
    launched before, once the first weights are on their way."""
    i = block * BI + tl.arange(0, BI)
    d = tl.arange(0, BD)
    inner = i < I
    gate = tl.zeros((BI, BD), tl.float32)
    up = tl.zeros((BI, BD), tl.float32)
    for at in tl.static_range(0, D, BD):
        inside = inner[:, None] & (at + d < D)[None, :]
        g = tl.load(gate_up + i[:, None] * D + (at + d)[None, :], mask=inside, other=0.0)
        u = tl.load(gate_up + (I + i)[:, None] * D + (at + d)[None, :], mask=inside, other=0.0)
        if WAIT and at == 0:
            gdc_wait()
            gdc_launch_dependents()
        value = tl.load(x + at + d, mask=at + d < D, other=0.0).to(tl.float32)
        gate += g.to(tl.float32) * value[None, :]
        up += u.to(tl.float32) * value[None, :]
    g = tl.sum(gate, 1)
    u = tl.sum(up, 1)
    tl.store(act + i, g / (1.0 + tl.exp(-g)) * u, mask=inner)


@triton.jit
def gate_up_few(
    x, gate_up, shared_gate_up, ids, act,
    E: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, I: tl.constexpr, S: tl.constexpr, BI: tl.constexpr,
    BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """act[t] = inner activations of token t's TOP experts, I each, then those of the shared expert, S (0: there is
    none). The id E is nobody: zeros. Grid (TOP * ceil(I / BI) + ceil(S / BI), T)."""
    BLOCKS: tl.constexpr = (I + BI - 1) // BI
    part = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    own = act + token * (TOP * I + S)
    if part < TOP * BLOCKS:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        expert = tl.load(ids + token * TOP + part // BLOCKS).to(tl.int64)
        at = own + (part // BLOCKS) * I
        block = part % BLOCKS
        if expert < E:
            _gate_up(x + token * D, gate_up + expert * (2 * I * D), at, block, D, I, BI, BD, False)
        else:
            i = block * BI + tl.arange(0, BI)
            tl.store(at + i, tl.zeros((BI,), tl.float32), mask=i < I)
    else:
        if S > 0:
            _gate_up(x + token * D, shared_gate_up, own + TOP * I, part - TOP * BLOCKS, D, S, BI, BD, EARLY)


@triton.jit
def _down_tile(down, expert, n, at, i, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr):
    """Columns `at + i` of rows n of one expert's down matrix; of nobody's zeros."""
    inside = (n < D)[:, None] & (at + i < I)[None, :] & (expert < E)
    return tl.load(down + expert * (D * I) + n[:, None] * I + (at + i)[None, :], mask=inside, other=0.0)


@triton.jit
def down_few(
    act, down, shared_down, ids, weights, out,
    E: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, I: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
    BI: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t] = the sum over a token's experts, first to last, of weight * down @ act, then the shared expert's; grid
    (ceil(D / BN), T). The ids are older than the launch before this one, so weights are read without a wait."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.arange(0, BI)
    own = act + token * (TOP * I + S)
    sums = tl.zeros((BN, BI), tl.float32)
    # From L2: this load is before the wait, and the chip's first cache may hold a line of an earlier layer.
    first = tl.load(ids + token * TOP, cache_modifier=".cg").to(tl.int64)
    ahead = _down_tile(down, first, n, 0, i, D, I, E)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for j in tl.static_range(TOP):
        expert = tl.load(ids + token * TOP + j).to(tl.int64)
        share = tl.load(weights + token * TOP + j)
        for at in tl.static_range(0, I, BI):
            w = ahead
            # The next tile is on its way before this one is used.
            if at + BI < I:
                ahead = _down_tile(down, expert, n, at + BI, i, D, I, E)
            else:
                if j + 1 < TOP:
                    following = tl.load(ids + token * TOP + j + 1).to(tl.int64)
                    ahead = _down_tile(down, following, n, 0, i, D, I, E)
                else:
                    if S > 0:
                        ahead = _down_tile(shared_down, 0, n, 0, i, D, S, 1)
            value = tl.load(own + j * I + at + i, mask=at + i < I, other=0.0) * share
            sums += w.to(tl.float32) * value[None, :]
    for at in tl.static_range(0, S, BI):
        w = ahead
        if at + BI < S:
            ahead = _down_tile(shared_down, 0, n, at + BI, i, D, S, 1)
        value = tl.load(own + TOP * I + at + i, mask=at + i < S, other=0.0)
        sums += w.to(tl.float32) * value[None, :]
    tl.store(out + token * D + n, tl.sum(sums, 1).to(out.dtype.element_ty), mask=n < D)


@triton.jit
def activate(both, act, I: tl.constexpr, BLOCK: tl.constexpr):
    """act[t] = silu of the first half of both[t], times the second half; grid (ceil(I / BLOCK), T)."""
    token = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(both + token * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    u = tl.load(both + token * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    tl.store(act + token * I + i, (g / (1.0 + tl.exp(-g)) * u).to(act.dtype.element_ty), mask=i < I)


@triton.jit
def combine(
    part, ids, shared, out,
    E: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """out[t] = the sum of a token's partial rows, first to last, and with SHARED of shared[t]; nobody (the id E) wrote
    none. Grid (ceil(D / BLOCK), T)."""
    token = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP):
        there = tl.load(ids + token * TOP + k) < E
        held += tl.load(part + (token * TOP + k) * D + d, mask=(d < D) & there, other=0.0)
    if SHARED:
        held += tl.load(shared + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, held.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["PAIRS"])
def arrange(ids, order, starts, PAIRS, E: tl.constexpr, BLOCK: tl.constexpr):
    """order: pairs sorted by expert, stable, without nobody's (the id E); starts[e]: where expert e begins, starts[E]
    the end. Grid: experts."""
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
