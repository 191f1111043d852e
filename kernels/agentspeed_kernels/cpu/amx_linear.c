/* Products of bf16 rows with weights in tile order: chains of single tiles for few rows, panels for many. */
#include "amx_linear.h"
#include "many_linear.h"

EXPORT void NAME(linear)(const bf16 *x, long x_stride, const bf16 *weight, const bf16 *bias, bf16 *out,
                                       long out_stride, long rows, long n, long k, int threads) {
    product p = {x, x_stride, weight, bias, out, out_stride, rows, n, k};
    if (rows * n * k < WORTH_A_TEAM) threads = 1;
    if (in_panels(rows)) {
        multiply_many(&p, 1, 0, 0, threads);
        return;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long low, high;
        my_part(whole_tiles(n), &low, &high);
        tiles_begin(rows % 16);
        multiply(&p, low, high);
        tiles_end();
    }
}

/* Head h: x[t * x_t + h * x_h] times weight[h][n][k] to out[t * out_t + h * out_h]. */
EXPORT void NAME(heads_linear)(const bf16 *x, long x_t, long x_h, const bf16 *weight, bf16 *out, long out_t,
                                             long out_h, long rows, long heads, long n, long k, int threads) {
    long columns = whole_tiles(n), numbers = columns * whole_steps(k) * TILE;
    if (rows * heads * n * k < WORTH_A_TEAM) threads = 1;
    if (in_panels(rows)) {
        product all = {x, x_t, weight, 0, out, out_t, rows, n, k};
        multiply_many(&all, heads, x_h, out_h, threads);
        return;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long low, high;
        my_part(heads * columns, &low, &high);
        tiles_begin(rows % 16);
        for (long at = low; at < high;) {
            long head = at / columns, first = at % columns, last = at_most(first + high - at, columns);
            product p = {x + head * x_h, x_t, weight + head * numbers, 0, out + head * out_h, out_t, rows, n, k};
            multiply(&p, first, last);
            at += last - first;
        }
        tiles_end();
    }
}
