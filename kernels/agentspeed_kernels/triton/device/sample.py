"""Drawing a token a row with the noise and the rules of the engine's sampler; scores are float64 as on the CPU.

The cut of top-k and top-p is found by bisection over the order-preserving bits of a logit: the largest key with the
wanted count, or mass, at or above it. Nothing is sorted, ties at the edge are all kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _load(logits, changed, changed_row, mask_words, mask_row, row, stride, i, V, CHANGED: tl.constexpr):
    """(raw, drawn from) logits in float32; outside the vocabulary minus infinity.

    Those that are drawn from are as `changed` has them where the row has one, and minus infinity where the grammar
    forbids."""
    inside = i < V
    raw = tl.load(logits + row * stride + i, mask=inside, other=-float("inf")).to(tl.float32)
    value = raw
    if CHANGED:
        at_changed = changed + tl.maximum(changed_row, 0).to(tl.int64) * V + i
        other = tl.load(at_changed, mask=inside & (changed_row >= 0), other=-float("inf"))
        value = tl.where(changed_row >= 0, other, raw)
    # Without a mask nothing is read, and all bits count as set.
    words = (V + 31) // 32
    at = mask_words + tl.maximum(mask_row, 0).to(tl.int64) * words + i // 32
    word = tl.load(at, mask=inside & (mask_row >= 0), other=-1)
    allowed = tl.where(((word >> (i % 32)) & 1) == 1, value, -float("inf"))
    return raw, allowed


@triton.jit
def _key(value):
    """A number that orders as the float32 does, equal zeros included: int64 between 0 and 2^32."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    wide = bits.to(tl.int64)
    return tl.where(wide >= 0, wide + 2147483648, -1 - wide)


@triton.jit
def _value(key):
    """The float32 of a key, so that many numbers are compared with it as they are; minus infinity below all floats."""
    wide = tl.where(key >= 2147483648, key - 2147483648, -1 - key)
    value = wide.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key < 8388608, -float("inf"), value)


@triton.jit
def _edge(
    logits, changed, changed_row, mask_words, mask_row, row, stride, V, goal, highest, peak, cool,
    BLOCK: tl.constexpr, BITS: tl.constexpr, CHANGED: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The largest key that has at least `goal` ids at or above it, or, with MASS, that much of exp((logit - peak) *
    cool); two bits a pass. No id is above `highest`: such trials cost nothing."""
    SUM: tl.constexpr = tl.float64 if MASS else tl.int32
    j = tl.arange(0, BLOCK)
    key = tl.zeros((), tl.int64)
    one = tl.full((), 1, tl.int64)
    for shift in range(30, 30 - BITS, -2):
        low = key + (one << shift)
        if low <= highest:
            middle = key + (one << (shift + 1))
            high = low + (one << (shift + 1))
            sum1 = tl.zeros((BLOCK,), SUM)
            sum2 = tl.zeros((BLOCK,), SUM)
            sum3 = tl.zeros((BLOCK,), SUM)
            least1 = _value(low)
            least2 = _value(middle)
            least3 = _value(high)
            for at in range(0, V, BLOCK):
                _, value = _load(logits, changed, changed_row, mask_words, mask_row, row, stride, at + j, V, CHANGED)
                if MASS:
                    share = tl.exp((value - peak) * cool).to(SUM)
                else:
                    share = (value > -float("inf")).to(SUM)
                sum1 += tl.where(value >= least1, share, 0)
                sum2 += tl.where(value >= least2, share, 0)
                sum3 += tl.where(value >= least3, share, 0)
            key = tl.where(tl.sum(sum1, 0) >= goal, low, key)
            key = tl.where(tl.sum(sum2, 0) >= goal, middle, key)
            key = tl.where(tl.sum(sum3, 0) >= goal, high, key)
    return key


@triton.jit
def bounds(
    logits, changed, changed_row, mask_words, mask_row, temperature, top_k, top_p, asked, stride, V,
    best_id, best, least, total, faulty,
    BLOCK: tl.constexpr, BITS: tl.constexpr, CHANGED: tl.constexpr,
):  # fmt: skip
    """Of each row: the best allowed id and its logit, the logit below which no id is drawn, log-sum-exp, and a fault.

    `faulty` is 1 for logits that are not finite numbers, 2 where the grammar allows none. BITS: keys differ in this
    many upper bits at most (16 for logits that are bfloat16, 32 for float32). Shares that decide the edge of top-p are
    float32, their sums float64. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    words_row = tl.load(mask_row + row)
    other_row = tl.load(changed_row + row)
    j = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    at_top = tl.full((BLOCK,), 2147483647, tl.int32)
    top_raw = tl.full((BLOCK,), -float("inf"), tl.float32)
    strange = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, V, BLOCK):
        i = at + j
        raw, value = _load(logits, changed, other_row, mask_words, words_row, row, stride, i, V, CHANGED)
        strange = strange | (raw != raw).to(tl.int32)
        at_top = tl.where(value > top, i, at_top)
        top = tl.where(value > top, value, top)
        top_raw = tl.where(raw > top_raw, raw, top_raw)
    peak = tl.max(top, 0)
    peak_raw = tl.max(top_raw, 0)
    lowest = tl.min(tl.where(top == peak, at_top, 2147483647), 0)
    bad = (tl.max(strange, 0) == 1) | (peak_raw == -float("inf")) | (peak_raw == float("inf"))
    fault = tl.where(bad, 1, tl.where(peak == -float("inf"), 2, 0))
    tl.store(best_id + row, lowest)
    tl.store(best + row, peak.to(tl.float64))
    tl.store(faulty + row, fault)
    if (fault == 0) & (tl.load(asked + row) >= 0):
        mass = tl.zeros((BLOCK,), tl.float64)
        for at in range(0, V, BLOCK):
            raw, _ = _load(logits, changed, other_row, mask_words, words_row, row, stride, at + j, V, CHANGED)
            mass += tl.exp(raw.to(tl.float64) - peak_raw.to(tl.float64))
        tl.store(total + row, peak_raw.to(tl.float64) + tl.log(tl.sum(mass, 0)))

    warm = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    key = tl.zeros((), tl.int64)
    highest = _key(peak)
    if (fault == 0) & (warm > 0):
        if (k > 0) & (k < V):
            key = _edge(
                logits, changed, other_row, mask_words, words_row, row, stride, V, k, highest, peak, 1.0, BLOCK, BITS,
                CHANGED, False,
            )  # fmt: skip
        if p < 1.0:
            cool = (1.0 / warm).to(tl.float32)
            of_top_k = _value(key)
            kept = tl.zeros((BLOCK,), tl.float64)
            for at in range(0, V, BLOCK):
                _, value = _load(logits, changed, other_row, mask_words, words_row, row, stride, at + j, V, CHANGED)
                kept += tl.where(value >= of_top_k, tl.exp((value - peak) * cool), 0.0).to(tl.float64)
            # Strictly above this key there is less than the goal, so it is the last one kept.
            edge = _edge(
                logits, changed, other_row, mask_words, words_row, row, stride, V, p * tl.sum(kept, 0), highest, peak,
                cool, BLOCK, BITS, CHANGED, True,
            )  # fmt: skip
            key = tl.maximum(key, edge)
    tl.store(least + row, _value(key))


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * MIX_1
    value = (value ^ (value >> 27)) * MIX_2
    return value ^ (value >> 31)


@triton.jit
def draw(
    logits, changed, changed_row, mask_words, mask_row, temperature, min_p, asked, state, best, least, stride, V,
    part_score, part_id, part_mass, PARTS: tl.constexpr, BLOCK: tl.constexpr, CHANGED: tl.constexpr,
):  # fmt: skip
    """The best of logit / temperature + Gumbel noise in one part of a row's vocabulary; grid (rows, PARTS).

    `part_mass`: the sum of exp((logit - best) / temperature) over what may be drawn, where log-probabilities are
    asked for."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    warm = tl.load(temperature + row)
    size = (V + PARTS * BLOCK - 1) // (PARTS * BLOCK) * BLOCK
    first = part * size
    last = tl.minimum(first + size, V)
    top = tl.full((BLOCK,), -float("inf"), tl.float64)
    at_top = tl.full((BLOCK,), 2147483647, tl.int32)
    mass = tl.zeros((BLOCK,), tl.float64)
    if warm > 0:
        wanted = tl.load(asked + row) >= 0
        words_row = tl.load(mask_row + row)
        other_row = tl.load(changed_row + row)
        peak = tl.load(best + row)
        lowest = tl.load(least + row)
        floor = tl.load(min_p + row)
        least_scaled = tl.where(floor > 0, tl.log(tl.where(floor > 0, floor, 1.0)), -float("inf"))
        seed = tl.load(state + row).to(tl.uint64, bitcast=True)
        j = tl.arange(0, BLOCK)
        for at in range(first, last, BLOCK):
            i = at + j
            _, value = _load(logits, changed, other_row, mask_words, words_row, row, stride, i, V, CHANGED)
            scaled = (value.to(tl.float64) - peak) / warm
            drawn = (value >= lowest) & (scaled > -float("inf")) & (scaled >= least_scaled)
            if wanted:
                mass += tl.where(drawn, tl.exp(scaled), 0.0)
            bits = _mix(seed + (i.to(tl.uint64) + 1) * GOLDEN)
            # 53 bits at the centres of their cells, as on the CPU.
            uniform = ((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
            score = tl.where(drawn, scaled - tl.log(-tl.log(uniform)), -float("inf"))
            at_top = tl.where(score > top, i, at_top)
            top = tl.maximum(top, score)
    peak_score = tl.max(top, 0)
    tl.store(part_score + row * PARTS + part, peak_score)
    tl.store(part_id + row * PARTS + part, tl.min(tl.where(top == peak_score, at_top, 2147483647), 0))
    tl.store(part_mass + row * PARTS + part, tl.sum(mass, 0))


@triton.jit
def pick(
    logits, changed, changed_row, temperature, best_id, best, total, part_score, part_id, part_mass, asked, stride, V,
    ids, logprob, draw_logprob, top_ids, top_logprobs,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, CHANGED: tl.constexpr,
):  # fmt: skip
    """The drawn id of each row (the best one where the temperature is 0) and the log-probabilities asked for.

    `draw_logprob`: of the drawn id among what could be drawn; 0 where the temperature is 0.

    `asked[row]`: -1 none, else how many of the best ids; the lower id comes first among equals. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    warm = tl.load(temperature + row)
    if warm > 0:
        p = tl.arange(0, PARTS)
        score = tl.load(part_score + row * PARTS + p)
        chosen = tl.min(tl.where(score == tl.max(score, 0), tl.load(part_id + row * PARTS + p), 2147483647), 0)
    else:
        chosen = tl.load(best_id + row)
    tl.store(ids + row, chosen.to(tl.int64))
    count = tl.load(asked + row)
    if count >= 0:
        sum_all = tl.load(total + row)
        inside = (chosen >= 0) & (chosen < V)
        held = tl.load(logits + row * stride + chosen, mask=inside, other=0.0).to(tl.float64)
        tl.store(logprob + row, held - sum_all)
        own = tl.zeros((), tl.float64)
        if warm > 0:
            value = held
            if CHANGED:
                other_row = tl.load(changed_row + row)
                at_changed = changed + tl.maximum(other_row, 0).to(tl.int64) * V + chosen
                other = tl.load(at_changed, mask=inside & (other_row >= 0), other=0.0).to(tl.float64)
                value = tl.where(other_row >= 0, other, held)
            mass = tl.sum(tl.load(part_mass + row * PARTS + tl.arange(0, PARTS)), 0)
            own = (value - tl.load(best + row)) / warm - tl.log(mass)
        tl.store(draw_logprob + row, own)
        j = tl.arange(0, BLOCK)
        before = tl.full((), float("inf"), tl.float64)
        before_id = tl.full((), -1, tl.int32)
        for n in range(count):
            top = tl.full((BLOCK,), -float("inf"), tl.float64)
            at_top = tl.full((BLOCK,), 2147483647, tl.int32)
            for at in range(0, V, BLOCK):
                i = at + j
                value = tl.load(logits + row * stride + i, mask=i < V, other=-float("inf")).to(tl.float64)
                later = ((value < before) | ((value == before) & (i > before_id))) & (i < V)
                value = tl.where(later, value, -float("inf"))
                at_top = tl.where((value > top) | (later & (at_top == 2147483647)), i, at_top)
                top = tl.where(value > top, value, top)
            before = tl.max(top, 0)
            before_id = tl.min(tl.where(top == before, at_top, 2147483647), 0)
            tl.store(top_ids + row * MOST + n, before_id.to(tl.int64))
            tl.store(top_logprobs + row * MOST + n, before - sum_all)
