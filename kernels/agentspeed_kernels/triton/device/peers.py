"""What GPUs do with each other's memory: add up numbers that lie on all of them, and put their parts together.

A number of 32 bits travels in a word of 64, whose upper half is the count of the call that it is of. So a reader waits
for the numbers themselves: there is no flag behind them whose order would have to be kept, and no second message.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOOKS = tl.constexpr(16)
"""Looks at a word that has not come before one looks whether the host has given up."""


@triton.jit
def _place(table, rank):
    """Where the memory of a rank begins, as this GPU sees it."""
    return tl.multiple_of(tl.load(table + rank).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def _given_up(over, rank):
    """Whether nobody waits any more; if so, it is noted for whom this was. It lies on this GPU: hundreds of programs
    that wait and look into the host's memory would be what the other GPU waits for."""
    given_up = tl.load(over, volatile=True)
    if given_up != 0:
        tl.store(over + 1, rank + 1)
    return given_up


@triton.jit
def add_up(
    x, out, table, over, counts, N,
    RANK: tl.constexpr, RANKS: tl.constexpr, FIRST: tl.constexpr, WORDS: tl.constexpr, HALVES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[N] = the sum of all ranks' x[N], in the order of the ranks and float32; words of 32 bits, each a float32 or,
    with HALVES, two bfloat16. Grid ceil(N / WORDS).

    A program talks to the program of the same number on other GPUs alone. In every rank's memory it has, from word
    FIRST on, [2, RANKS, WORDS] of 64 bits: of its even and its odd calls, from each rank. Who writes for call n + 2 has
    read what the other sent in call n + 1, which that did after all it had launched for call n. Between two sums of a
    stream there is another launch."""
    part = tl.program_id(0)
    i = tl.arange(0, WORDS)
    at = part * WORDS + i
    inside = at < N
    # From L2, before the wait: the sum that wrote it is older than the launch before this one, which is no sum.
    count = tl.load(counts + part, cache_modifier=".cg") + 1
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    mine = tl.load(x + at, mask=inside, other=0)
    half = FIRST + ((part * 2 + (count & 1)) * RANKS).to(tl.int64) * WORDS
    sent = (count.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(_place(table, rank) + half + RANK * WORDS + i, sent, mask=inside, cache_modifier=".wt")
    here = _place(table, RANK) + half
    low = tl.zeros((WORDS,), tl.float32)
    high = tl.zeros((WORDS,), tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            word = mine
        else:
            come = tl.load(here + rank * WORDS + i, mask=inside, other=0, volatile=True)
            late = tl.max((inside & ((come >> 32) != count)).to(tl.int32), 0)
            looks = 0
            while late > 0:
                come = tl.load(here + rank * WORDS + i, mask=inside, other=0, volatile=True)
                late = tl.max((inside & ((come >> 32) != count)).to(tl.int32), 0)
                looks += 1
                if (late > 0) & (looks % LOOKS == 0):
                    late = tl.where(_given_up(over, rank) != 0, 0, late)
            word = (come & 0xFFFFFFFF).to(tl.int32)
        if HALVES:
            low += (word << 16).to(tl.float32, bitcast=True)
            high += (word & -65536).to(tl.float32, bitcast=True)
        else:
            low += word.to(tl.float32, bitcast=True)
    if HALVES:
        lower = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        total = lower | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        total = low.to(tl.int32, bitcast=True)
    tl.store(out + at, total, mask=inside)
    tl.store(counts + part, count)


@triton.jit
def spread(x, table, WIDTH, FIRST, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns RANK * WIDTH and following of [rows, RANKS * WIDTH] words of 32 bits in every rank's memory, from word
    FIRST (of 64 bits) on, = x[rows, WIDTH]. Grid (ceil(WIDTH / BLOCK), rows). `meet` comes after it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    word = tl.load(x + row * WIDTH + i, mask=i < WIDTH, other=0)
    for rank in tl.static_range(RANKS):
        whole = (_place(table, rank) + FIRST).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(whole + row * (RANKS * WIDTH) + RANK * WIDTH + i, word, mask=i < WIDTH)


@triton.jit
def meet(table, over, count, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Ends when all ranks are here: what each wrote into this one's memory by launches before is there then. The first
    RANKS words of a rank's memory are for this alone. One program. Counts wrap after 2^31, weeks of steps; no rank is
    more than one call ahead of another, so it is the difference that tells who has not come."""
    # Nothing written before may be seen after this.
    number = (tl.atomic_add(count, 1, sem="acq_rel", scope="sys") + 1).to(tl.int64)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            tl.store(_place(table, rank) + RANK, number, cache_modifier=".wt")
    here = _place(table, RANK)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            come = tl.load(here + rank, volatile=True)
            looks = 0
            while (number - come).to(tl.int32) > 0:
                come = tl.load(here + rank, volatile=True)
                looks += 1
                if looks % LOOKS == 0:
                    come = tl.where(_given_up(over, rank) != 0, number, come)
    # Nor may anything be read before this.
    tl.atomic_add(count, 0, sem="acq_rel", scope="sys")
