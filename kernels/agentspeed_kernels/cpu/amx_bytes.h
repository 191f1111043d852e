/* Products and feed-forwards of many bf16 rows with weights of 8 bits, whatever the bytes stand for.

   16 outputs of some inputs become tiles of bf16, which holds every byte, and meet all rows; their sums get the scales. So
   nothing is rounded that the bytes do not round, and a byte is taken back once for up to BLOCK_ROWS rows. A source says how
   bytes become tiles (the functions that are declared here). */
#ifndef AGENTSPEED_AMX_BYTES_H
#define AGENTSPEED_AMX_BYTES_H
#include "amx_common.h"

#define BLOCK 128 /* most inputs that are taken back together */
#define BLOCK_ROWS 256

typedef struct {
    const uint8_t *data;
    const float *scales;
    long n, k, group;
    long block; /* inputs that share their scales, or as many as are taken back together: whole steps */
} byte_weight;

/* Of matrices that are stacked. */
INLINE byte_weight matrix_at(const byte_weight *first, long index);
/* Tile t of the outputs, block b of the inputs, as tiles; gives how many. */
INLINE long block_tiles(const byte_weight *w, long t, long b, bf16 *to);
/* Of 16 outputs. */
INLINE __m512 block_scales(const byte_weight *w, long t, long b);

/* to[rows][16] = (more ? to : 0) + by * rows of x, which are tiles themselves, times `steps` tiles. */
#ifdef VECTOR_TILES
INLINE void add_pairs(__m512 *sums, const bf16 *x, const bf16 *w, const int rows) {
    __m512bh right = (__m512bh)_mm512_load_si512(w);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        int pair;
        memcpy(&pair, x + r * STEP, sizeof pair);
        sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_set1_epi32(pair), right);
    }
}

/* `rows` is a constant: the sums of a block never leave their registers. Those of few rows, which wait for the latency of
   the instruction, are of even and of odd steps. */
INLINE void rows_by_block(const bf16 *x, const bf16 *w, long steps, __m512 by, float *to, const int rows, int more) {
    __m512 s[2][16];
    const int sets = rows <= 8 ? 2 : 1;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) s[0][r] = s[1][r] = _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, x += TILE, w += TILE)
        for (int k = 0; k < 16; k += 2)
            add_pairs(s[0], x + 2 * k, w + k * STEP, rows), add_pairs(s[sets - 1], x + 2 * k + 2, w + (k + 1) * STEP, rows);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512 sum = sets > 1 ? _mm512_add_ps(s[0][r], s[1][r]) : s[0][r];
        _mm512_store_ps(to + r * 16, more ? _mm512_fmadd_ps(sum, by, _mm512_load_ps(to + r * 16)) : _mm512_mul_ps(sum, by));
    }
}

static void add_block(const bf16 *x, const bf16 *w, long steps, __m512 by, float *to, long rows, int more) {
    switch (rows) {
#define ROWS(n) case n: rows_by_block(x, w, steps, by, to, n, more); break
    ROWS(1); ROWS(2); ROWS(3); ROWS(4); ROWS(5); ROWS(6); ROWS(7); ROWS(8);
    ROWS(9); ROWS(10); ROWS(11); ROWS(12); ROWS(13); ROWS(14); ROWS(15);
#undef ROWS
    default: rows_by_block(x, w, steps, by, to, 16, more);
    }
}
#else
INLINE void add_block(const bf16 *x, const bf16 *w, long steps, __m512 by, float *to, long rows, int more) {
    float sums[SUMS] __attribute__((aligned(64)));
#define BODY(sum, left)                    \
    TILE_ZERO(sum);                        \
    for (long s = 0; s < steps; s++) {     \
        TILE_LOAD(left, x + s * TILE, 64); \
        TILE_LOAD(2, w + s * TILE, 64);    \
        TILE_DOT(sum, left, 2);            \
    }                                      \
    TILE_STORE(sum, sums, 64);
    if (rows == 16) {
        BODY(0, 1)
    } else {
        BODY(3, 4)
    }
#undef BODY
    for (long r = 0; r < rows; r++) {
        __m512 before = more ? _mm512_load_ps(to + r * 16) : _mm512_setzero_ps();
        _mm512_store_ps(to + r * 16, _mm512_fmadd_ps(_mm512_load_ps(sums + r * 16), by, before));
    }
}
#endif

/* to[rows][16]: tile t of the outputs of `rows` <= BLOCK_ROWS held rows. The caller has called tiles_begin(rows % 16). */
static void times(const byte_weight *w, long t, const bf16 *held, long rows, float *to) {
    bf16 tiles[BLOCK / STEP * TILE] __attribute__((aligned(64)));
    for (long b = 0; b * w->block < w->k; b++) {
        long steps = block_tiles(w, t, b, tiles);
        __m512 by = block_scales(w, t, b);
        for (long i = 0; i < rows; i += 16)
            add_block(held + (i / 16 * whole_steps(w->k) + b * w->block / STEP) * TILE, tiles, steps, by, to + i * 16,
                      at_most(rows - i, 16), b > 0);
    }
}

/* Row r as the r-th of [rows of 16][steps][16][32], zeros behind its k. */
INLINE void hold_row(const bf16 *row, long k, long r, bf16 *held) {
    long steps = whole_steps(k);
    bf16 *at = held + (r / 16 * steps * 16 + r % 16) * STEP;
    for (long s = 0; s < steps; s++)
        _mm512_store_si512(at + s * TILE, _mm512_maskz_loadu_epi16(first_halves(k - s * STEP), row + s * STEP));
}
INLINE bf16 *memory_for(long k) { return agentspeed_scratch(FOR_ROWS, BLOCK_ROWS * whole_steps(k) * STEP * sizeof(bf16)); }

static inline void byte_linear(const bf16 *x, long x_stride, byte_weight w, const bf16 *bias, bf16 *out, long out_stride, long rows,
                               int threads) {
    long n = w.n, k = w.k;
    if (rows * n * k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float made[BLOCK_ROWS * 16] __attribute__((aligned(64)));
        long low, high;
        bf16 *held = memory_for(k);
        my_part(whole_tiles(n), &low, &high);
        for (long first = 0; first < rows && low < high; first += BLOCK_ROWS) {
            long count = at_most(rows - first, BLOCK_ROWS);
            for (long r = 0; r < count; r++) hold_row(x + (first + r) * x_stride, k, r, held);
            tiles_begin(count % 16);
            for (long t = low; t < high; t++) {
                __mmask16 lanes = first_lanes(n - t * 16);
                __m512 add = bias ? read_some(bias + t * 16, lanes) : _mm512_setzero_ps();
                times(&w, t, held, count, made);
                for (long r = 0; r < count; r++)
                    write_some(out + (first + r) * out_stride + t * 16, lanes, _mm512_add_ps(_mm512_load_ps(made + r * 16), add));
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
    long columns = whole_tiles(hidden), width = whole_steps(inner) * STEP;
    int *start = order + tokens * top;
    pairs_by_expert(ids, tokens * top, experts, order, start);
    if (3 * tokens * top * inner * hidden < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float made[2][BLOCK_ROWS * 16] __attribute__((aligned(64)));
        long low, high;
        bf16 *held = memory_for(hidden > inner ? hidden : inner);
        my_part(whole_tiles(inner), &low, &high);
        for (long e = 0; e < experts; e++)
            for (long first = start[e]; first < start[e + 1] && low < high; first += BLOCK_ROWS) {
                byte_weight gate = matrix_at(&wide, 2 * e), up = matrix_at(&wide, 2 * e + 1);
                long count = at_most(start[e + 1] - first, BLOCK_ROWS);
                for (long r = 0; r < count; r++) hold_row(x + order[first + r] / top * hidden, hidden, r, held);
                tiles_begin(count % 16);
                for (long t = low; t < high; t++) {
                    times(&gate, t, held, count, made[0]), times(&up, t, held, count, made[1]);
                    for (long r = 0; r < count; r++)
                        write16(act + (first + r) * width + t * 16,
                                _mm512_mul_ps(silu(_mm512_load_ps(made[0] + r * 16)), _mm512_load_ps(made[1] + r * 16)));
                }
            }
#pragma omp barrier
        my_part(columns, &low, &high);
        for (long t = 0; t < tokens; t++) memset(sums + (t * columns + low) * 16, 0, (high - low) * 64);
        for (long e = 0; e < experts; e++)
            for (long first = start[e]; first < start[e + 1] && low < high; first += BLOCK_ROWS) {
                byte_weight w = matrix_at(&back, e);
                long count = at_most(start[e + 1] - first, BLOCK_ROWS);
                for (long r = 0; r < count; r++) hold_row(act + (first + r) * width, inner, r, held);
                tiles_begin(count % 16);
                for (long t = low; t < high; t++) {
                    times(&w, t, held, count, made[0]);
                    for (long r = 0; r < count; r++) {
                        int pair = order[first + r];
                        float *sum = sums + (pair / top * columns + t) * 16;
                        _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(made[0] + r * 16), _mm512_set1_ps(weights[pair]), _mm512_loadu_ps(sum)));
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
