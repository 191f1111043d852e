/* Products and feed-forwards of many bf16 rows with weights of 8 bits, whatever the bytes stand for.

   16 outputs of some inputs become tiles of bf16, which holds every byte, and meet all rows; their sums get the scales. So
   nothing is rounded that the bytes do not round, and a byte is taken back once for up to BLOCK_ROWS rows. */
#ifndef AGENTSPEED_AMX_BYTES_H
#define AGENTSPEED_AMX_BYTES_H
#include "amx_byte_columns.h"
#ifdef VECTOR_TILES
#include "vector_bytes.h"
#endif

/* to[rows][COLUMNS] = (more ? to : 0) + by * rows of x, which are tiles themselves, times `steps` tiles. */
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
        _mm512_store_ps(to + r * COLUMNS, more ? _mm512_fmadd_ps(sum, by, _mm512_load_ps(to + r * COLUMNS)) : _mm512_mul_ps(sum, by));
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
        __m512 before = more ? _mm512_load_ps(to + r * COLUMNS) : _mm512_setzero_ps();
        _mm512_store_ps(to + r * COLUMNS, _mm512_fmadd_ps(_mm512_load_ps(sums + r * 16), by, before));
    }
}
#endif

/* to[rows][COLUMNS], 16 of them: a column times `rows` held rows, [rows of 16][steps][16][32]. */
static void times(byte_column c, const bf16 *held, long rows, float *to) {
    bf16 tiles[(BLOCK + DEEP) / STEP * TILE] __attribute__((aligned(64)));
    uint8_t turned[DEEP * 16] __attribute__((aligned(64)));
    const byte_weight *w = c.of;
    const long deep = at_most(w->block, BLOCK);
    for (long from = 0; from < w->k; from += deep) {
        long steps = steps_from(w, from, deep);
        for (long i = 0; i < steps; i += DEEP / STEP) {
            const uint8_t *quads = quads_at(w, c.t, from + i * STEP, turned);
            bf16 *to = tiles + i * TILE;
#ifdef WHOLE_BLOCKS /* many constants: in one piece they stay in registers */
#pragma GCC unroll 16
            for (long q = 0; q < DEEP / 4; q++) to_pairs(quads + q * 64, to + q * 2 * STEP);
#else
            for (long q = 0; q < at_most(steps - i, DEEP / STEP) * 8; q++) to_pairs(quads + q * 64, to + q * 2 * STEP);
#endif
        }
        __m512 by = block_scales(w, c.t, from / w->block);
        for (long i = 0; i < rows; i += 16)
            add_block(held + (i / 16 * whole_steps(w->k) + from / STEP) * TILE, tiles, steps, by, to + i * COLUMNS, at_most(rows - i, 16), from > 0);
    }
}

/* Rows of one product or expert, as its kernel wants them, and what comes out: sums[rows][COLUMNS] of two columns. */
typedef struct {
    bf16 *rows;
    float *sums;
    long count;
    int panels; /* not tiles */
} held_rows;

INLINE held_rows memory_for(long rows, long k) {
    rows = at_most(rows, BLOCK_ROWS);
    size_t bytes = ((rows + 15) / 16 * 16 + 2) * whole_steps(k) * STEP * sizeof(bf16);
    char *memory = agentspeed_scratch(FOR_ROWS, bytes + rows * COLUMNS * sizeof(float));
    held_rows held = {(bf16 *)memory, (float *)(memory + bytes), 0, 0};
    return held;
}

/* `count` rows of k numbers, zeros behind these. */
INLINE void hold(held_rows *to, const bf16 *const *rows, long count, const byte_weight *w) {
    long steps = whole_steps(w->k);
    to->count = count;
#ifdef VECTOR_TILES
    to->panels = worth_panels(w, count);
    if (to->panels) {
        pack_parts(rows, count, w->k, to->rows);
        return;
    }
#endif
    for (long r = 0; r < count; r++) {
        bf16 *at = to->rows + (r / 16 * steps * 16 + r % 16) * STEP;
        for (long s = 0; s < steps; s++)
            _mm512_store_si512(at + s * TILE, _mm512_maskz_loadu_epi16(first_halves(w->k - s * STEP), rows[r] + s * STEP));
    }
    tiles_begin(count % 16);
}

INLINE void times_held(const held_rows *held, byte_column left, byte_column right) {
#ifdef VECTOR_TILES
    if (held->panels) {
        times_columns(left, right, held->rows, held->count, held->sums);
        return;
    }
#endif
    times(left, held->rows, held->count, held->sums);
    if (right.of) times(right, held->rows, held->count, held->sums + 16);
}

/* Columns t and t + 1, if there is one. */
INLINE void times_two(const held_rows *held, const byte_weight *w, long t) {
    byte_column left = {w, t}, right = {t + 1 < whole_tiles(w->n) ? w : 0, t + 1};
    times_held(held, left, right);
}

static inline void byte_linear(const bf16 *x, long x_stride, byte_weight w, const bf16 *bias, bf16 *out, long out_stride, long rows,
                               int threads) {
    long tiles = whole_tiles(w.n), blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
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
    long columns = whole_tiles(hidden), width = whole_steps(inner) * STEP;
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
                long count = at_most(start[e + 1] - first, BLOCK_ROWS);
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
                long count = at_most(start[e + 1] - first, BLOCK_ROWS);
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
