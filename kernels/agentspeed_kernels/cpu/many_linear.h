/* Products of many rows with weights in tile order: blocks of rows and of columns, taken by whichever thread is free. */
#ifndef AGENTSPEED_MANY_LINEAR_H
#define AGENTSPEED_MANY_LINEAR_H
#include "many_products.h"

/* `heads` products of the same shape, their rows x_next numbers apart and what comes out out_next, by all threads. */
static void multiply_many(const product *of, long heads, long x_next, long out_next, int threads) {
    long steps = whole_steps(of->k), tiles = whole_tiles(of->n), wanted = threads > 1 ? 4 * threads : 1;
    long blocks = blocks_of(of->rows, of->k, threads), parts = (wanted + heads * blocks - 1) / (heads * blocks);
    parts = at_most(parts, (tiles + 3) / 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long most = (of->rows + blocks - 1) / blocks, packed = -1;
        size_t bytes = packed_bytes(most, of->k);
        char *memory = agentspeed_scratch(FOR_ROWS, bytes + sums_bytes(most));
        bf16 *panels = (bf16 *)memory;
        float *sums = (float *)(memory + bytes);
#pragma omp for schedule(dynamic)
        for (long job = 0; job < heads * blocks * parts; job++) {
            long head = job / (blocks * parts), block = job / parts % blocks, part = job % parts;
            long low = of->rows * block / blocks, rows = of->rows * (block + 1) / blocks - low;
            product p = *of;
            p.x += head * x_next, p.weight += head * tiles * steps * TILE, p.out += head * out_next;
            if (packed != job / parts) pack_rows(p.x + low * p.x_stride, p.x_stride, rows, p.k, panels);
            packed = job / parts;
            /* Parts begin at an even tile. */
            for (long t = (tiles + 1) / 2 * part / parts * 2; t < tiles && t < (tiles + 1) / 2 * (part + 1) / parts * 2; t += 2) {
                const bf16 *first = p.weight + t * steps * TILE;
                times_packed(panels, rows, p.k, first, t + 1 < tiles ? first + steps * TILE : 0, sums, 2 * steps * TILE);
                put_columns(&p, sums, low, rows, t, t + 1 < tiles);
            }
        }
        tiles_end();
    }
}
#endif
