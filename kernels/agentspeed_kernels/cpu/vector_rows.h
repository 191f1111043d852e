/* Passes over a tile on vectors: all where there is AVX512-BF16 and no AMX, those of few pairs where there is.

   Cached rows are read where they lie. Scores of up to 8 pairs: 32 numbers of a row meet 32 of a query, so that 16 sums of
   pairs x tokens are folded together once their rows have ended. Scores of 16 pairs, which are worth packing: two numbers of
   a row meet those of all 16, and nothing is folded. Values: the rows of two tokens are interleaved in registers, 32 columns at a
   time, for up to 8 pairs, whose shares lie two by two as the product wants them. A pass takes all heads of the pools where
   pairs are few: it then reads whole rows, a stream that memory is fast at, and fetches the next block meanwhile. Rows in fp8
   meet up to 8 pairs as they are (vector_cache.h); for more they are taken back to numbers first, a block and a head at a
   time. */
#ifndef AGENTSPEED_VECTOR_ROWS_H
#define AGENTSPEED_VECTOR_ROWS_H
#include "vector_cache.h"

#define SET 8              /* pairs that share what is in registers */
#define MOST_TOGETHER 128  /* pairs of all heads of a pass */

/* Pairs are taken in sets of 16, and what is left over in one of 1, 2, 4, 8 or 16. */
INLINE long padded_pairs(long pairs) {
    long rest = pairs % 16;
    return pairs - rest + (rest > 8 ? 16 : rest > 4 ? 8 : rest > 2 ? 4 : rest);
}
INLINE long size_at(long padded, long first) { return at_most(padded - first, 16); }

/* Pairs from `i` on that share the values of a block: what only fills a set of scores up is left out. */
INLINE long sharing_values(const part *t, long padded, long i) {
    long size = at_most(padded - i, SET);
    while (size / 2 >= t->pairs - i) size /= 2;
    return size;
}

/* Heads of the pools that one pass takes. */
INLINE long heads_together(const step *s, long rows) {
    long pairs = padded_pairs(rows * s->heads / s->groups), together = pairs ? MOST_TOGETHER / pairs : 1;
    return together < 1 ? 1 : at_most(together, s->groups);
}

static size_t vectors_scratch(const step *s) {
    return MOST_TOGETHER * (s->keys.stride * 2 + s->values * STEP * 4 + BLOCK * 2) + 2 * BLOCK * s->keys.stride * 2 + 4096;
}

/* scores[pair][token] for P pairs x T tokens, P * T = 16; q is [steps][P][32], rows of scores are BLOCK apart. */
INLINE void score(const bf16 *q, const bf16 *pool, const long *rows, long width, float *scores, ahead *next,
                  const int P, const int T) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
#define MEET(row_at)                                                                                            \
    if (P < T) {                                                                                                \
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) {                                                  \
            __m512bh key = (__m512bh)(row_at);                                                                  \
            _Pragma("GCC unroll 16") for (int i = 0; i < P; i++)                                                \
                sums[i * T + t] = _mm512_dpbf16_ps(sums[i * T + t], (__m512bh)_mm512_load_si512(q + i * STEP), key); \
        }                                                                                                       \
    } else {                                                                                                    \
        __m512bh keys[8];                                                                                       \
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) keys[t] = (__m512bh)(row_at);                      \
        _Pragma("GCC unroll 16") for (int i = 0; i < P; i++) {                                                  \
            __m512bh query = (__m512bh)_mm512_load_si512(q + i * STEP);                                         \
            _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)                                                \
                sums[i * T + t] = _mm512_dpbf16_ps(sums[i * T + t], query, keys[t]);                            \
        }                                                                                                       \
    }
    long k = 0;
    line at = fetch(next, next->at, next->more);
    const int each = next->each;
    for (; k + STEP <= width; k += STEP, q += P * STEP) {
        at = fetch(next, at, each);
        MEET(_mm512_loadu_si512(pool + rows[t] + k))
    }
    if (k < width) {
        __mmask32 some = first_halves(width - k);
        MEET(_mm512_maskz_loadu_epi16(some, pool + rows[t] + k))
    }
#undef MEET
    next->at = at;
    float folded[16] __attribute__((aligned(64)));
    store(folded, totals((const vec *)sums));
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) memcpy(scores + i * BLOCK, folded + i * T, T * sizeof(float));
}

/* o[pair][steps][32] += shares . values for P pairs, `steps` (up to S) steps of 32 columns from `column`. Unpacking leaves
   columns in the order that `give` undoes. */
INLINE void add_values(float *o, long o_stride, const bf16 *pool, const long *rows, const bf16 *shares, long tokens,
                       long column, __mmask32 some, const coded_block *coded, ahead *next, const int P, const int S) {
    __m512 sums[SET][8];
#pragma GCC unroll 8
    for (int i = 0; i < P; i++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * S; c++) sums[i][c] = _mm512_load_ps(o + i * o_stride + c * 16);
    line at = fetch(next, next->at, next->more);
    const int each = next->each;
    for (long b = 0; b < tokens; b += 2) {
        at = fetch(next, at, each);
        const bf16 *x = pool + rows[b], *y = pool + rows[b + 1];
        __m512bh columns[8];
#pragma GCC unroll 8
        for (int c = 0; c < S; c++) {
            long from = column + c * STEP;
            __m512i one, two;
            if (coded) {
                one = numbers_of(bytes_of(x) + coded->head_at + from), two = numbers_of(bytes_of(y) + coded->head_at + from);
            } else if (S > 1) {
                one = _mm512_loadu_si512(x + from), two = _mm512_loadu_si512(y + from);
            } else {
                one = _mm512_maskz_loadu_epi16(some, x + from), two = _mm512_maskz_loadu_epi16(some, y + from);
            }
            columns[2 * c] = (__m512bh)_mm512_unpacklo_epi16(one, two);
            columns[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(one, two);
        }
#pragma GCC unroll 8
        for (int i = 0; i < P; i++) {
            int pair;
            memcpy(&pair, shares + i * BLOCK + b, sizeof pair);
            __m512bh by = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int c = 0; c < 2 * S; c++) sums[i][c] = _mm512_dpbf16_ps(sums[i][c], by, columns[c]);
        }
    }
    next->at = at;
#pragma GCC unroll 8
    for (int i = 0; i < P; i++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * S; c++) _mm512_store_ps(o + i * o_stride + c * 16, sums[i][c]);
}

/* Columns [from, to) in steps, 16 sums or as many as are left; the last step may be less than whole. */
INLINE void add_steps(const step *s, float *o, const bf16 *pool, const long *rows, const bf16 *shares, long tokens, long from,
                      long to, const coded_block *coded, ahead *next, const int P) {
    const int S = P >= 8 ? 1 : P == 4 ? 2 : 4;
    long stride = s->values * STEP, whole = s->rank / STEP, j = from;
    if (S > 1)
        for (; j + S <= at_most(to, whole); j += S)
            add_values(o + j * STEP, stride, pool, rows, shares, tokens, j * STEP, 0, coded, next, P, S);
    for (; j < to; j++)
        add_values(o + j * STEP, stride, pool, rows, shares, tokens, j * STEP, first_halves(s->rank - j * STEP), coded, next,
                   P, 1);
}

/* One pair's softmax so far. */
typedef struct {
    float most;
    __m512 sum;
} alone;

/* Scores of a pair that sees `seen` of the tokens become shares, each by what it has of `times` (or 0: 1). Earlier sums at `o`
   are rescaled when the peak has grown. */
INLINE void soften_one(const float *scores, long seen, float scale, const float *times, alone *of, float *o, long columns,
                       bf16 *shares) {
    __m512i none = _mm512_setzero_si512();
    if (seen <= 0) {
        _mm512_storeu_si512(shares, none);
        return;
    }
    __mmask16 low = first_lanes(seen), high = first_lanes(seen - 16);
    const __m512 never = _mm512_set1_ps(NEVER), by = _mm512_set1_ps(scale);
    __m512 x = _mm512_mask_mul_ps(never, low, _mm512_load_ps(scores), by);
    __m512 y = _mm512_mask_mul_ps(never, high, _mm512_load_ps(scores + 16), by);
    float here = _mm512_reduce_max_ps(_mm512_max_ps(x, y));
    if (here > of->most + GROWTH) {
        float keep[16];
        _mm512_storeu_ps(keep, exp2_16(_mm512_set1_ps(of->most - here)));
        of->sum = _mm512_mul_ps(of->sum, _mm512_set1_ps(keep[0])), of->most = here;
        for (long c = 0; c < columns; c += 16)
            _mm512_store_ps(o + c, _mm512_mul_ps(_mm512_load_ps(o + c), _mm512_set1_ps(keep[0])));
    }
    const __m512 most = _mm512_set1_ps(of->most);
    x = _mm512_maskz_mov_ps(low, exp2_16(_mm512_sub_ps(x, most)));
    y = _mm512_maskz_mov_ps(high, exp2_16(_mm512_sub_ps(y, most)));
    of->sum = _mm512_add_ps(of->sum, _mm512_add_ps(x, y));
    if (times) {
        x = _mm512_maskz_mul_ps(low, x, _mm512_load_ps(times));
        y = _mm512_maskz_mul_ps(high, y, _mm512_load_ps(times + 16));
    }
    _mm512_storeu_si512(shares, (__m512i)_mm512_cvtne2ps_pbh(y, x));
}

/* Pairs as right operands, sets one after the other: [steps][pairs of the set][32]. */
INLINE void load_set(const step *s, const part *p, long g, long first, const int P, bf16 *to) {
    for (int i = 0; i < P; i++)
        for (long k = 0; k < s->keys.stride; k += STEP) {
            __m512i x = _mm512_setzero_si512();
            if (first + i < p->pairs) x = _mm512_maskz_loadu_epi16(first_halves(s->keys.width - k), query_of(s, p, g, first + i) + k);
            _mm512_store_si512(to + k * P + i * STEP, x);
        }
}

typedef struct {
    bf16 *q, *shares; /* [sets][steps][P][32]; [pairs][BLOCK] */
    float *o;         /* [pairs][steps of values][32] */
    alone *of;
    long seen[SET];
} set;

/* Scores and shares of one set in one block of tokens. */
INLINE void score_set(const step *s, const set *of, const bf16 *pool, const long *rows, long at, const coded_block *coded,
                      ahead *next, const int P) {
    float scores[SET * BLOCK] __attribute__((aligned(64)));
    const int T = 16 / P;
    for (int b = 0; b < BLOCK; b += T)
        if (coded) score_coded(coded, of->q, pool, rows, b, scores + b, next, P, T);
        else score(of->q, pool, rows + b, s->keys.width, scores + b, next, P, T);
#pragma GCC unroll 8
    for (int i = 0; i < P; i++)
        soften_one(scores + i * BLOCK, of->seen[i] - at, s->scale * LOG2E, coded ? coded->values : 0, of->of + i, of->o + i * s->values * STEP,
               s->values * STEP, of->shares + i * BLOCK);
}

/* scores[token][pair] for 16 tokens x 16 pairs; q is [width / 2][16 dwords]. */
INLINE void score_sixteen(const bf16 *q, sixteen rows, long width, float *scores, ahead *next) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
    line at = fetch(next, next->at, next->more);
    const int each = next->each;
    const char *four[4];
    for (int i = 0; i < 4; i++) four[i] = (const char *)rows.at + 4 * i * rows.bytes;
    for (long k = 0; k < width; k += 2, q += STEP) {
        at = fetch(next, at, each);
        __m512bh queries = (__m512bh)_mm512_load_si512(q);
#pragma GCC unroll 16
        for (int t = 0; t < 16; t++) {
            int pair;
            memcpy(&pair, four[t / 4] + t % 4 * rows.bytes, sizeof pair);
            sums[t] = _mm512_dpbf16_ps(sums[t], (__m512bh)_mm512_set1_epi32(pair), queries);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) four[i] += 4;
    }
    next->at = at;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_ps(scores + i * 16, sums[i]);
}

/* The same as `score_set` for 16 pairs; `copies`: memory for BLOCK rows that do not lie together, or the block taken back. */
INLINE void score_16(const step *s, const part *t, long g, long first, const bf16 *q, long at, softmax *of, float *o,
                     bf16 *shares, bf16 *copies, ahead *next) {
    float scores[BLOCK * 16] __attribute__((aligned(64)));
    int seen[16] __attribute__((aligned(64)));
    cache keys = from_head(t->keys, g, s->keys.width);
    for (int b = 0; b < BLOCK; b += 16) {
        sixteen taken = {copies + b * keys.stride, 2 * keys.stride};
        if (!keys.coded) taken = group_of(&keys, t->pages, t->offset, t->tokens, at + b, copies + b * keys.stride);
        score_sixteen(q, taken, keys.width, scores + b * 16, next);
    }
    long seen_by_all = visible_to(s, t, first, 16, seen), columns = s->values * STEP;
    if (soften(scores, BLOCK, at, _mm512_load_si512(seen), at + BLOCK <= seen_by_all, s->scale * LOG2E, of) && at) {
        float keep[16];
        _mm512_storeu_ps(keep, of->keep);
        for (int i = 0; i < 16; i++)
            for (long c = 0; c < columns; c += 16)
                _mm512_store_ps(o + i * columns + c, _mm512_mul_ps(_mm512_load_ps(o + i * columns + c), _mm512_set1_ps(keep[i])));
    }
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = paired(_mm512_load_ps(scores + 2 * i * 16), _mm512_load_ps(scores + (2 * i + 1) * 16));
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(shares + i * BLOCK, r[i]);
}

#define BY_SIZE(size, call)           \
    switch (size) {                   \
    case 1: { enum { P = 1 }; call; break; } \
    case 2: { enum { P = 2 }; call; break; } \
    case 4: { enum { P = 4 }; call; break; } \
    case 8: { enum { P = 8 }; call; break; } \
    }

/* The partial sums of a pair in the order of their columns. */
INLINE void give(const step *s, long slot, const float *o, float most, float sum) {
    const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    s->peaks[slot] = most * (1 / LOG2E), s->weights[slot] = sum;
    float *to = s->sums + slot * s->values * STEP;
    for (long c = 0; c < s->values * STEP; c += STEP) {
        __m512 x = _mm512_load_ps(o + c), y = _mm512_load_ps(o + c + 16);
        _mm512_storeu_ps(to + c, _mm512_permutex2var_ps(x, left, y));
        _mm512_storeu_ps(to + c + 16, _mm512_permutex2var_ps(x, right, y));
    }
}

/* Lines for every turn, so that memory is busy in all of them and nowhere waited for. */
INLINE void pace(const step *s, const part *t, long padded, ahead *a) {
    long calls = 0, turns = 0, lines = BLOCK * (s->shared ? 1 : 2) * ((read_bytes(s, t) + 63) / 64);
    for (long i = 0; i < padded; i += 16) {
        long size = size_at(padded, i), scores = size == 16 ? BLOCK / 16 : BLOCK * size / 16, values = 0;
        for (long j = i; j < i + size; j += SET) {
            long steps = SET / sharing_values(t, padded, j);
            values += (s->values + steps - 1) / steps;
        }
        calls += t->count * (scores + values);
        long step = size == 16 ? 2 : taken_in_registers(s->keys.coded, padded) ? DEEP_STEP : STEP;
        turns += t->count * (scores * s->keys.width / step + values * BLOCK / 2);
    }
    a->each = (int)(lines / turns), a->more = (int)((lines - a->each * turns + calls - 1) / calls);
}

/* A block of rows in fp8 of head `g`: keys, and behind them values that are no part of them. */
INLINE void take_back(const step *s, const part *t, long g, const long *rows, bf16 *to) {
    cache keys = from_head(t->keys, g, 0), held = from_head(t->held, g, 0);
    for (int b = 0; b < BLOCK; b++) {
        take_row(&keys, keys.pool + rows[b], to + b * s->keys.stride);
        if (!s->shared) take_row(&held, held.pool + rows[b], to + (BLOCK + b) * s->keys.stride);
    }
}

/* `after`: the tile that is likely next, or 0. */
static void run_on_vectors(const step *s, const part *t, const part *after, char *memory) {
    long padded = padded_pairs(t->pairs), columns = s->values * STEP, all = padded * t->count;
    bf16 *q = (bf16 *)memory, *shares = q + all * s->keys.stride, *copies = shares + all * BLOCK;
    float *o = (float *)(copies + 2 * BLOCK * s->keys.stride);
    coded_block coded = {.row = s->keys.coded};
    const coded_block *as_bytes = taken_in_registers(s->keys.coded, padded) ? &coded : 0;
    long taken[BLOCK];
    for (int b = 0; b < BLOCK; b++) taken[b] = b * s->keys.stride;
    alone of[MOST_TOGETHER];
    softmax of_16[MOST_TOGETHER / 16];
    for (long i = 0; i < all; i++) of[i].most = NEVER, of[i].sum = _mm512_setzero_ps();
    for (long i = 0; i < MOST_TOGETHER / 16; i++)
        of_16[i].most = _mm512_set1_ps(NEVER), of_16[i].sum = of_16[i].keep = _mm512_setzero_ps();
    memset(o, 0, all * columns * sizeof(float));
    for (long g = 0; g < t->count; g++)
        for (long i = 0; i < padded; i += 16) {
            bf16 *to = q + (g * padded + i) * s->keys.stride;
            long size = size_at(padded, i);
            if (size == 16) load_queries(s, t, g, i, 16, to);
            else BY_SIZE(size, load_set(s, t, g, i, P, to))
        }
    block_rows rows[2];
    ahead next;
    pace(s, t, padded, &next);
    int side = 0;
    const long last = sharing_values(t, padded, (padded - 1) / SET * SET);
    locate(t, &s->keys, 0, rows);
    for (long at = 0; at < t->tokens; at += BLOCK, side ^= 1) {
        const long *here = rows[side].at;
        long tokens = at_most(t->tokens - at, BLOCK);
        if (at + BLOCK < t->tokens) {
            locate(t, &s->keys, at + BLOCK, rows + (side ^ 1));
            look_ahead(s, t, rows + (side ^ 1), &next);
        } else {
            const part *then = after ? after : t;
            locate(then, &s->keys, 0, rows + (side ^ 1));
            look_ahead(s, then, rows + (side ^ 1), &next);
        }
        for (long g = 0; g < t->count; g++) {
            const bf16 *keys = t->keys.pool + g * s->keys.width, *held = t->held.pool + g * s->held.width;
            if (as_bytes) {
                keys = t->keys.pool, held = t->held.pool;
                find_head(&coded, keys, held, here, t->keys.head + g);
            } else if (s->keys.coded) {
                take_back(s, t, g, rows[side].at, copies);
                keys = copies, held = s->shared ? copies : copies + BLOCK * s->keys.stride, here = taken;
            }
            for (long i = 0; i < padded; i += 16) {
                long first = g * padded + i, size = size_at(padded, i);
                set one = {q + first * s->keys.stride, shares + first * BLOCK, o + first * columns, of + first, {0}};
                if (size == 16) {
                    score_16(s, t, g, i, one.q, at, of_16 + first / 16, one.o, one.shares, copies, &next);
                    continue;
                }
                for (long j = 0; j < size && i + j < t->pairs; j++) one.seen[j] = seen_by(s, t, i + j);
                BY_SIZE(size, score_set(s, &one, keys, here, at, as_bytes, &next, P))
            }
            /* Columns by columns: the strip of the rows that one set has brought into the first cache serves all sets. */
            for (long j = 0; j < s->values; j += 4)
                for (long i = 0; i < padded; i += SET) {
                    long first = g * padded + i, to = at_most(j + 4, s->values);
                    BY_SIZE(i + SET < padded ? SET : last, add_steps(s, o + first * columns, held, here, shares + first * BLOCK,
                                                                tokens, j, to, as_bytes, &next, P))
                }
        }
    }
    for (long g = 0; g < t->count; g++)
        for (long i = 0; i < t->pairs; i++) {
            long at = g * padded + i, first = at - i % 16;
            float most[16], sum[16];
            _mm512_storeu_ps(most, of_16[first / 16].most), _mm512_storeu_ps(sum, of_16[first / 16].sum);
            if (size_at(padded, i - i % 16) < 16) most[i % 16] = of[at].most, sum[i % 16] = _mm512_reduce_add_ps(of[at].sum);
            give(s, slot_of(s, t, g, i), o + at * columns, most[i % 16], sum[i % 16]);
        }
}
#endif
