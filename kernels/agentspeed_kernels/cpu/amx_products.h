/* Products of many bf16 rows with weights in tile order, on the tiles of AMX: what vector_products.h is on vectors.

   32 rows meet 32 outputs: four sums stay in their tiles for a part of the inputs, and each operand that is loaded has two
   products. A sum alone has two loads for each, and waits for the second cache, where many rows come from. */
#ifndef AGENTSPEED_AMX_PRODUCTS_H
#define AGENTSPEED_AMX_PRODUCTS_H
#include "amx_common.h"

#define PANEL 32
#define FEW_ROWS 16     /* up to as many rows wait for weights, which one chain after the other reads as they lie */
#define CUT_STEPS 16    /* of inputs at a time: two columns of weights stay in the first cache */
#define BLOCK_BYTES (1L << 20) /* of packed rows, in the second cache beside the weights that pass by */

INLINE int in_panels(long rows) { return rows > FEW_ROWS; }

static inline void pack_rows(const bf16 *x, long stride, long rows, long k, bf16 *to) {
    for (long r = 0; r < rows; r++) pack_row(x + r * stride, r, k, to);
}
INLINE size_t packed_bytes(long rows, long k) { return whole_tiles(rows) * whole_steps(k) * TILE * sizeof(bf16); }

/* Weights that are fetched while others are used: `each` lines of the 16 of a tile in each step, from `from` on. */
typedef struct {
    long numbers; /* ahead; 0: nothing is fetched */
    long from, each;
} fetched;

/* to[16 * R][stride] = (more ? to : 0) + R blocks of 16 packed rows, `block` numbers apart, times C columns. (Constants both.) */
INLINE void add_tiles(const bf16 *x, long block, const bf16 *first, const bf16 *second, long steps, float *to, long stride,
                      int more, fetched next, const int R, const int C) {
    float *low = to + 16 * stride;
    const long bytes = stride * (long)sizeof(float);
    TILES;
    if (more) {
        TILE_LOAD_SUM(0, to, bytes);
        if (C > 1) TILE_LOAD_SUM(1, to + 16, bytes);
        if (R > 1) TILE_LOAD_SUM(2, low, bytes);
        if (R > 1 && C > 1) TILE_LOAD_SUM(3, low + 16, bytes);
    } else {
        TILE_ZERO(0);
        if (C > 1) TILE_ZERO(1);
        if (R > 1) TILE_ZERO(2);
        if (R > 1 && C > 1) TILE_ZERO(3);
    }
    for (long s = 0; s < steps; s++, x += TILE, first += TILE, second += TILE) {
        if (next.numbers)
            for (long z = next.from; z < next.from + next.each && z < 16; z++) {
                FAR(first + next.numbers + z * STEP);
                if (C > 1) FAR(second + next.numbers + z * STEP);
            }
        TILE_LOAD(4, x, 64);
        TILE_LOAD(6, first, 64);
        TILE_DOT(0, 4, 6);
        if (C > 1) {
            TILE_LOAD(7, second, 64);
            TILE_DOT(1, 4, 7);
        }
        if (R > 1) {
            TILE_LOAD(5, x + block, 64);
            TILE_DOT(2, 5, 6);
            if (C > 1) TILE_DOT(3, 5, 7);
        }
    }
    TILE_STORE(0, to, bytes);
    if (C > 1) TILE_STORE(1, to + 16, bytes);
    if (R > 1) TILE_STORE(2, low, bytes);
    if (R > 1 && C > 1) TILE_STORE(3, low + 16, bytes);
}

/* The same for less than 16 rows and one column, where tiles_begin was told how many: that takes less of the tile unit. */
INLINE void add_tail(const bf16 *x, const bf16 *w, long steps, float *to, long stride, int more) {
    TILES;
    if (more) TILE_LOAD_SUM(3, to, stride * (long)sizeof(float));
    else TILE_ZERO(3);
    for (long s = 0; s < steps; s++) {
        TILE_LOAD(4, x + s * TILE, 64);
        TILE_LOAD(6, w + s * TILE, 64);
        TILE_DOT(3, 4, 6);
    }
    TILE_STORE(3, to, stride * (long)sizeof(float));
}

/* The same for `tiles` (1 or 2) blocks of rows, and one column where second is 0. */
static void add_blocks(const bf16 *x, long block, const bf16 *first, const bf16 *second, long steps, float *to, long stride,
                       int more, fetched next, long tiles) {
    switch (tiles + (second ? 2 : 0)) {
    case 1: add_tiles(x, block, first, first, steps, to, stride, more, next, 1, 1); break;
    case 2: add_tiles(x, block, first, first, steps, to, stride, more, next, 2, 1); break;
    case 3: add_tiles(x, block, first, second, steps, to, stride, more, next, 1, 2); break;
    default: add_tiles(x, block, first, second, steps, to, stride, more, next, 2, 2);
    }
}

/* sums[rows in whole tiles][COLUMNS] = packed rows times two columns of tiles, or one where second is 0; what lies `ahead`
   numbers further is fetched meanwhile, a part with each block of rows. */
INLINE void times_packed(const bf16 *packed, long rows, long k, const bf16 *first, const bf16 *second, float *sums, long ahead) {
    long steps = whole_steps(k), tiles = whole_tiles(rows), turns = (tiles + 1) / 2, each = (16 + turns - 1) / turns;
    tiles_begin(0);
    for (long s = 0; s < steps; s += CUT_STEPS)
        for (long i = 0; i < tiles; i += 2) {
            fetched next = {ahead, i / 2 * each, each};
            add_blocks(packed + (i * steps + s) * TILE, steps * TILE, first + s * TILE, second ? second + s * TILE : 0,
                       at_most(steps - s, CUT_STEPS), sums + i * 16 * COLUMNS, COLUMNS, s > 0, next, at_most(tiles - i, 2));
        }
}

/* In how many blocks rows are cut so that a block stays in the second cache. */
INLINE long blocks_of(long rows, long k, int threads) {
    (void)threads; /* they share the columns */
    long most = BLOCK_BYTES / (whole_steps(k) * STEP * (long)sizeof(bf16)) / PANEL * PANEL;
    most = most < 2 * PANEL ? 2 * PANEL : most > 16 * PANEL ? 16 * PANEL : most;
    return (rows + most - 1) / most;
}
#endif
