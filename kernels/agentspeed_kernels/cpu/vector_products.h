/* Products of bf16 rows with weights in tile order, on vectors: for processors with AVX512-BF16 and no AMX.

   Rows are packed in panels of up to 12, [pair of inputs][row], and a pair is broadcast from memory. Two columns of 16 outputs
   make 24 accumulators: enough for the latency of the instruction, and 14 loads for 24 products, where the processor does
   as many loads as products. A few rows wait for the weights: they take one column after the other, which is the stream that
   memory is fast at. */
#ifndef AGENTSPEED_VECTOR_PRODUCTS_H
#define AGENTSPEED_VECTOR_PRODUCTS_H
#include "amx_common.h"

#define PANEL 12
#define MOST_STEPS 64    /* of inputs at a time: what is read again and again stays in the second cache */
#define FEW_ROWS 4       /* up to as many rows take one column at a time */
#define AHEAD_BYTES 6144 /* of what they read */
#define BLOCK_BYTES (400L << 10) /* of packed rows, in the second cache beside the weights that pass by */

/* `rows` (a constant) rows at a, `pair` numbers of 32 bits between pairs of inputs and `row` between rows, with the tiles at
   first and second; only the former where `columns` (a constant) is 1. With `ahead`, what lies so many numbers further is
   fetched meanwhile. */
INLINE void times_rows(const int rows, const int columns, const int32_t *a, const long pair, const long row, const bf16 *first,
                       const bf16 *second, long pairs, float *sums, long stride, int more, long ahead) {
    __m512 s[PANEL][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        s[r][0] = more ? _mm512_loadu_ps(sums + r * stride) : _mm512_setzero_ps();
        if (columns > 1) s[r][1] = more ? _mm512_loadu_ps(sums + r * stride + 16) : _mm512_setzero_ps();
    }
#pragma GCC unroll 2
    for (long p = 0; p < pairs; p++) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(first + p * STEP), right = left;
        if (columns > 1) right = (__m512bh)_mm512_loadu_si512(second + p * STEP);
        if (ahead) {
            FAR(first + ahead + p * STEP);
            if (columns > 1) FAR(second + ahead + p * STEP);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(a[p * pair + r * row]);
            s[r][0] = _mm512_dpbf16_ps(s[r][0], both, left);
            if (columns > 1) s[r][1] = _mm512_dpbf16_ps(s[r][1], both, right);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(sums + r * stride, s[r][0]);
        if (columns > 1) _mm512_storeu_ps(sums + r * stride + 16, s[r][1]);
    }
}

#define EVERY_PANEL(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)

/* sums[rows][stride] (+)= a panel times two columns of tiles, or one where second is 0. */
static void times_panel(long rows, const bf16 *panel, const bf16 *first, const bf16 *second, long pairs, float *sums,
                        long stride, int more, long ahead) {
    const int32_t *a = (const int32_t *)panel;
    switch (rows + (second ? 0 : PANEL)) {
#define TWO(n) case n: times_rows(n, 2, a, n, 1, first, second, pairs, sums, stride, more, ahead); break;
#define ONE(n) case PANEL + n: times_rows(n, 1, a, n, 1, first, first, pairs, sums, stride, more, ahead); break;
    EVERY_PANEL(TWO)
    EVERY_PANEL(ONE)
#undef TWO
#undef ONE
    }
}

/* sums[rows][COLUMNS] = a panel of a few `rows` (a constant) times one column: even and odd pairs have sums of their own. */
INLINE void times_column(const int rows, const int32_t *a, const bf16 *w, long pairs, float *sums) {
    __m512 s[2][FEW_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) s[0][r] = s[1][r] = _mm512_setzero_ps();
    for (long p = 0; p < pairs; p += 2)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const bf16 *at = w + (p + i) * STEP;
            NEAR((const char *)at + AHEAD_BYTES);
            __m512bh both = (__m512bh)_mm512_loadu_si512(at);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                s[i][r] = _mm512_dpbf16_ps(s[i][r], (__m512bh)_mm512_set1_epi32(a[(p + i) * rows + r]), both);
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(sums + r * COLUMNS, _mm512_add_ps(s[0][r], s[1][r]));
}

static void few_times_column(long rows, const bf16 *panel, const bf16 *w, long pairs, float *sums) {
    const int32_t *a = (const int32_t *)panel;
    switch (rows) {
    case 1: times_column(1, a, w, pairs, sums); break;
    case 2: times_column(2, a, w, pairs, sums); break;
    case 3: times_column(3, a, w, pairs, sums); break;
    default: times_column(FEW_ROWS, a, w, pairs, sums);
    }
}

/* Panels of `rows` rows are as even as they can be; panel i begins at row panel_at(rows, i). */
INLINE long panels_of(long rows) { return (rows + PANEL - 1) / PANEL; }
INLINE long panel_at(long rows, long i) { return rows * i / panels_of(rows); }

/* Rows of k numbers, padded with zeros to whole steps; a row of 0 is zeros. Of up to 12 it is a panel, and 64 bytes past it
   are written too; of 16 it is a column of tiles. */
INLINE void pack_panel(const bf16 *const *rows, long count, long k, bf16 *to) {
    for (long s = 0; s < whole_steps(k); s++) {
        __mmask32 lanes = first_halves(k - s * STEP);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = i < count && rows[i] ? _mm512_maskz_loadu_epi16(lanes, rows[i] + s * STEP) : _mm512_setzero_si512();
        transpose16(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (s * 16 + i) * 2 * count, r[i]);
    }
}

/* Rows in panels: panel i is at to + panel_at(rows, i) * (whole steps of k). */
static inline void pack_rows(const bf16 *x, long stride, long rows, long k, bf16 *to) {
    for (long i = 0; i < panels_of(rows); i++) {
        const bf16 *at[PANEL];
        long low = panel_at(rows, i), count = panel_at(rows, i + 1) - low;
        for (long r = 0; r < count; r++) at[r] = x + (low + r) * stride;
        pack_panel(at, count, k, to + low * whole_steps(k) * STEP);
    }
}
INLINE size_t packed_bytes(long rows, long k) { return (rows * whole_steps(k) + 2) * STEP * sizeof(bf16); }

/* sums[rows][COLUMNS] = packed rows times two columns of tiles, or one where second is 0. */
INLINE void times_packed(const bf16 *packed, long rows, long k, const bf16 *first, const bf16 *second, float *sums, long ahead) {
    long steps = whole_steps(k), panels = panels_of(rows);
    if (rows <= FEW_ROWS) {
        few_times_column(rows, packed, first, steps * 16, sums);
        if (second) few_times_column(rows, packed, second, steps * 16, sums + 16);
        return;
    }
    for (long s = 0; s < steps; s += MOST_STEPS)
        for (long i = 0; i < panels; i++) {
            long low = panel_at(rows, i), count = panel_at(rows, i + 1) - low;
            times_panel(count, packed + low * steps * STEP + s * count * STEP, first + s * TILE, second ? second + s * TILE : 0,
                        at_most(steps - s, MOST_STEPS) * 16, sums + low * COLUMNS, COLUMNS, s > 0, i == 0 ? ahead : 0);
        }
}

/* In how many blocks rows are cut so that a block stays in the second cache, and the threads have some each. */
INLINE long blocks_of(long rows, long k, int threads) {
    long most = BLOCK_BYTES / (whole_steps(k) * STEP * (long)sizeof(bf16)) / PANEL * PANEL;
    most = most < 4 * PANEL ? 4 * PANEL : most > 8 * PANEL ? 8 * PANEL : most;
    long wanted = threads > 1 ? 4 * threads : 1, fitting = (rows + 5 * PANEL - 1) / (5 * PANEL), least = (rows + most - 1) / most;
    return least > wanted ? least : fitting > wanted ? wanted : fitting > least ? fitting : least;
}
#endif
