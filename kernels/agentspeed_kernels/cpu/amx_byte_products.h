/* Two columns of a weight of 8 bits with many bf16 rows, on the tiles of AMX: a part of their inputs becomes tiles of bf16 in
   the first cache and meets all rows. */
#ifndef AGENTSPEED_AMX_BYTE_PRODUCTS_H
#define AGENTSPEED_AMX_BYTE_PRODUCTS_H
#include "amx_byte_columns.h"
#include "amx_products.h"

/* Whether tiles hold numbers by their scales. Else scales go to the sums of a block of inputs. */
INLINE int scales_in_tiles(const byte_weight *w);
/* DEEP inputs from `from` on of column t as two tiles. */
INLINE void to_tiles(const byte_weight *w, long t, long from, const uint8_t *quads, bf16 *to);

INLINE void fill_column(byte_column c, long from, long steps, bf16 *to) {
    uint8_t turned[DEEP * 16] __attribute__((aligned(64)));
    for (long i = 0; i < steps; i += DEEP / STEP)
        to_tiles(c.of, c.t, from + i * STEP, quads_at(c.of, c.t, from + i * STEP, turned), to + i * TILE);
}

/* sums[rows][COLUMNS] = (more ? sums : 0) + scales of each of the columns * made. */
INLINE void add_scaled(const float *made, long rows, const __m512 *by, int columns, float *sums, int more) {
    for (long r = 0; r < rows * COLUMNS; r += COLUMNS)
        for (int c = 0; c < columns; c++) {
            __m512 before = more ? _mm512_load_ps(sums + r + c * 16) : _mm512_setzero_ps();
            _mm512_store_ps(sums + r + c * 16, _mm512_fmadd_ps(_mm512_load_ps(made + r + c * 16), by[c], before));
        }
}

INLINE void pack_for(const byte_weight *w, const bf16 *const *rows, long count, bf16 *to) {
    for (long r = 0; r < count; r++) pack_row(rows[r], r, w->k, to);
    tiles_begin(count < 16 ? count : 0);
}

/* Rows that meet what was taken back, in the second cache beside it. */
INLINE long rows_together(long k) {
    long most = BLOCK_BYTES / (whole_steps(k) * STEP * (long)sizeof(bf16)) / PANEL * PANEL;
    return most < 2 * PANEL ? 2 * PANEL : at_most(most, BLOCK_ROWS);
}

/* Rows from `from` on, up to two tiles of these, times what two columns hold. */
INLINE void add_held(const bf16 *x, long block, const bf16 *left, const bf16 *right, long steps, float *to, int more, long rows) {
    const fetched none = {0, 0, 0};
    if (rows >= 16) {
        add_blocks(x, block, left, right, steps, to, COLUMNS, more, none, at_most(whole_tiles(rows), 2));
        return;
    }
    add_tail(x, left, steps, to, COLUMNS, more);
    if (right) add_tail(x, right, steps, to + 16, COLUMNS, more);
}

/* sums[rows in whole tiles][COLUMNS] = packed rows times a column and, if there is one, another. Sums get their scales once the
   next chains have begun. */
static void times_columns(byte_column left, byte_column right, const bf16 *packed, long rows, float *sums) {
    bf16 held[2][TOGETHER / STEP * TILE] __attribute__((aligned(64)));
    float made[2][PANEL * COLUMNS] __attribute__((aligned(64)));
    const byte_weight *w = left.of;
    long all = whole_steps(w->k), scaled = scales_in_tiles(w), one_scale = w->block == TOGETHER, part = scaled ? TOGETHER : w->block;
    const int columns = right.of ? 2 : 1;
    __m512 by[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long from = 0; from < w->k; from += part) {
        long steps = steps_from(w, from, part);
        fill_column(left, from, steps, held[0]);
        if (right.of) fill_column(right, from, steps, held[1]);
        by[0] = block_scales(w, left.t, from / w->block);
        if (right.of) by[1] = block_scales(right.of, right.t, from / w->block);
        const bf16 *x = packed + from / STEP * TILE, *second = right.of ? held[1] : 0;
        for (long r = 0; r < rows; r += PANEL) {
            int apart = !scaled && !one_scale;
            float *to = apart ? made[r / PANEL % 2] : sums + r * COLUMNS;
            add_held(x + r * all * STEP, all * TILE, held[0], second, steps, to, !apart && from > 0, rows - r);
            if (!apart) continue;
            if (r > 0) add_scaled(made[(r / PANEL + 1) % 2], PANEL, by, columns, sums + (r - PANEL) * COLUMNS, from > 0);
            if (r + PANEL >= rows) add_scaled(to, rows - r, by, columns, sums + r * COLUMNS, from > 0);
        }
    }
    if (one_scale) add_scaled(sums, rows, by, columns, sums, 0);
}

/* The same. A few rows take one column after the other: bytes are then read as they lie. */
static void times_packed_for(byte_column left, byte_column right, const bf16 *packed, long rows, float *sums) {
    const byte_column none = {0, 0};
    times_columns(left, rows > 16 ? right : none, packed, rows, sums);
    if (rows <= 16 && right.of) times_columns(right, none, packed, rows, sums + 16);
}
#endif
