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

/* out[t][r] = x[t] . w[r] for 4 weight rows, `many` of them at a time, and `count` tokens: both are constants.

   Weights that come from memory are read one row after the other, which is one stream that the hardware runs ahead on: four
   rows side by side come at a third of its rate, and what is fetched ahead by instructions waits in the same few places. */
INLINE void dots4(const wnum *w, long w_stride, const float *const *x, const int count, const int many, long n,
                  float out[][4]) {
    for (int first = 0; first < 4; first += many) {
        const wnum *rows = w + first * w_stride;
        vec acc[4][4];
        for (int r = 0; r < many; r++)
            for (int t = 0; t < count; t++) acc[r][t] = splat(0);
        long k = 0;
        for (; k + LANES <= n; k += LANES) {
            vec held[4];
            for (int r = 0; r < many; r++) held[r] = weight_vec(rows + r * w_stride + k);
            for (int t = 0; t < count; t++) {
                vec v = load(x[t] + k);
                for (int r = 0; r < many; r++) acc[r][t] += held[r] * v;
            }
        }
        for (int t = 0; t < count; t++)
            for (int r = 0; r < many; r++) {
                float sum = total(acc[r][t]);
                for (long j = k; j < n; j++) sum = fmaf(weight_one(rows[r * w_stride + j]), x[t][j], sum);
                out[t][first + r] = sum;
            }
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

/* out[r] = x . w[r] for 4 weight rows, one after the other as above, and one token: the sums of more tokens would not stay
   in registers. */
INLINE void narrow_dots4(const wnum *w, long w_stride, const float *x, long n, float *out) {
    for (int r = 0; r < 4; r++, w += w_stride) {
        narrow low = {0}, high = {0};
        long k = 0;
        for (; k + 2 * NARROW <= n; k += 2 * NARROW) {
            low += weight_narrow(w + k) * *(const narrow *)(x + k);
            high += weight_narrow(w + k + NARROW) * *(const narrow *)(x + k + NARROW);
        }
        float sum = narrow_total(low + high);
        for (long j = k; j < n; j++) sum = fmaf(weight_one(w[j]), x[j], sum);
        out[r] = sum;
    }
}
#endif

INLINE void dots4_any(const wnum *w, long w_stride, const float *const *x, long count, long n, float out[][4]) {
#if REGISTERS < 32
    for (long t = 0; t < count; t++) narrow_dots4(w, w_stride, x[t], n, out[t]);
    return;
#endif
    /* Rows that the first tokens brought into the first cache are taken side by side for the others: inputs are read once. */
    if (count >= 4) dots4(w, w_stride, x, 4, 1, n, out);
    else if (count == 3) dots4(w, w_stride, x, 3, 1, n, out);
    else if (count == 2) dots4(w, w_stride, x, 2, 1, n, out);
    else if (count == 1) dots4(w, w_stride, x, 1, 1, n, out);
    for (x += 4, out += 4, count -= 4; count >= 4; x += 4, out += 4, count -= 4) dots4(w, w_stride, x, 4, 4, n, out);
    if (count == 3) dots4(w, w_stride, x, 3, 4, n, out);
    if (count == 2) dots4(w, w_stride, x, 2, 4, n, out);
    if (count == 1) dots4(w, w_stride, x, 1, 4, n, out);
}

#endif
