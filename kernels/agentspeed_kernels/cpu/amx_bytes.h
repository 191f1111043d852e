/* Products and feed-forwards of many bf16 rows with weights of 8 bits, whatever the bytes stand for.

   16 outputs of some inputs become tiles of bf16, which holds every byte, and meet all rows; their sums get the scales. So
   nothing is rounded that the bytes do not round, and a byte is taken back once for up to BLOCK_ROWS rows. */
#ifndef AGENTSPEED_AMX_BYTES_H
#define AGENTSPEED_AMX_BYTES_H
#ifdef VECTOR_TILES
#include "vector_few_bytes.h"
#else
#include "amx_byte_products.h"
#endif

/* Rows of one product or expert, as its kernel wants them, and what comes out: sums[rows][COLUMNS] of two columns. */
typedef struct {
    bf16 *rows;
    float *sums;
    long count;
} held_rows;

INLINE held_rows memory_for(long rows, long k) {
    rows = at_most(rows, rows_together(k));
    size_t bytes = (whole_tiles(rows) * 16 + 2) * whole_steps(k) * STEP * sizeof(bf16);
    char *memory = agentspeed_scratch(FOR_ROWS, bytes + sums_bytes(rows));
    held_rows held = {(bf16 *)memory, (float *)(memory + bytes), 0};
    return held;
}

/* `count` rows of k numbers, zeros behind these. */
INLINE void hold(held_rows *to, const bf16 *const *rows, long count, const byte_weight *w) {
    to->count = count;
    pack_for(w, rows, count, to->rows);
}

INLINE void times_held(const held_rows *held, byte_column left, byte_column right) {
    times_packed_for(left, right, held->rows, held->count, held->sums);
}

/* Columns t and t + 1, if there is one. */
INLINE void times_two(const held_rows *held, const byte_weight *w, long t) {
    byte_column left = {w, t}, right = {t + 1 < whole_tiles(w->n) ? w : 0, t + 1};
    times_held(held, left, right);
}

static inline void byte_linear(const bf16 *x, long x_stride, byte_weight w, const bf16 *bias, bf16 *out, long out_stride, long rows,
                               int threads) {
    long tiles = whole_tiles(w.n), blocks = (rows + rows_together(w.k) - 1) / rows_together(w.k);
    product p = {x, x_stride, 0, bias, out, out_stride, rows, w.n, w.k};
    if (rows * w.n * w.k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const bf16 *at[BLOCK_ROWS];
        long low, high;
        held_rows held = memory_for(rows, w.k);
        my_part((tiles + 1) / 2, &low, &high);
        for (long i = 0; i < blocks && low < high; i++) {
            long first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
            for (long r = 0; r < count; r++) at[r] = x + (first + r) * x_stride;
            hold(&held, at, count, &w);
            for (long t = 2 * low; t < 2 * high && t < tiles; t += 2) {
                times_two(&held, &w, t);
                put_columns(&p, held.sums, first, count, t, t + 1 < tiles);
            }
        }
        tiles_end();
    }
}

/* gate_up is [experts][2][inner][hidden], down [experts][hidden][inner]. Scratch: act[pairs][inner in whole steps];
   sums[tokens][hidden in whole tiles]; order[pairs], start[experts + 1] behind it. */
static inline void byte_experts(const bf16 *x, byte_weight wide, byte_weight back, const int64_t *ids, const float *weights, bf16 *act,
                                float *sums, int *order, bf16 *out, long tokens, long top, long experts, int threads) {
    long inner = wide.n, hidden = wide.k;
    long columns = whole_tiles(hidden), width = whole_steps(inner) * STEP, most = rows_together(hidden > inner ? hidden : inner);
    int *start = order + tokens * top;
    pairs_by_expert(ids, tokens * top, experts, order, start);
    if (3 * tokens * top * inner * hidden < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const bf16 *at[BLOCK_ROWS];
        long low, high;
        held_rows held = memory_for(tokens * top, hidden > inner ? hidden : inner);
        my_part(whole_tiles(inner), &low, &high);
        for (long e = 0; e < experts; e++)
            for (long first = start[e]; first < start[e + 1] && low < high; first += held.count) {
                byte_weight gate = matrix_at(&wide, 2 * e), up = matrix_at(&wide, 2 * e + 1);
                long count = at_most(start[e + 1] - first, most);
                for (long r = 0; r < count; r++) at[r] = x + order[first + r] / top * hidden;
                hold(&held, at, count, &gate);
                for (long t = low; t < high; t++) {
                    byte_column left = {&gate, t}, right = {&up, t};
                    times_held(&held, left, right);
                    for (long r = 0; r < count; r++) {
                        const float *s = held.sums + r * COLUMNS;
                        write16(act + (first + r) * width + t * 16, _mm512_mul_ps(silu(_mm512_loadu_ps(s)), _mm512_loadu_ps(s + 16)));
                    }
                }
            }
#pragma omp barrier
        my_part((columns + 1) / 2, &low, &high);
        low *= 2, high = at_most(2 * high, columns);
        for (long t = 0; t < tokens; t++) memset(sums + (t * columns + low) * 16, 0, (high - low) * 64);
        for (long e = 0; e < experts; e++)
            for (long first = start[e]; first < start[e + 1] && low < high; first += held.count) {
                byte_weight w = matrix_at(&back, e);
                long count = at_most(start[e + 1] - first, most);
                for (long r = 0; r < count; r++) at[r] = act + (first + r) * width;
                hold(&held, at, count, &w);
                for (long t = low; t < high; t += 2) {
                    times_two(&held, &w, t);
                    for (long r = 0; r < count; r++) {
                        int pair = order[first + r];
                        __m512 weight = _mm512_set1_ps(weights[pair]);
                        for (long c = 0; c < 2 && t + c < columns; c++) {
                            float *sum = sums + (pair / top * columns + t + c) * 16;
                            _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_loadu_ps(held.sums + r * COLUMNS + c * 16), weight, _mm512_loadu_ps(sum)));
                        }
                    }
                }
            }
        for (long t = 0; t < tokens; t++)
            for (long c = low; c < high; c++)
                write_some(out + t * hidden + c * 16, first_lanes(hidden - c * 16), _mm512_loadu_ps(sums + (t * columns + c) * 16));
        tiles_end();
    }
}
#endif
