/* Products and feed-forwards of many bf16 rows with weights in fp8 e4m3, [outputs][inputs] with a scale for each block of
   128 x 128.

   16 outputs of a block become tiles of bf16, which holds every number of e4m3, and meet all rows; their sums get the
   block's scale. So nothing is rounded that the bytes do not round, and a byte is taken back once for up to BLOCK_ROWS
   rows. No byte is "not a number" here: the scale of its block is none. */
#include "amx_common.h"

#define BLOCK 128
#define BLOCK_STEPS (BLOCK / STEP)
#define BLOCK_ROWS 256
#define BYTES 64 /* of an output that are taken back together */

typedef struct {
    const uint8_t *data;
    const float *scales;
    long n, k, blocks; /* of inputs */
} fp8_weight;

INLINE long blocks_of(long extent) { return (extent + BLOCK - 1) / BLOCK; }
INLINE fp8_weight fp8_weight_of(const uint8_t *data, const float *scales, long n, long k) {
    fp8_weight w = {data, scales, n, k, blocks_of(k)};
    return w;
}
INLINE fp8_weight matrix_at(const fp8_weight *first, long index) {
    fp8_weight w = *first;
    w.data += index * w.n * w.k, w.scales += index * blocks_of(w.n) * w.blocks;
    return w;
}

/* Bytes of e4m3 as bf16: those of the lower half of every 16 bytes, and those of the upper half.

   The exponent is 120 more there, so the upper byte of a number follows from four bits and the lower one from the other
   four; but for the numbers below the smallest normal one, of which there are few. */
INLINE void to_numbers(__m512i bytes, __m512i *low, __m512i *high) {
    const __m512i lowest = _mm512_set1_epi8(15);
    const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi8(60, 61, 62, 63, 64, 65, 66, 67, -68, -67, -66, -65, -64, -63, -62, -61));
    const __m512i lower = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 16, 32, 48, 64, 80, 96, 112, -128, -112, -96, -80, -64, -48, -32, -16));
    __m512i above = _mm512_shuffle_epi8(upper, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), lowest));
    __m512i below = _mm512_shuffle_epi8(lower, _mm512_and_si512(bytes, lowest));
    *low = _mm512_unpacklo_epi8(below, above), *high = _mm512_unpackhi_epi8(below, above);
    if (__builtin_expect(_mm512_testn_epi8_mask(bytes, _mm512_set1_epi8(0x78)) != 0, 0)) {
        const __m512i small = _mm512_castsi256_si512(_mm256_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0));
        const __m512i sign = _mm512_set1_epi16((short)0x8000), nothing = _mm512_setzero_si512();
        for (int side = 0; side < 2; side++) {
            __m512i word = side ? _mm512_unpackhi_epi8(bytes, nothing) : _mm512_unpacklo_epi8(bytes, nothing), *made = side ? high : low;
            __m512i number = _mm512_or_si512(_mm512_permutexvar_epi16(_mm512_and_si512(word, _mm512_set1_epi16(7)), small), _mm512_and_si512(*made, sign));
            *made = _mm512_mask_mov_epi16(*made, _mm512_testn_epi16_mask(word, _mm512_set1_epi16(0x78)), number);
        }
    }
}

/* 16 outputs and up to BLOCK inputs from `at` on as tiles, and how many those are; of the outputs `n` exist, of the inputs
   `k`. */
INLINE long block_tiles(const uint8_t *at, long stride, long n, long k, bf16 *to) {
    /* Of 4 outputs with 4 inputs each: two inputs of every output first. */
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    k = at_most(k, BLOCK);
    for (long from = 0; from < k; from += BYTES) {
        __mmask64 there = k - from >= BYTES ? ~0ull : (1ull << (k - from)) - 1;
        __m512i rows[16];
        for (int o = 0; o < 16; o++) {
            rows[o] = o < n ? _mm512_maskz_loadu_epi8(there, at + o * stride + from) : _mm512_setzero_si512();
            FAR(at + (16 + o) * stride + from);
        }
        transpose16(rows); /* row i has inputs 4i to 4i + 3 of every output */
        for (int i = 0; i < 16; i++) {
            bf16 *row = to + (from / STEP + i / 8) * TILE + i % 8 * 2 * STEP;
            __m512i even, odd;
            to_numbers(_mm512_shuffle_epi8(rows[i], pairs), &even, &odd);
            _mm512_store_si512(row, even), _mm512_store_si512(row + STEP, odd);
        }
    }
    return whole_steps(k);
}

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
static void times(const fp8_weight *w, long t, const bf16 *held, long rows, float *to) {
    bf16 tiles[BLOCK_STEPS * TILE] __attribute__((aligned(64)));
    const float *scales = w->scales + t * 16 / BLOCK * w->blocks;
    for (long b = 0; b < w->blocks; b++) {
        long steps = block_tiles(w->data + t * 16 * w->k + b * BLOCK, w->k, w->n - t * 16, w->k - b * BLOCK, tiles);
        __m512 by = _mm512_set1_ps(scales[b]);
        for (long i = 0; i < rows; i += 16)
            add_block(held + (i / 16 * whole_steps(w->k) + b * BLOCK_STEPS) * TILE, tiles, steps, by, to + i * 16,
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

EXPORT void NAME(linear_fp8)(const bf16 *x, long x_stride, const uint8_t *data, const float *scales, const bf16 *bias, bf16 *out,
                             long out_stride, long rows, long n, long k, int threads) {
    fp8_weight w = fp8_weight_of(data, scales, n, k);
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

/* gate_up is [experts][2][inner][hidden], down [experts][hidden][inner]. Scratch: act[pairs][inner in whole steps], of which
   half is used; sums[tokens][hidden in whole tiles]; order[pairs], start[experts + 1] behind it. */
EXPORT void NAME(experts_fp8)(const bf16 *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                              const float *down_scales, const int64_t *ids, const float *weights, bf16 *act, float *sums,
                              int *order, bf16 *out, long tokens, long top, long experts, long inner, long hidden,
                              int threads) {
    fp8_weight wide = fp8_weight_of(gate_up, gate_up_scales, inner, hidden), back = fp8_weight_of(down, down_scales, hidden, inner);
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
                fp8_weight gate = matrix_at(&wide, 2 * e), up = matrix_at(&wide, 2 * e + 1);
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
                fp8_weight w = matrix_at(&back, e);
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
