/* Two columns of a weight of 8 bits with many bf16 rows, on vectors: the tiles of bf16 that the first panel of rows makes are
   there for all others. */
#ifndef AGENTSPEED_VECTOR_BYTES_H
#define AGENTSPEED_VECTOR_BYTES_H
#include "amx_byte_columns.h"
#include "vector_products.h"

/* TOGETHER inputs of two columns: with a panel of rows they stay in the first cache. */
typedef struct {
    bf16 tiles[2][TOGETHER / STEP * TILE] __attribute__((aligned(64)));
    uint8_t turned[2][TOGETHER * 16] __attribute__((aligned(64)));
    float scales[TOGETHER / STEP][2][16] __attribute__((aligned(64)));
    const uint8_t *quads[TOGETHER / DEEP][2];
    long steps, block; /* steps of all, and of a block: the last one may be shorter */
} some_bytes;

INLINE void find_bytes(some_bytes *to, const byte_column *columns, long from) {
    to->block = columns[0].of->block / STEP, to->steps = steps_from(columns[0].of, from, TOGETHER);
    for (int c = 0; c < 2 && columns[c].of; c++) {
        for (long b = 0; b * to->block < to->steps; b++)
            _mm512_store_ps(to->scales[b][c], block_scales(columns[c].of, columns[c].t, from / columns[c].of->block + b));
        for (long i = 0; i * DEEP < to->steps * STEP; i++)
            to->quads[i][c] = quads_at(columns[c].of, columns[c].t, from + i * DEEP, to->turned[c] + i * DEEP * 16);
    }
}

/* sums[rows][COLUMNS] = (more ? sums : 0) + a panel of `rows` rows times `columns` columns. The `first` panel makes the tiles,
   which costs little between its products: these wait for units of their own. (Constants all three.) */
INLINE void times_bytes(const int rows, const int columns, const int first, const int32_t *a, some_bytes *w, float *sums, int more) {
    for (long step = 0, b = 0; step < w->steps; step += w->block, b++, more = 1) {
        __m512 s[PANEL][2];
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm512_setzero_ps();
        bf16 *left = w->tiles[0] + step * TILE, *right = w->tiles[1] + step * TILE;
        long pairs = at_most(w->steps - step, w->block) * 16;
        for (long p = 0; p < pairs; p += 2) {
            if (first) {
                const uint8_t *const *quads = w->quads[(step * 16 + p) / (DEEP / 2)];
                long at = (step * 16 + p) % (DEEP / 2) * 32;
                to_pairs(quads[0] + at, left + p * STEP);
                if (columns > 1) to_pairs(quads[1] + at, right + p * STEP);
            }
#pragma GCC unroll 2
            for (long i = p; i < p + 2; i++, a += rows) {
                __m512bh one = (__m512bh)_mm512_load_si512(left + i * STEP), two = one;
                if (columns > 1) two = (__m512bh)_mm512_load_si512(right + i * STEP);
                FAR(a + PANEL * TOGETHER / 2); /* the next panel */
#pragma GCC unroll 12
                for (int r = 0; r < rows; r++) {
                    __m512bh both = (__m512bh)_mm512_set1_epi32(a[r]);
                    s[r][0] = _mm512_dpbf16_ps(s[r][0], both, one);
                    if (columns > 1) s[r][1] = _mm512_dpbf16_ps(s[r][1], both, two);
                }
            }
        }
        for (int c = 0; c < columns; c++) {
            __m512 by = _mm512_load_ps(w->scales[b][c]);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                float *to = sums + r * COLUMNS + c * 16;
                _mm512_storeu_ps(to, more ? _mm512_fmadd_ps(s[r][c], by, _mm512_loadu_ps(to)) : _mm512_mul_ps(s[r][c], by));
            }
        }
    }
}

static void panel_times_bytes(long rows, int columns, int first, const bf16 *panel, some_bytes *w, float *sums, int more) {
    const int32_t *a = (const int32_t *)panel;
    switch (rows + (columns > 1 ? 0 : PANEL) + (first ? 2 * PANEL : 0)) {
#define EACH(n)                                                        \
    case n: times_bytes(n, 2, 0, a, w, sums, more); break;             \
    case PANEL + n: times_bytes(n, 1, 0, a, w, sums, more); break;     \
    case 2 * PANEL + n: times_bytes(n, 2, 1, a, w, sums, more); break; \
    case 3 * PANEL + n: times_bytes(n, 1, 1, a, w, sums, more); break;
    EVERY_PANEL(EACH)
#undef EACH
    }
}

#define FEW_OF_BYTES 16 /* rows, up to which what vector_few_bytes.h does is mostly faster */

/* One panel is worth it where no scales are between its products: making tiles then hides behind them best. */
INLINE int worth_panels(const byte_weight *w, long rows) {
    return rows > FEW_OF_BYTES || (w->block == TOGETHER && rows > PANEL / 2 + 2 && rows <= PANEL);
}

/* Rows of k numbers in panels, TOGETHER inputs of all before the next ones. */
INLINE void pack_parts(const bf16 *const *rows, long count, long k, bf16 *to) {
    for (long from = 0; from < k; from += TOGETHER) {
        long width = at_most(k - from, TOGETHER);
        for (long i = 0; i < panels_of(count); i++) {
            const bf16 *at[16];
            long low = panel_at(count, i), high = panel_at(count, i + 1);
            for (long r = low; r < high; r++) at[r - low] = rows[r] + from;
            pack_panel(at, high - low, width, to + from * count + low * whole_steps(width) * STEP);
        }
    }
}

/* sums[rows][COLUMNS] = packed rows times a column and, if there is one, another. */
static void times_columns(byte_column left, byte_column right, const bf16 *packed, long rows, float *sums) {
    some_bytes w;
    const byte_column columns[2] = {left, right};
    for (long from = 0; from < left.of->k; from += TOGETHER) {
        find_bytes(&w, columns, from);
        for (long i = 0; i < panels_of(rows); i++) {
            long low = panel_at(rows, i), count = panel_at(rows, i + 1) - low;
            panel_times_bytes(count, right.of ? 2 : 1, i == 0, packed + from * rows + low * w.steps * STEP, &w, sums + low * COLUMNS, from > 0);
        }
    }
}
#endif
