/* SwiGLU of many rows: a column of gate and the same one of up make one pass over the rows. Included by
   amx_experts.c, whose `feed` and `silu` these use. */
#ifndef AGENTSPEED_MANY_EXPERTS_H
#define AGENTSPEED_MANY_EXPERTS_H
#include "many_products.h"

#define DENSE_BYTES (700L << 10) /* of a block's inner rows, twice: as they are made and packed */

/* Rows of a block, packed, and the sums of two columns. */
typedef struct {
    bf16 *panels;
    float *sums;
} bench;

INLINE size_t bench_bytes(long rows, long k) { return packed_bytes(rows, k) + sums_bytes(rows); }
INLINE bench bench_at(char *memory, long rows, long k) {
    bench b = {(bf16 *)memory, (float *)(memory + packed_bytes(rows, k))};
    return b;
}

/* act[rows][width] = silu(x . gate) * (x . up) of packed rows, tiles [low, high). */
static void inner_rows(const bench *b, long rows, long hidden, const bf16 *gate, const bf16 *up, long low, long high, bf16 *act,
                       long width) {
    long size = whole_steps(hidden) * TILE;
    for (long t = low; t < high; t++) {
        times_packed(b->panels, rows, hidden, gate + t * size, up + t * size, b->sums, size);
        for (long r = 0; r < rows; r++) {
            const float *s = b->sums + r * COLUMNS;
            write16(act + r * width + t * 16, _mm512_mul_ps(silu(_mm512_loadu_ps(s)), _mm512_loadu_ps(s + 16)));
        }
    }
}

/* Rows [from, from + rows) of what is put in order of expert, in blocks that the second cache holds. */
static void inner_many(const feed *f, long expert, long low, long high) {
    long steps = whole_steps(f->hidden), columns = whole_tiles(f->inner), width = whole_steps(f->inner) * STEP;
    long count = f->start[expert + 1] - f->start[expert], blocks = blocks_of(count, f->hidden, 1), most = (count + blocks - 1) / blocks;
    const bf16 *gate = f->gate_up + expert * 2 * columns * steps * TILE;
    bench b = bench_at(agentspeed_scratch(FOR_ROWS, bench_bytes(most, f->hidden)), most, f->hidden);
    for (long i = 0; i < blocks; i++) {
        long from = count * i / blocks, rows = count * (i + 1) / blocks - from, at = f->start[expert] + from;
        pack_rows(f->x + at * f->x_stride, f->x_stride, rows, f->hidden, b.panels);
        inner_rows(&b, rows, f->hidden, gate, gate + columns * steps * TILE, low, high, f->act + at * width, width);
    }
}

/* Tile t of what comes out of row `at`, to where it belongs. */
INLINE void put_outer_tile(const feed *f, __m512 y, long at, long t) {
    if (f->alone) {
        write_some(f->out + at * f->hidden + t * 16, first_lanes(f->hidden - t * 16), y);
        return;
    }
    int pair = f->order[at];
    float *sum = f->sums + (pair / f->top * whole_tiles(f->hidden) + t) * 16;
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(y, _mm512_set1_ps(f->weights[pair]), _mm512_loadu_ps(sum)));
}

/* Tiles t and, with `both`, t + 1 of a block's products, the rows from `at` on. */
INLINE void put_outer(const feed *f, const float *sums, long at, long rows, long t, int both) {
    for (long r = 0; r < rows; r++)
        for (int c = 0; c <= both; c++) put_outer_tile(f, _mm512_loadu_ps(sums + r * COLUMNS + c * 16), at + r, t + c);
}

static void outer_rows(const feed *f, const bench *b, long at, long rows, const bf16 *down, long low, long high) {
    long size = whole_steps(f->inner) * TILE;
    for (long t = low; t < high; t += 2) {
        times_packed(b->panels, rows, f->inner, down + t * size, t + 1 < high ? down + (t + 1) * size : 0, b->sums, 2 * size);
        put_outer(f, b->sums, at, rows, t, t + 1 < high);
    }
}

static void outer_many(const feed *f, long expert, long low, long high) {
    long columns = whole_tiles(f->hidden), steps = whole_steps(f->inner), width = steps * STEP;
    long count = f->start[expert + 1] - f->start[expert], blocks = blocks_of(count, f->inner, 1), most = (count + blocks - 1) / blocks;
    bench b = bench_at(agentspeed_scratch(FOR_ROWS, bench_bytes(most, f->inner)), most, f->inner);
    for (long i = 0; i < blocks; i++) {
        long from = count * i / blocks, rows = count * (i + 1) / blocks - from, at = f->start[expert] + from;
        pack_rows(f->act + at * width, width, rows, f->inner, b.panels);
        outer_rows(f, &b, at, rows, f->down + expert * columns * steps * TILE, low, high);
    }
}

/* Whether a dense layer is done block by block: there are blocks for all threads, and what is between its two products
   stays in the second cache. */
static int in_blocks(const feed *f, int threads) {
    long rows = (f->tokens + blocks_of(f->tokens, f->hidden, threads) - 1) / blocks_of(f->tokens, f->hidden, threads);
    return f->tokens >= 4 * PANEL * threads && 2 * rows * whole_steps(f->inner) * STEP * (long)sizeof(bf16) <= DENSE_BYTES;
}

/* A dense layer; a block of rows goes through both products before the next one. */
static void dense_blocks(const feed *f, int threads) {
    long blocks = blocks_of(f->tokens, f->hidden, threads), most = (f->tokens + blocks - 1) / blocks;
    long width = whole_steps(f->inner) * STEP, size = whole_steps(f->hidden) * TILE, columns = whole_tiles(f->inner);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        size_t first = bench_bytes(most, f->hidden);
        char *memory = agentspeed_scratch(FOR_ROWS, first + bench_bytes(most, f->inner));
        bench x = bench_at(memory, most, f->hidden), inner = bench_at(memory + first, most, f->inner);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < blocks; i++) {
            long low = f->tokens * i / blocks, rows = f->tokens * (i + 1) / blocks - low;
            pack_rows(f->x + low * f->x_stride, f->x_stride, rows, f->hidden, x.panels);
            inner_rows(&x, rows, f->hidden, f->gate_up, f->gate_up + columns * size, 0, columns, f->act + low * width, width);
            pack_rows(f->act + low * width, width, rows, f->inner, inner.panels);
            outer_rows(f, &inner, low, rows, f->down, 0, whole_tiles(f->hidden));
        }
        tiles_end();
    }
}
#endif
