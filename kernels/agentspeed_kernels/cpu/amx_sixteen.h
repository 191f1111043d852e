/* 16 (row, head) pairs side by side: their queries as right operands, and their softmax, which is vertical. */
#ifndef AGENTSPEED_AMX_SIXTEEN_H
#define AGENTSPEED_AMX_SIXTEEN_H
#include "amx_step.h"

/* 16 pairs of head `g` from `at` on as right operands [steps][16][16 dwords]; after `distinct` ones they begin again. */
INLINE void load_queries(const step *s, const part *p, long g, long at, int distinct, bf16 *to) {
    for (long k = 0; k < s->keys.stride / STEP; k++) {
        __m512i r[16];
        __mmask32 lanes = first_halves(s->keys.width - k * STEP);
        for (int i = 0; i < 16; i++) {
            long pair = at + i % distinct;
            r[i] = _mm512_setzero_si512();
            if (pair < p->pairs) r[i] = _mm512_maskz_loadu_epi16(lanes, query_of(s, p, g, pair) + k * STEP);
        }
        transpose16(r);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + k * TILE + i * STEP, r[i]);
    }
}

/* Of `count` pairs from `at` on; those that are not there see what the first one does. Returns how many tokens all see. */
INLINE long visible_to(const step *s, const part *p, long at, int count, int *seen) {
    long tile_whole = 1L << 30;
    for (int i = 0; i < count; i++) {
        long pair = at + i < p->pairs ? at + i : 0;
        seen[i] = seen_by(s, p, pair);
        tile_whole = at_most(tile_whole, seen[i]);
    }
    return tile_whole;
}

typedef struct {
    __m512 most, sum, keep; /* of 16 pairs; keep: what earlier sums are multiplied by */
} softmax;

/* Scores of n tokens from `at` become shares, in place. Lane i sees tokens below seen[i]; with `whole` all are seen.
   Returns whether earlier sums must be multiplied by `keep`. */
INLINE int soften(float *scores, long n, long at, __m512i seen, int whole, float scale, softmax *of) {
    const __m512 never = _mm512_set1_ps(NEVER), by = _mm512_set1_ps(scale);
    __m512 m[4] = {never, never, never, never};
    if (!whole)
        for (long t = 0; t < n; t++) {
            __mmask16 sees = _mm512_cmplt_epi32_mask(_mm512_set1_epi32((int)(at + t)), seen);
            _mm512_store_ps(scores + t * 16, _mm512_mask_blend_ps(sees, never, _mm512_load_ps(scores + t * 16)));
        }
    for (long t = 0; t < n; t += 4)
        for (int i = 0; i < 4; i++) m[i] = _mm512_max_ps(m[i], _mm512_load_ps(scores + (t + i) * 16));
    __m512 here = _mm512_mul_ps(_mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3])), by);
    int grew = _mm512_cmp_ps_mask(here, _mm512_add_ps(of->most, _mm512_set1_ps(GROWTH)), _CMP_GT_OQ) != 0;
    if (grew) {
        __m512 now = _mm512_max_ps(of->most, here);
        of->keep = exp2_16(_mm512_sub_ps(of->most, now));
        of->sum = _mm512_mul_ps(of->sum, of->keep), of->most = now;
    }
    __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long t = 0; t < n; t += 4)
        for (int i = 0; i < 4; i++) {
            __m512 score = _mm512_load_ps(scores + (t + i) * 16);
            __m512 share = exp2_16(_mm512_fmsub_ps(score, by, of->most));
            /* Not "greater": what is no number stays none. */
            if (!whole) share = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(score, never, _CMP_NLE_UQ), share);
            total[i] = _mm512_add_ps(total[i], share);
            _mm512_store_ps(scores + (t + i) * 16, share);
        }
    of->sum = _mm512_add_ps(of->sum, _mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
    return grew;
}
#endif
