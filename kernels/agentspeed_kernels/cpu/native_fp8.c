/* Products of a few rows with weights in fp8 e4m3: bytes become floats in registers, so that half of bf16 is read.

   A weight is [outputs][inputs], as its checkpoint has it; scales are [blocks of 128 outputs][blocks of 128 inputs]. Where
   a form converts half precision in hardware, a byte moved into the places of such a number is 2^-8 of what it stands for,
   the smallest ones included; elsewhere it is 2^-120 of it as a float. No byte is "not a number" here: the scale of its
   block is none. */
#include "native_bytes.h"

#define BLOCK 128
#define TOGETHER 4 /* outputs whose rows are read side by side */

#if defined(__AVX512F__) || defined(__AVX2__)
#define FACTOR 256.0f
#else
#define FACTOR 0x1p120f
#endif
#if REGISTERS >= 32
#define AT_ONCE 4 /* rows of x whose sums are in registers */
#else
#define AT_ONCE 1
#endif
#define DEEP (2 * WIDE) /* inputs of an output that become floats together */

INLINE byte_weight byte_weight_of(const uint8_t *data, const float *scales, long n, long k, long group) {
    byte_weight w = {data, scales, n, k, group, (n + LANES - 1) / LANES, (k + DEEP - 1) / DEEP * DEEP};
    return w;
}
INLINE long blocks_of(long extent) { return (extent + BLOCK - 1) / BLOCK; }
INLINE byte_weight matrix_at(const byte_weight *first, long index) {
    byte_weight w = *first;
    w.data += index * w.n * w.k, w.scales += index * blocks_of(w.n) * blocks_of(w.k);
    return w;
}

/* DEEP bytes by 1 / FACTOR. */
INLINE void to_floats(const uint8_t *at, wide *low, wide *high) {
#if defined(__AVX512F__)
    __m512i v = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)at)), 7);
    v = _mm512_and_si512(v, _mm512_set1_epi16((short)0xbf80));
    *low = (vec)_mm512_cvtph_ps(_mm512_castsi512_si256(v)), *high = (vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
#elif defined(__AVX2__)
    __m256i v = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at)), 7);
    v = _mm256_and_si256(v, _mm256_set1_epi16((short)0xbf80));
    *low = (narrow)_mm256_cvtph_ps(_mm256_castsi256_si128(v)), *high = (narrow)_mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
#else
    typedef int8_t bytes __attribute__((vector_size(WIDE), aligned(1), may_alias));
    wide_ints a = __builtin_convertvector(*(const bytes *)at, wide_ints) << 20;
    wide_ints b = __builtin_convertvector(*(const bytes *)(at + WIDE), wide_ints) << 20;
    *low = (wide)(a & (int32_t)0x87f00000), *high = (wide)(b & (int32_t)0x87f00000);
#endif
}

INLINE float sum_of(wide v) {
#if REGISTERS >= 32
    return total(v);
#else
    return narrow_total(v);
#endif
}

/* DEEP inputs from k on, of `count` (a constant) rows. */
INLINE void deep_step(const uint8_t *const *rows, const float *const *x, long k, float scale, const int count,
                      wide (*sum)[TOGETHER]) {
    for (int o = 0; o < TOGETHER; o++) {
        wide low, high;
        to_floats(rows[o], &low, &high);
        if (count > 1) low *= scale, high *= scale;
        for (int r = 0; r < count; r++) sum[r][o] += low * *(const wide *)(x[r] + k), sum[r][o] += high * *(const wide *)(x[r] + k + WIDE);
    }
}

/* to[count][TOGETHER] of neighbouring outputs, whose rows of the weight begin at `rows`; `scales` are of their block. */
INLINE void some_rows(const byte_weight *w, const uint8_t *const *rows, const float *scales, long ahead, const float *const *x,
                      const int count, float (*to)[TOGETHER]) {
    wide all[AT_ONCE][TOGETHER], sum[AT_ONCE][TOGETHER];
    for (int r = 0; r < count; r++)
        for (int o = 0; o < TOGETHER; o++) all[r][o] = sum[r][o] = (wide){0};
    long whole = w->k / DEEP * DEEP;
    for (long from = 0; from < w->k; from += BLOCK) {
        float scale = scales[from / BLOCK] * FACTOR;
        long end = from + BLOCK < whole ? from + BLOCK : whole, k = from;
        for (; k < end; k += DEEP) {
            const uint8_t *at[TOGETHER];
            for (int o = 0; o < TOGETHER; o++) {
                at[o] = rows[o] + k;
                if (k % 64 == 0 || DEEP >= 64) __builtin_prefetch(at[o] + ahead, 0, 3);
            }
            deep_step(at, x, k, scale, count, sum);
        }
        if (k < w->k && k < from + BLOCK) { /* the end of a row, which may be that of memory */
            uint8_t ends[TOGETHER][DEEP] = {{0}};
            const uint8_t *at[TOGETHER];
            for (int o = 0; o < TOGETHER; o++) memcpy(ends[o], rows[o] + k, w->k - k), at[o] = ends[o];
            deep_step(at, x, k, scale, count, sum);
        }
        if (count == 1)
            for (int o = 0; o < TOGETHER; o++) all[0][o] += sum[0][o] * scale, sum[0][o] = (wide){0};
    }
    for (int r = 0; r < count; r++)
        for (int o = 0; o < TOGETHER; o++) to[r][o] = sum_of(count == 1 ? all[r][o] : sum[r][o]);
}

INLINE void times(const byte_weight *w, long t, const float *const *x, long rows, float (*to)[LANES]) {
    const float *scales = w->scales + t * LANES / BLOCK * blocks_of(w->k);
    for (int first = 0; first < LANES; first += TOGETHER) {
        const uint8_t *at[TOGETHER];
        float made[MOST_ROWS][TOGETHER];
        for (int o = 0; o < TOGETHER; o++) {
            long output = t * LANES + first + o;
            at[o] = w->data + (output < w->n ? output : w->n - 1) * w->k;
        }
        long r = 0, ahead = TOGETHER * w->k;
#if AT_ONCE > 1
        for (; r + 4 <= rows; r += 4) some_rows(w, at, scales, ahead, x + r, 4, made + r);
        for (; r + 2 <= rows; r += 2) some_rows(w, at, scales, ahead, x + r, 2, made + r);
#endif
        for (; r < rows; r++) some_rows(w, at, scales, ahead, x + r, 1, made + r);
        for (r = 0; r < rows; r++) memcpy(to[r] + first, made[r], sizeof made[r]);
    }
}

EXPORT void NAME(linear_fp8)(const num *x, long x_stride, const uint8_t *data, const float *scales, const num *bias, num *out,
                             long out_stride, long rows, long n, long k, int threads) {
    byte_linear(x, x_stride, byte_weight_of(data, scales, n, k, 0), bias, out, out_stride, rows, threads);
}

/* Scratch as in byte_experts. */
EXPORT void NAME(experts_fp8)(const num *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                              const float *down_scales, const int64_t *ids, const float *weights, float *act, float *sums,
                              int *order, num *out, long tokens, long top, long experts, long inner, long hidden,
                              int threads) {
    byte_experts(x, byte_weight_of(gate_up, gate_up_scales, inner, hidden, 0), byte_weight_of(down, down_scales, hidden, inner, 0),
                 ids, weights, act, sums, order, out, tokens, top, experts, threads);
}
