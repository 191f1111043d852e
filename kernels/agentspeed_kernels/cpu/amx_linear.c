/* Products of bf16 rows with weights in tile order: panels, and where there are tiles chains of them for few rows. */
#include "many_linear.h"
#ifndef VECTOR_TILES
#include "amx_linear.h"

/* Tiles [low, high) of all heads' columns, by each thread its part. */
static void few_rows(const product *of, long heads, long x_next, long out_next, int threads) {
    long columns = whole_tiles(of->n), numbers = columns * whole_steps(of->k) * TILE;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long low, high;
        my_part(heads * columns, &low, &high);
        tiles_begin(of->rows % 16);
        for (long at = low; at < high;) {
            long head = at / columns, first = at % columns, last = at_most(first + high - at, columns);
            product p = *of;
            p.x += head * x_next, p.weight += head * numbers, p.out += head * out_next;
            multiply(&p, first, last);
            at += last - first;
        }
        tiles_end();
    }
}
#endif

static void multiply_heads(const product *of, long heads, long x_next, long out_next, int threads) {
    if (of->rows * heads * of->n * of->k < WORTH_A_TEAM) threads = 1;
#ifndef VECTOR_TILES
    if (!in_panels(of->rows)) {
        few_rows(of, heads, x_next, out_next, threads);
        return;
    }
#endif
    multiply_many(of, heads, x_next, out_next, threads);
}

EXPORT void NAME(linear)(const bf16 *x, long x_stride, const bf16 *weight, const bf16 *bias, bf16 *out, long out_stride,
                         long rows, long n, long k, int threads) {
    product p = {x, x_stride, weight, bias, out, out_stride, rows, n, k};
    multiply_heads(&p, 1, 0, 0, threads);
}

/* Head h: x[t * x_t + h * x_h] times weight[h][n][k] to out[t * out_t + h * out_h]. */
EXPORT void NAME(heads_linear)(const bf16 *x, long x_t, long x_h, const bf16 *weight, bf16 *out, long out_t, long out_h,
                               long rows, long heads, long n, long k, int threads) {
    product p = {x, x_t, weight, 0, out, out_t, rows, n, k};
    multiply_heads(&p, heads, x_h, out_h, threads);
}
