/* Products of a few bf16 rows with weights of 8 bits, a tile of 16 outputs at a time (many rows: amx_byte_products.h).

   A row becomes two signed digits of 8 bits each, 16 bits below its largest number, so that nothing is lost beside what the
   weights have lost: y = (256 * high . w + low . w) * scale. Weights lie 128 above their value; what that adds is known
   from the digits' sums. Up to 8 rows are one left operand, the high digits above the low ones.
   - One scale for an output: chains of byte products.
   - Groups of 32 inputs: sums of 32 products have a scale of their own, which the tile unit cannot apply between two steps
     of a chain. A few rows multiply bytes in vectors. */
#ifndef AGENTSPEED_AMX_INT8_H
#define AGENTSPEED_AMX_INT8_H
#include "amx_common.h"

#define DEEP 64        /* inputs in a tile */
#define BYTES 1024     /* in a tile */
#define MIDDLE 128     /* stored byte of weight 0 */
#define DIGIT_ROWS 8   /* rows of x in a left operand of digits */
#define LARGEST 32000.0f /* of a row, as a number of 16 bits */
#define GROUPED 32     /* inputs that share a scale, where an output has several */

typedef struct {
    const uint8_t *data;  /* [tiles of n][steps of k][16][16][4] */
    const float *scales;  /* [groups or 1][n in whole tiles] */
    long n, k, group, steps, columns;
} byte_weight;

INLINE byte_weight byte_weight_of(const uint8_t *data, const float *scales, long n, long k, long group) {
    byte_weight w = {data, scales, n, k, group, (k + DEEP - 1) / DEEP, whole_tiles(n)};
    return w;
}
INLINE long groups_of(const byte_weight *w) { return w->group ? w->steps * DEEP / GROUPED : 1; }
INLINE long weight_bytes(const byte_weight *w) { return w->columns * w->steps * BYTES; }
INLINE long weight_scales(const byte_weight *w) { return groups_of(w) * w->columns * 16; }

/* 8 rows as digits: [steps][16 rows][64], then a scale for each row, then the sums of each digit row, by group. */
INLINE long digit_bytes(long steps, long groups) { return steps * BYTES + 64 + groups * 64; }
/* 16 rows: twice as much. */
INLINE long block_bytes(long steps, long groups) { return 2 * digit_bytes(steps, groups); }

INLINE void split_row(const bf16 *x, long k, long steps, long groups, char *block, long r) {
    int8_t *high = (int8_t *)block + r * 64, *low = high + DIGIT_ROWS * 64;
    float *scales = (float *)(block + steps * BYTES);
    int32_t *sums = (int32_t *)(scales + 16);
    __m512 most = _mm512_setzero_ps(), nothing = most;
    for (long i = 0; i < k; i += 16) {
        __m512 v = read_some(x + i, first_lanes(k - i));
        most = _mm512_max_ps(most, _mm512_abs_ps(v)), nothing = _mm512_fmadd_ps(v, _mm512_setzero_ps(), nothing);
    }
    float peak = _mm512_reduce_max_ps(most), by = peak > 0 ? LARGEST / peak : 0;
    /* A number that is not finite makes its row none: 0 times it is no number. */
    scales[r] = peak / LARGEST + _mm512_reduce_add_ps(nothing);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
    for (long s = 0; s < 2 * steps; s++) {
        for (int half = 0; half < 2; half++) {
            long at = s * GROUPED + half * 16;
            __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(read_some(x + at, first_lanes(k - at)), _mm512_set1_ps(by)));
            __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
            __m512i l = _mm512_sub_epi32(v, _mm512_slli_epi32(h, 8));
            long to = s / 2 * BYTES + s % 2 * GROUPED + half * 16;
            _mm_storeu_si128((__m128i *)(high + to), _mm512_cvtepi32_epi8(h));
            _mm_storeu_si128((__m128i *)(low + to), _mm512_cvtepi32_epi8(l));
            high_sum = _mm512_add_epi32(high_sum, h), low_sum = _mm512_add_epi32(low_sum, l);
        }
        if (groups > 1 || s == 2 * steps - 1) {
            long g = groups > 1 ? s : 0;
            sums[g * 16 + r] = _mm512_reduce_add_epi32(high_sum), sums[g * 16 + DIGIT_ROWS + r] = _mm512_reduce_add_epi32(low_sum);
            high_sum = low_sum = _mm512_setzero_si512();
        }
    }
}

/* `count` <= 16 rows as the left operand. */
INLINE void prepare(const bf16 *const *rows, long count, const byte_weight *w, char *block) {
    long groups = groups_of(w);
    for (long r = 0; r < count; r++)
        split_row(rows[r], w->k, w->steps, groups, block + r / DIGIT_ROWS * digit_bytes(w->steps, groups), r % DIGIT_ROWS);
}

INLINE void fetch_bytes(const uint8_t *w) {
    for (int z = 0; z < 16; z++) NEAR((const char *)w + z * 64 + 6144);
}

INLINE __m512 joined(__m512i high, __m512i low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
}

/* to[rows][16] of up to 8 rows: one chain. */
INLINE void chain_bytes(const char *block, const uint8_t *data, const byte_weight *w, long t, long rows, float *to) {
    int32_t made[SUMS] __attribute__((aligned(64)));
    const float *scales = (const float *)(block + w->steps * BYTES);
    const int32_t *sums = (const int32_t *)(scales + 16);
    TILE_ZERO(0);
    for (long s = 0; s < w->steps; s++) {
        fetch_bytes(data + s * BYTES);
        TILE_LOAD(1, block + s * BYTES, 64);
        TILE_LOAD(2, data + s * BYTES, 64);
        TILE_DOT_BYTES(0, 1, 2);
    }
    TILE_STORE(0, made, 64);
    __m512 by = _mm512_loadu_ps(w->scales + t * 16);
    for (long r = 0; r < rows; r++) {
        __m512i high = _mm512_sub_epi32(_mm512_load_si512(made + r * 16), _mm512_set1_epi32(MIDDLE * sums[r]));
        __m512i low = _mm512_sub_epi32(_mm512_load_si512(made + (DIGIT_ROWS + r) * 16), _mm512_set1_epi32(MIDDLE * sums[DIGIT_ROWS + r]));
        _mm512_store_ps(to + r * 16, _mm512_mul_ps(joined(high, low), _mm512_mul_ps(by, _mm512_set1_ps(scales[r]))));
    }
}

/* The same with groups, for `count` (a constant) rows from `first`. */
INLINE void vector_bytes(const char *block, const uint8_t *data, const byte_weight *w, long t, long first, float *to, const int count) {
    const float *scales = (const float *)(block + w->steps * BYTES);
    const int32_t *sums = (const int32_t *)(scales + 16);
    __m512 sum[4];
    for (int r = 0; r < count; r++) sum[r] = _mm512_setzero_ps();
    for (long g = 0; g < 2 * w->steps; g++) {
        const int32_t *digits = (const int32_t *)(block + g / 2 * BYTES + first * 64) + g % 2 * 8;
        const uint8_t *bytes = data + g * (BYTES / 2);
        __m512i high[4], low[4];
        for (int r = 0; r < count; r++) {
            high[r] = _mm512_set1_epi32(-MIDDLE * sums[g * 16 + first + r]);
            low[r] = _mm512_set1_epi32(-MIDDLE * sums[g * 16 + DIGIT_ROWS + first + r]);
        }
        for (int i = 0; i < 8; i++) {
            NEAR((const char *)bytes + i * 64 + 6144);
            __m512i v = _mm512_loadu_si512(bytes + i * 64);
            for (int r = 0; r < count; r++) {
                high[r] = _mm512_dpbusd_epi32(high[r], v, _mm512_set1_epi32(digits[r * 16 + i]));
                low[r] = _mm512_dpbusd_epi32(low[r], v, _mm512_set1_epi32(digits[(DIGIT_ROWS + r) * 16 + i]));
            }
        }
        __m512 by = _mm512_loadu_ps(w->scales + g * w->columns * 16 + t * 16);
        for (int r = 0; r < count; r++) sum[r] = _mm512_fmadd_ps(joined(high[r], low[r]), by, sum[r]);
    }
    for (int r = 0; r < count; r++) _mm512_store_ps(to + (first + r) * 16, _mm512_mul_ps(sum[r], _mm512_set1_ps(scales[first + r])));
}

/* to[rows][16] of up to 16 prepared rows. */
INLINE void times(const char *block, const byte_weight *w, const uint8_t *data, long t, long rows, float *to) {
    for (long half = 0; half * DIGIT_ROWS < rows; half++) {
        const char *from = block + half * digit_bytes(w->steps, groups_of(w));
        float *into = to + half * DIGIT_ROWS * 16;
        long count = at_most(rows - half * DIGIT_ROWS, DIGIT_ROWS), r = 0;
        if (!w->group) {
            chain_bytes(from, data, w, t, count, into);
            continue;
        }
        for (; r + 4 <= count; r += 4) vector_bytes(from, data, w, t, r, into, 4);
        if (count - r >= 2) vector_bytes(from, data, w, t, r, into, 2), r += 2;
        if (count - r == 1) vector_bytes(from, data, w, t, r, into, 1);
    }
}
#endif
