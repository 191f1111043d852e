/* One thread's share of a product of up to 16 rows with weights in tile order. */
#ifndef AGENTSPEED_AMX_LINEAR_H
#define AGENTSPEED_AMX_LINEAR_H
#include "amx_common.h"

/* Where a tile of sums goes: 16 columns from `column` of up to 16 rows. */
typedef struct {
    bf16 *out;
    long stride, rows, columns;
    const bf16 *bias;
} place;

static inline void put_tile(const float *sums, const place *to) {
    __mmask16 lanes = first_lanes(to->columns);
    __m512 bias = to->bias ? read_some(to->bias, lanes) : _mm512_setzero_ps();
    for (long r = 0; r < to->rows; r++)
        write_some(to->out + r * to->stride, lanes, _mm512_add_ps(_mm512_load_ps(sums + r * 16), bias));
}

INLINE place place_of(const product *p, long tile) {
    place to = {p->out + tile * 16, p->out_stride, p->rows, p->n - tile * 16, p->bias ? p->bias + tile * 16 : 0};
    return to;
}

/* Up to 16 rows, padded with zeros to whole steps: [steps][16][32]. Reading past the end of a row would multiply whatever lies
   there, which need not be a number, by zero. */
static void padded_rows(const product *p, bf16 *to) {
    for (long r = 0; r < p->rows; r++)
        for (long s = 0; s < whole_steps(p->k); s++)
            _mm512_store_si512(to + (s * 16 + r) * STEP, _mm512_maskz_loadu_epi16(first_halves(p->k - s * STEP), p->x + r * p->x_stride + s * STEP));
}

/* Padded rows times one column; the next column's weights are fetched meanwhile. */
INLINE void chain_padded(const bf16 *x, const bf16 *w, long steps, float *sums) {
    TILES;
    TILE_ZERO(0);
    for (long s = 0; s < steps; s++) {
        for (int z = 0; z < 16; z++) FAR(w + (steps + s) * TILE + z * STEP);
        TILE_LOAD(1, x + s * TILE, 64);
        TILE_LOAD(2, w + s * TILE, 64);
        TILE_DOT(0, 1, 2);
    }
    TILE_STORE(0, sums, 64);
}

/* Tiles [low, high) of the outputs of up to 16 rows. The caller has called tiles_begin(rows % 16). The sums of a tile are
   rounded and written after the chain of the next one has started the tile unit again. */
static void multiply(const product *p, long low, long high) {
    float sums[2][SUMS] __attribute__((aligned(64)));
    long steps = whole_steps(p->k);
    bf16 *held = p->k % STEP && low < high ? agentspeed_scratch(FOR_ROWS, steps * TILE * sizeof(bf16)) : 0;
    place before = {0};
    if (held) padded_rows(p, held);
    for (long t = low; t < high; t++) {
        const bf16 *w = p->weight + t * steps * TILE;
        if (held) chain_padded(held, w, steps, sums[t % 2]);
        else chain(p->x, 2 * p->x_stride, w, steps, sums[t % 2], p->rows == 16, 0, 1);
        if (before.out) put_tile(sums[~t & 1], &before);
        before = place_of(p, t);
    }
    if (before.out) put_tile(sums[~high & 1], &before);
}
#endif
