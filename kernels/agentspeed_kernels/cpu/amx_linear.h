/* One thread's share of a product with weights in tile order. */
#ifndef AGENTSPEED_AMX_LINEAR_H
#define AGENTSPEED_AMX_LINEAR_H
#include "amx_common.h"

#define BLOCK_ROWS 256 /* rows that share one pass over the weights, which come from far where they are many */
#define LONG_STEPS 32  /* a longer chain is cut, so that its weights stay in the first cache and its rows in the second */
#define CUT_STEPS 8
#define CUT_COLUMNS 4

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

INLINE place place_of(const product *p, long row, long tile) {
    place to = {p->out + row * p->out_stride + tile * 16, p->out_stride, at_most(p->rows - row, 16), p->n - tile * 16,
                p->bias ? p->bias + tile * 16 : 0};
    return to;
}

/* `count` rows from `first`, padded with zeros to whole steps: [rows of 16][steps][16][32]. Reading past the end of a row
   would multiply whatever lies there, which need not be a number, by zero. */
static void padded_rows(const product *p, long first, long count, bf16 *to) {
    long steps = whole_steps(p->k);
    for (long r = 0; r < count; r++) {
        const bf16 *row = p->x + (first + r) * p->x_stride;
        bf16 *at = to + (r / 16 * steps * 16 + r % 16) * STEP;
        for (long s = 0; s < steps; s++)
            _mm512_store_si512(at + s * TILE, _mm512_maskz_loadu_epi16(first_halves(p->k - s * STEP), row + s * STEP));
    }
}

/* Rows [first, first + count) of x as left operands: `step` numbers between steps, `bytes` between rows of a tile. */
typedef struct {
    const bf16 *x;
    long row_block, bytes, step;
} left;

static left left_of(const product *p, long first, long count, int copy) {
    long steps = whole_steps(p->k);
    if (!copy) {
        left in_place = {p->x + first * p->x_stride, 16 * p->x_stride, 2 * p->x_stride, STEP};
        return in_place;
    }
    bf16 *held = agentspeed_scratch(FOR_ROWS, BLOCK_ROWS * steps * STEP * sizeof(bf16));
    padded_rows(p, first, count, held);
    left copied = {held, steps * TILE, 64, TILE};
    return copied;
}

/* `next`: weights of the next column, to be fetched meanwhile; 0 for none. */
INLINE void chain_left(const left *a, long block, long from, const bf16 *w, long steps, float *sums, int full, int more,
                       const bf16 *next) {
    const bf16 *x = a->x + block * a->row_block + from * a->step;
    if (a->step == STEP) chain(x, a->bytes, w, steps, sums, full, more, next != 0);
    else {
        TILES; /* rows of a copied tile are neighbours */
        if (more) TILE_LOAD_SUM(0, sums, 64);
        else TILE_ZERO(0);
        for (long s = 0; s < steps; s++) {
            if (next) for (int z = 0; z < 16; z++) FAR(next + s * TILE + z * STEP);
            TILE_LOAD(1, x + s * TILE, 64);
            TILE_LOAD(2, w + s * TILE, 64);
            TILE_DOT(0, 1, 2);
        }
        TILE_STORE(0, sums, 64);
    }
}

/* Tiles [low, high) of outputs, `count` <= BLOCK_ROWS rows from `first`. The sums of a tile are rounded and written after
   the chain of the next one has started the tile unit again. */
static void multiply_block(const product *p, const left *a, long first, long count, long low, long high) {
    float sums[2][SUMS] __attribute__((aligned(64)));
    long steps = whole_steps(p->k);
    place before = {0};
    int side = 0;
    for (long t = low; t < high; t++)
        for (long i = 0; i < count; i += 16) {
            chain_left(a, i / 16, 0, p->weight + t * steps * TILE, steps, sums[side], count - i >= 16, 0,
                       i == 0 ? p->weight + (t + 1) * steps * TILE : 0);
            if (before.out) put_tile(sums[side ^ 1], &before);
            before = place_of(p, first + i, t);
            side ^= 1;
        }
    if (before.out) put_tile(sums[side ^ 1], &before);
}

static void multiply_cut(const product *p, const left *a, long first, long count, long low, long high) {
    float sums[CUT_COLUMNS * BLOCK_ROWS / 16][SUMS] __attribute__((aligned(64)));
    long steps = whole_steps(p->k);
    for (long from = low; from < high; from += CUT_COLUMNS) {
        long columns = at_most(high - from, CUT_COLUMNS);
        for (long s = 0; s < steps; s += CUT_STEPS)
            for (long t = 0; t < columns; t++)
                for (long i = 0; i < count; i += 16)
                    chain_left(a, i / 16, s, p->weight + ((from + t) * steps + s) * TILE, at_most(steps - s, CUT_STEPS),
                               sums[t * (BLOCK_ROWS / 16) + i / 16], count - i >= 16, s > 0,
                               i == 0 ? p->weight + ((from + t + 1) * steps + s) * TILE : 0);
        for (long t = 0; t < columns; t++)
            for (long i = 0; i < count; i += 16) {
                place to = place_of(p, first + i, from + t);
                put_tile(sums[t * (BLOCK_ROWS / 16) + i / 16], &to);
            }
    }
}

/* Tiles [low, high) of the outputs of all rows. The caller has called tiles_begin(rows % 16). */
static void multiply(const product *p, long low, long high) {
    long steps = whole_steps(p->k);
    if (low >= high) return;
    for (long first = 0; first < p->rows; first += BLOCK_ROWS) {
        long count = at_most(p->rows - first, BLOCK_ROWS);
        int cut = steps > LONG_STEPS && count > 16;
        /* Rows that are a multiple of 4 KB apart fall on the same lines of the first cache, cut or strided. */
        int copy = p->k % STEP != 0 || cut || (ROWS_TOGETHER && count > 16);
        left a = left_of(p, first, count, copy);
        if (cut) multiply_cut(p, &a, first, count, low, high);
        else multiply_block(p, &a, first, count, low, high);
    }
}
#endif
