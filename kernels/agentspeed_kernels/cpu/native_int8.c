/* Products of a few rows with weights of 8 bits: bytes become floats in registers, so that what is read is half of bf16.

   A weight is [tiles of 16 outputs][steps of 64 inputs][16][16][4], each byte 128 above what it stands for; scales are
   [groups of 32 inputs, or 1][outputs in whole tiles]. */
#include "native_bytes.h"

#define DEEP 64
#define GROUPED 32

#if REGISTERS >= 32
#define AT_ONCE 8 /* rows whose sums are in registers */
#else
#define AT_ONCE 2
#endif

INLINE byte_weight byte_weight_of(const uint8_t *data, const float *scales, long n, long k, long group) {
    byte_weight w = {data, scales, n, k, group, (n + LANES - 1) / LANES, (k + DEEP - 1) / DEEP * DEEP};
    return w;
}
INLINE byte_weight matrix_at(const byte_weight *first, long index) {
    byte_weight w = *first;
    w.data += index * w.columns * w.width * LANES;
    w.scales += index * (w.group ? w.width / GROUPED : 1) * w.columns * LANES;
    return w;
}

/* The sum of `sets` (a constant) sums, which are 0 afterwards. */
INLINE wide taken(wide *sums, const int sets) {
    wide all = sums[0];
    for (int i = 1; i < sets; i++) all += sums[i];
    for (int i = 0; i < sets; i++) sums[i] = (wide){0};
    return all;
}

/* Outputs [from, from + WIDE) of tile t for `count` (a constant) rows of floats, whole steps long. */
INLINE void some_rows(const byte_weight *w, long t, long from, const float *const *x, int count, float (*to)[LANES]) {
    const uint8_t *at = w->data + t * w->width * LANES + from * 4;
    /* A few rows wait for the latency of one sum: they have several, for inputs in turn. */
    const int sets = count <= 2 ? 4 : count <= 4 ? 2 : 1;
    wide sum[AT_ONCE <= 2 ? 8 : AT_ONCE], all[AT_ONCE];
    for (int r = 0; r < count; r++) all[r] = (wide){0};
    for (int i = 0; i < count * sets; i++) sum[i] = (wide){0};
    for (long k = 0; k < w->width; k += 4, at += 4 * LANES) {
        __builtin_prefetch(at + 6144, 0, 3);
        wide_ints v = *(const wide_ints *)at ^ (int32_t)0x80808080;
        wide a = __builtin_convertvector((v << 24) >> 24, wide), b = __builtin_convertvector((v << 16) >> 24, wide);
        wide c = __builtin_convertvector((v << 8) >> 24, wide), d = __builtin_convertvector(v >> 24, wide);
        for (int r = 0; r < count; r++) {
            wide *s = sum + r * sets;
            s[0] += a * x[r][k], s[1 % sets] += b * x[r][k + 1], s[2 % sets] += c * x[r][k + 2], s[3 % sets] += d * x[r][k + 3];
        }
        if (w->group && (k + 4) % GROUPED == 0) {
            wide by = *(const wide *)(w->scales + k / GROUPED * w->columns * LANES + t * LANES + from);
            for (int r = 0; r < count; r++) all[r] += taken(sum + r * sets, sets) * by;
        }
    }
    wide by = *(const wide *)(w->scales + t * LANES + from);
    for (int r = 0; r < count; r++) {
        if (!w->group) all[r] = taken(sum + r * sets, sets) * by;
        *(wide *)(to[r] + from) = all[r];
    }
}

INLINE void times(const byte_weight *w, long t, const float *const *x, long rows, float (*to)[LANES]) {
    for (long from = 0; from < LANES; from += WIDE) {
        long r = 0;
        for (; r + AT_ONCE <= rows; r += AT_ONCE) some_rows(w, t, from, x + r, AT_ONCE, to + r);
#if AT_ONCE > 2
        for (; r + 4 <= rows; r += 4) some_rows(w, t, from, x + r, 4, to + r);
        for (; r + 2 <= rows; r += 2) some_rows(w, t, from, x + r, 2, to + r);
#endif
        for (; r < rows; r++) some_rows(w, t, from, x + r, 1, to + r);
    }
}

/* `left` and `unused` are scratch memory of the form with AMX; here the former holds floats. */
EXPORT void NAME(linear_bytes)(const num *x, long x_stride, const uint8_t *data, const float *scales, long group,
                               const num *bias, num *out, long out_stride, char *left, long rows, long n, long k,
                               int threads) {
    (void)left;
    byte_linear(x, x_stride, byte_weight_of(data, scales, n, k, group), bias, out, out_stride, rows, threads);
}

EXPORT void NAME(experts_bytes)(const num *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                                const float *down_scales, long group, const int64_t *ids, const float *weights, char *left,
                                num *unused, float *sums, int *order, num *out, long tokens, long top, long experts,
                                long inner, long hidden, int threads) {
    (void)unused;
    byte_experts(x, byte_weight_of(gate_up, gate_up_scales, inner, hidden, group),
                 byte_weight_of(down, down_scales, hidden, inner, group), ids, weights, (float *)left, sums, order, out, tokens,
                 top, experts, threads);
}
