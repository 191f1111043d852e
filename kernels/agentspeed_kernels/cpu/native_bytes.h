/* Products of a few rows with weights of 8 bits, whatever the bytes stand for: what goes around the product of a tile.

   A source says where a matrix lies and how a tile of its outputs is multiplied (the functions that are declared here). */
#ifndef AGENTSPEED_NATIVE_BYTES_H
#define AGENTSPEED_NATIVE_BYTES_H
#include "native_common.h"

#define MOST_ROWS 16

typedef struct {
    const uint8_t *data;
    const float *scales;
    long n, k, group;
    long columns; /* tiles of 16 outputs */
    long width;   /* floats that a row takes, zeros behind its k */
} byte_weight;

INLINE byte_weight byte_weight_of(const uint8_t *data, const float *scales, long n, long k, long group);
/* Of matrices that are stacked. */
INLINE byte_weight matrix_at(const byte_weight *first, long index);
/* to[rows][16]: tile t of the outputs. */
INLINE void times(const byte_weight *w, long t, const float *const *x, long rows, float (*to)[LANES]);

INLINE void my_tiles(long n, long *low, long *high) {
    long index = 0, count = 1;
#ifdef _OPENMP
    index = omp_get_thread_num(), count = omp_get_num_threads();
#endif
    *low = n * index / count, *high = n * (index + 1) / count;
}

/* Rows as floats, zeros behind them. */
INLINE void whole_rows(const num *x, long x_stride, long rows, const byte_weight *w, float *held, const float **to) {
    for (long r = 0; r < rows; r++) {
        widen_row(held + r * w->width, x + r * x_stride, w->k);
        memset(held + r * w->width + w->k, 0, (w->width - w->k) * sizeof(float));
        to[r] = held + r * w->width;
    }
}

INLINE void byte_linear(const num *x, long x_stride, byte_weight w, const num *bias, num *out, long out_stride, long rows,
                        int threads) {
    if (rows * w.n * w.k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const float *held[MOST_ROWS];
        float sums[MOST_ROWS][LANES];
        long low, high;
        whole_rows(x, x_stride, rows, &w, agentspeed_scratch(FOR_ROWS, rows * w.width * sizeof(float)), held);
        my_tiles(w.columns, &low, &high);
        for (long t = low; t < high; t++) {
            times(&w, t, held, rows, sums);
            for (long r = 0; r < rows; r++)
                for (long j = 0; j < LANES && t * LANES + j < w.n; j++)
                    out[r * out_stride + t * LANES + j] = round_one(sums[r][j] + (bias ? read_one(bias[t * LANES + j]) : 0.0f));
        }
    }
}

INLINE float silu(float x) { return x / (1.0f + expf(-x)); }

/* gate_up is [experts][2][inner][hidden], down [experts][hidden][inner]. Scratch: act[pairs][width of down];
   sums[tokens][hidden in whole tiles]. tokens <= MOST_ROWS. */
INLINE void byte_experts(const num *x, byte_weight gate_up, byte_weight down, const int64_t *ids, const float *weights,
                         float *act, float *sums, int *order, num *out, long tokens, long top, long experts, int threads) {
    long pairs = tokens * top, row = down.columns * LANES, used = 0;
    int *start = order + pairs;
    for (long e = 0; e < experts; e++) {
        start[e] = (int)used;
        for (long p = 0; p < pairs; p++)
            if (ids[p] == e) order[used++] = (int)p;
    }
    start[experts] = (int)used;
    if (3 * pairs * down.k * down.n < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const float *held[MOST_ROWS], *mine[MOST_ROWS];
        float gate[MOST_ROWS][LANES], up[MOST_ROWS][LANES];
        long low, high;
        whole_rows(x, gate_up.k, tokens, &gate_up, agentspeed_scratch(FOR_ROWS, tokens * gate_up.width * sizeof(float)), held);
        my_tiles(gate_up.columns, &low, &high);
        for (long e = 0; e < experts; e++) {
            byte_weight g = matrix_at(&gate_up, 2 * e), u = matrix_at(&gate_up, 2 * e + 1);
            for (int at = start[e]; at < start[e + 1]; at += MOST_ROWS) {
                long many = start[e + 1] - at < MOST_ROWS ? start[e + 1] - at : MOST_ROWS;
                for (long i = 0; i < many; i++) mine[i] = held[order[at + i] / top];
                for (long t = low; t < high; t++) {
                    times(&g, t, mine, many, gate), times(&u, t, mine, many, up);
                    long lanes = down.width - t * LANES < LANES ? down.width - t * LANES : LANES;
                    for (long i = 0; i < many; i++)
                        for (int j = 0; j < lanes; j++)
                            act[order[at + i] * down.width + t * LANES + j] = silu(gate[i][j]) * up[i][j];
                }
            }
        }
        /* A row may be longer than whole tiles. */
        if (high == gate_up.columns && down.width > high * LANES)
            for (long p = 0; p < pairs; p++)
                memset(act + p * down.width + high * LANES, 0, (down.width - high * LANES) * sizeof(float));
#pragma omp barrier
        my_tiles(down.columns, &low, &high);
        for (long t = 0; t < tokens; t++) memset(sums + t * row + low * LANES, 0, (high - low) * LANES * sizeof(float));
        for (long e = 0; e < experts; e++) {
            byte_weight d = matrix_at(&down, e);
            for (int at = start[e]; at < start[e + 1]; at += MOST_ROWS) {
                long many = start[e + 1] - at < MOST_ROWS ? start[e + 1] - at : MOST_ROWS;
                for (long i = 0; i < many; i++) mine[i] = act + order[at + i] * down.width;
                for (long t = low; t < high; t++) {
                    times(&d, t, mine, many, gate);
                    for (long i = 0; i < many; i++)
                        for (int j = 0; j < LANES; j++) sums[order[at + i] / top * row + t * LANES + j] += weights[order[at + i]] * gate[i][j];
                }
            }
        }
        for (long t = 0; t < tokens; t++)
            for (long j = low * LANES; j < high * LANES && j < down.n; j++) out[t * down.n + j] = round_one(sums[t * row + j]);
    }
}
#endif
