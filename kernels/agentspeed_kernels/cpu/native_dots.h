/* Sums over rows of a weight, for rows of floats: weights become floats in registers, in the order that they lie in.

   A weight's numbers are those of the kind, or bf16 for rows of float where WEIGHTS16 is defined: such a weight has the
   sums, bit for bit, of the same numbers kept as floats. So the ends of rows name their fused operations: left to the
   compiler, they are fused for one and not for the other. */
#ifndef AGENTSPEED_NATIVE_DOTS_H
#define AGENTSPEED_NATIVE_DOTS_H
#include "native_common.h"

#ifdef WEIGHTS16
typedef bf16 wnum;
INLINE vec weight_vec(const wnum *at) { return bf16_vec(at); }
INLINE float weight_one(wnum x) { return of_half(x); }
#else
typedef num wnum;
INLINE vec weight_vec(const wnum *at) { return read_vec(at); }
INLINE float weight_one(wnum x) { return read_one(x); }
#endif

INLINE float dot(const wnum *a, const float *b, long n) {
    vec first = splat(0), second = splat(0);
    long k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        first += weight_vec(a + k) * load(b + k);
        second += weight_vec(a + k + LANES) * load(b + k + LANES);
    }
    for (; k + LANES <= n; k += LANES) first += weight_vec(a + k) * load(b + k);
    float sum = total(first + second);
    for (; k < n; k++) sum = fmaf(weight_one(a[k]), b[k], sum);
    return sum;
}

/* out[t][r] = x[t] . w[r] for 4 weight rows and `count` (a constant) tokens: each weight is loaded once. */
INLINE void dots4(const wnum *w, long w_stride, const float *const *x, int count, long n, float out[][4]) {
    vec acc[4][4];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < count; t++) acc[r][t] = splat(0);
    long k = 0;
    for (; k + LANES <= n; k += LANES) {
        vec rows[4];
        for (int r = 0; r < 4; r++) rows[r] = weight_vec(w + r * w_stride + k);
#ifdef WEIGHTS16
        /* The rows that follow: half as long in bytes, these are streams too short for the hardware to run ahead on. */
        if (k % 32 == 0)
            for (int r = 4; r < 8; r++) __builtin_prefetch(w + r * w_stride + k, 0, 3);
#endif
        for (int t = 0; t < count; t++) {
            vec v = load(x[t] + k);
            for (int r = 0; r < 4; r++) acc[r][t] += rows[r] * v;
        }
    }
    for (int t = 0; t < count; t++)
        for (int r = 0; r < 4; r++) {
            float sum = total(acc[r][t]);
            for (long j = k; j < n; j++) sum = fmaf(weight_one(w[r * w_stride + j]), x[t][j], sum);
            out[t][r] = sum;
        }
}

#if REGISTERS < 32
INLINE narrow weight_narrow(const wnum *at) {
#ifdef WEIGHTS16
    return bf16_narrow(at);
#else
    return read_narrow(at);
#endif
}

/* out[r] = x . w[r] for 4 weight rows and one token: the sums of more tokens would not stay in registers. */
INLINE void narrow_dots4(const wnum *w, long w_stride, const float *x, long n, float *out) {
    narrow acc[4][2] = {{{0}, {0}}, {{0}, {0}}, {{0}, {0}}, {{0}, {0}}};
    long k = 0;
    for (; k + 2 * NARROW <= n; k += 2 * NARROW) {
        narrow low = *(const narrow *)(x + k), high = *(const narrow *)(x + k + NARROW);
        for (int r = 0; r < 4; r++) {
            acc[r][0] += weight_narrow(w + r * w_stride + k) * low;
            acc[r][1] += weight_narrow(w + r * w_stride + k + NARROW) * high;
        }
    }
    for (int r = 0; r < 4; r++) {
        float sum = narrow_total(acc[r][0] + acc[r][1]);
        for (long j = k; j < n; j++) sum = fmaf(weight_one(w[r * w_stride + j]), x[j], sum);
        out[r] = sum;
    }
}
#endif

INLINE void dots4_any(const wnum *w, long w_stride, const float *const *x, long count, long n, float out[][4]) {
#if REGISTERS < 32
    for (long t = 0; t < count; t++) narrow_dots4(w, w_stride, x[t], n, out[t]);
    return;
#endif
    while (count >= 4) {
        dots4(w, w_stride, x, 4, n, out);
        x += 4, out += 4, count -= 4;
    }
    if (count == 3) dots4(w, w_stride, x, 3, n, out);
    if (count == 2) dots4(w, w_stride, x, 2, n, out);
    if (count == 1) dots4(w, w_stride, x, 1, n, out);
}

#endif
