/* A column of a weight of 8 bits with a few bf16 rows on vectors, which are tiles themselves; and which rows are few. */
#ifndef AGENTSPEED_VECTOR_FEW_BYTES_H
#define AGENTSPEED_VECTOR_FEW_BYTES_H
#include "vector_bytes.h"

/* to[rows][COLUMNS] = (more ? to : 0) + by * rows of x, which are tiles themselves, times `steps` tiles. */
INLINE void add_pairs(__m512 *sums, const bf16 *x, const bf16 *w, const int rows) {
    __m512bh right = (__m512bh)_mm512_load_si512(w);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        int pair;
        memcpy(&pair, x + r * STEP, sizeof pair);
        sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_set1_epi32(pair), right);
    }
}

/* `rows` is a constant: the sums of a block never leave their registers. Those of few rows, which wait for the latency of
   the instruction, are of even and of odd steps. */
INLINE void rows_by_block(const bf16 *x, const bf16 *w, long steps, __m512 by, float *to, const int rows, int more) {
    __m512 s[2][16];
    const int sets = rows <= 8 ? 2 : 1;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) s[0][r] = s[1][r] = _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, x += TILE, w += TILE)
        for (int k = 0; k < 16; k += 2)
            add_pairs(s[0], x + 2 * k, w + k * STEP, rows), add_pairs(s[sets - 1], x + 2 * k + 2, w + (k + 1) * STEP, rows);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512 sum = sets > 1 ? _mm512_add_ps(s[0][r], s[1][r]) : s[0][r];
        _mm512_store_ps(to + r * COLUMNS, more ? _mm512_fmadd_ps(sum, by, _mm512_load_ps(to + r * COLUMNS)) : _mm512_mul_ps(sum, by));
    }
}

static void add_block(const bf16 *x, const bf16 *w, long steps, __m512 by, float *to, long rows, int more) {
    switch (rows) {
#define ROWS(n) case n: rows_by_block(x, w, steps, by, to, n, more); break
    ROWS(1); ROWS(2); ROWS(3); ROWS(4); ROWS(5); ROWS(6); ROWS(7); ROWS(8);
    ROWS(9); ROWS(10); ROWS(11); ROWS(12); ROWS(13); ROWS(14); ROWS(15);
#undef ROWS
    default: rows_by_block(x, w, steps, by, to, 16, more);
    }
}

/* to[rows][COLUMNS], 16 of them: a column times `rows` held rows, [rows of 16][steps][16][32]. */
static void times(byte_column c, const bf16 *held, long rows, float *to) {
    bf16 tiles[(BLOCK + DEEP) / STEP * TILE] __attribute__((aligned(64)));
    uint8_t turned[DEEP * 16] __attribute__((aligned(64)));
    const byte_weight *w = c.of;
    const long deep = at_most(w->block, BLOCK);
    for (long from = 0; from < w->k; from += deep) {
        long steps = steps_from(w, from, deep);
        for (long i = 0; i < steps; i += DEEP / STEP) {
            const uint8_t *quads = quads_at(w, c.t, from + i * STEP, turned);
            bf16 *to = tiles + i * TILE;
#ifdef WHOLE_BLOCKS /* many constants: in one piece they stay in registers */
#pragma GCC unroll 16
            for (long q = 0; q < DEEP / 4; q++) to_pairs(quads + q * 64, to + q * 2 * STEP);
#else
            for (long q = 0; q < at_most(steps - i, DEEP / STEP) * 8; q++) to_pairs(quads + q * 64, to + q * 2 * STEP);
#endif
        }
        __m512 by = block_scales(w, c.t, from / w->block);
        for (long i = 0; i < rows; i += 16)
            add_block(held + (i / 16 * whole_steps(w->k) + from / STEP) * TILE, tiles, steps, by, to + i * COLUMNS, at_most(rows - i, 16), from > 0);
    }
}

/* Rows that meet what was taken back. */
INLINE long rows_together(long k) {
    (void)k;
    return BLOCK_ROWS;
}

/* Rows as products with `w` want them: in panels, or as tiles. */
INLINE void pack_for(const byte_weight *w, const bf16 *const *rows, long count, bf16 *to) {
    if (worth_panels(w, count)) pack_parts(rows, count, w->k, to);
    else for (long r = 0; r < count; r++) pack_row(rows[r], r, w->k, to);
}

/* sums[rows][COLUMNS] = rows that were packed so times a column and, if there is one, another. */
INLINE void times_packed_for(byte_column left, byte_column right, const bf16 *packed, long rows, float *sums) {
    if (worth_panels(left.of, rows)) {
        times_columns(left, right, packed, rows, sums);
        return;
    }
    times(left, packed, rows, sums);
    if (right.of) times(right, packed, rows, sums + 16);
}
#endif
