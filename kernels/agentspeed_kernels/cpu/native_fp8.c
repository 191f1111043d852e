/* Products of a few rows with weights in fp8 e4m3: bytes become floats in registers, so that half of bf16 is read.

   A weight is [outputs][inputs], as its checkpoint has it; scales are [blocks of 128 outputs][blocks of 128 inputs]. */
#include "native_bytes.h"
#include "native_e4m3.h"

#define BLOCK 128
#define TOGETHER 4 /* outputs whose rows are read side by side */

#if REGISTERS >= 32
#define AT_ONCE 4 /* rows of x whose sums are in registers */
#else
#define AT_ONCE 1
#endif

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
