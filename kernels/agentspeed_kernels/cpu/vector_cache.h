/* Passes of up to 8 pairs over rows in fp8, which become bf16 in registers, once for the scores and once for the values.

   bf16 holds every byte: scales of keys go to the sums of the scores, before the plain part of the keys is added, and scales
   of values to the shares. A byte moves into the places of bf16 with the exponent 120 more; the smallest numbers, which have
   no such place, come from a table. Half of that runs in the pipes that the products leave free, and a block of bytes takes
   half of what numbers take of the first cache. No byte is "not a number" here: the scale of its head is none. */
#ifndef AGENTSPEED_VECTOR_CACHE_H
#define AGENTSPEED_VECTOR_CACHE_H
#include "vector_ahead.h"

#define DEEP_STEP (2 * STEP) /* numbers of a turn of the loop, between which lines are fetched */

/* One head of a block of rows. */
typedef struct {
    const coded_row *row;
    long head_at; /* bytes before a head's */
    float keys[BLOCK] __attribute__((aligned(64))), values[BLOCK] __attribute__((aligned(64))); /* scales */
} coded_block;

INLINE __m512i numbers_in(__m256i bytes) {
    const __m512i small = _mm512_zextsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i x = _mm512_cvtepi8_epi16(bytes);
    /* A product instead of a shift: shifts and permutes share their pipes. */
    __m512i size = _mm512_and_si512(_mm512_mullo_epi16(x, _mm512_set1_epi16(16)), _mm512_set1_epi16(0x07f0));
    __m512i made = _mm512_add_epi16(size, _mm512_set1_epi16(120 << 7));
    made = _mm512_mask_permutexvar_epi16(made, _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78)), x, small);
    return _mm512_ternarylogic_epi32(made, x, _mm512_set1_epi16((short)0x8000), 0xf8); /* the sign with it */
}
INLINE __m512i numbers_of(const uint8_t *bytes) { return numbers_in(_mm256_loadu_si256((const __m256i *)bytes)); }

INLINE int taken_in_registers(const coded_row *c, long pairs) {
    return c && pairs <= 8 && c->width % DEEP_STEP == 0 && c->plain % STEP == 0;
}

INLINE void find_head(coded_block *of, const bf16 *keys, const bf16 *values, const long *rows, long head) {
    long at = of->row->scales_at + 4 * head;
    of->head_at = head * of->row->width;
    for (int b = 0; b < BLOCK; b++) {
        memcpy(of->keys + b, bytes_of(keys + rows[b]) + at, sizeof(float));
        memcpy(of->values + b, bytes_of(values + rows[b]) + at, sizeof(float));
    }
}

/* sums[pair][token] += q . keys for P pairs x T tokens, 32 numbers of each. A query is read once where pairs are no fewer. */
INLINE void meet_keys(__m512 *sums, const bf16 *q, const uint8_t *const *at, long from, int plain, const int P, const int T) {
#define KEY(t) (__m512bh)(plain ? _mm512_loadu_si512(at[t] + from) : numbers_of(at[t] + from))
    if (P < T) {
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            __m512bh key = KEY(t);
#pragma GCC unroll 16
            for (int i = 0; i < P; i++)
                sums[i * T + t] = _mm512_dpbf16_ps(sums[i * T + t], (__m512bh)_mm512_load_si512(q + i * STEP), key);
        }
        return;
    }
    __m512bh keys[4];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) keys[t] = KEY(t);
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) {
        __m512bh query = (__m512bh)_mm512_load_si512(q + i * STEP);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sums[i * T + t] = _mm512_dpbf16_ps(sums[i * T + t], query, keys[t]);
    }
#undef KEY
}

/* As `score` does for rows of numbers: scores[pair][token] for P pairs x T tokens from `first` on. */
INLINE void score_coded(const coded_block *of, const bf16 *q, const bf16 *pool, const long *rows, int first, float *scores,
                        ahead *next, const int P, const int T) {
    const coded_row *c = of->row;
    const uint8_t *at[16];
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) at[t] = bytes_of(pool + rows[first + t]);
    line fetched = fetch(next, next->at, next->more);
    const int each = next->each;
    for (long k = of->head_at; k < of->head_at + c->width; k += DEEP_STEP, q += DEEP_STEP * P) {
        fetched = fetch(next, fetched, each);
        meet_keys(sums, q, at, k, 0, P, T);
        meet_keys(sums, q + P * STEP, at, k + STEP, 0, P, T);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
        __m512 scale = _mm512_set1_ps(of->keys[first + t]);
#pragma GCC unroll 16
        for (int i = 0; i < P; i++) sums[i * T + t] = _mm512_mul_ps(sums[i * T + t], scale);
    }
    for (long k = 0; k < c->plain; k += STEP, q += P * STEP) {
        fetched = fetch(next, fetched, each);
        meet_keys(sums, q, at, c->plain_at + 2 * k, 1, P, T);
    }
    next->at = fetched;
    float folded[16] __attribute__((aligned(64)));
    store(folded, totals((const vec *)sums));
#pragma GCC unroll 16
    for (int i = 0; i < P; i++) memcpy(scores + i * BLOCK, folded + i * T, T * sizeof(float));
}
#endif
