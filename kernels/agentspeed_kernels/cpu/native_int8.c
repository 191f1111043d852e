/* Products of a few rows with weights of 8 bits: bytes become floats in registers, so that what is read is half of bf16.

   A weight is [tiles of 16 outputs][steps of 64 inputs][16][16][4], each byte 128 above what it stands for; scales are
   [groups of 32 inputs, or 1][outputs in whole tiles]. */
#include "native_common.h"

#define MOST_ROWS 16
#define DEEP 64
#define GROUPED 32

#if REGISTERS >= 32
#define WIDE LANES
#define AT_ONCE 8 /* rows whose sums are in registers */
typedef vec wide;
typedef ivec wide_ints;
#else
#define WIDE NARROW
#define AT_ONCE 2
typedef narrow wide;
typedef int32_t wide_ints __attribute__((vector_size(4 * NARROW), aligned(4), may_alias));
#endif

typedef struct {
    const uint8_t *data;
    const float *scales;
    long n, k, group, steps, columns;
} byte_weight;

INLINE byte_weight byte_weight_of(const uint8_t *data, const float *scales, long n, long k, long group) {
    byte_weight w = {data, scales, n, k, group, (k + DEEP - 1) / DEEP, (n + LANES - 1) / LANES};
    return w;
}
INLINE long weight_scales(const byte_weight *w) { return (w->group ? w->steps * DEEP / GROUPED : 1) * w->columns * LANES; }
INLINE long weight_bytes(const byte_weight *w) { return w->columns * w->steps * DEEP * LANES; }

/* Outputs [from, from + WIDE) of tile t for `count` (a constant) rows of floats, whole steps long. */
INLINE void some_rows(const byte_weight *w, long t, long from, const float *const *x, int count, float (*to)[LANES]) {
    const uint8_t *at = w->data + t * w->steps * DEEP * LANES + from * 4;
    wide sum[AT_ONCE], all[AT_ONCE];
    for (int r = 0; r < count; r++) sum[r] = (wide){0}, all[r] = (wide){0};
    for (long k = 0; k < w->steps * DEEP; k += 4, at += 4 * LANES) {
        __builtin_prefetch(at + 6144, 0, 3);
        wide_ints v = *(const wide_ints *)at ^ (int32_t)0x80808080;
        wide a = __builtin_convertvector((v << 24) >> 24, wide), b = __builtin_convertvector((v << 16) >> 24, wide);
        wide c = __builtin_convertvector((v << 8) >> 24, wide), d = __builtin_convertvector(v >> 24, wide);
        for (int r = 0; r < count; r++) sum[r] += a * x[r][k], sum[r] += b * x[r][k + 1], sum[r] += c * x[r][k + 2], sum[r] += d * x[r][k + 3];
        if (w->group && (k + 4) % GROUPED == 0) {
            wide by = *(const wide *)(w->scales + k / GROUPED * w->columns * LANES + t * LANES + from);
            for (int r = 0; r < count; r++) all[r] += sum[r] * by, sum[r] = (wide){0};
        }
    }
    wide by = *(const wide *)(w->scales + t * LANES + from);
    for (int r = 0; r < count; r++) {
        if (!w->group) all[r] = sum[r] * by;
        *(wide *)(to[r] + from) = all[r];
    }
}

/* to[rows][16]: tile t of the outputs. */
INLINE void times(const byte_weight *w, long t, const float *const *x, long rows, float (*to)[LANES]) {
    for (long from = 0; from < LANES; from += WIDE) {
        long r = 0;
        for (; r + AT_ONCE <= rows; r += AT_ONCE) some_rows(w, t, from, x + r, AT_ONCE, to + r);
#if AT_ONCE > 2
        for (; r + 2 <= rows; r += 2) some_rows(w, t, from, x + r, 2, to + r);
#endif
        for (; r < rows; r++) some_rows(w, t, from, x + r, 1, to + r);
    }
}

INLINE void my_tiles(long n, long *low, long *high) {
    long index = 0, count = 1;
#ifdef _OPENMP
    index = omp_get_thread_num(), count = omp_get_num_threads();
#endif
    *low = n * index / count, *high = n * (index + 1) / count;
}

/* Rows as floats, zeros behind them to whole steps. */
INLINE void whole_rows(const num *x, long x_stride, long rows, const byte_weight *w, float *held, const float **to) {
    long width = w->steps * DEEP;
    for (long r = 0; r < rows; r++) {
        widen_row(held + r * width, x + r * x_stride, w->k);
        memset(held + r * width + w->k, 0, (width - w->k) * sizeof(float));
        to[r] = held + r * width;
    }
}

EXPORT void NAME(linear_bytes)(const num *x, long x_stride, const uint8_t *data, const float *scales, long group,
                               const num *bias, num *out, long out_stride, char *left, long rows, long n, long k,
                               int threads) {
    byte_weight w = byte_weight_of(data, scales, n, k, group);
    (void)left;
    if (rows * n * k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const float *held[MOST_ROWS];
        float sums[MOST_ROWS][LANES];
        long low, high;
        whole_rows(x, x_stride, rows, &w, agentspeed_scratch(FOR_ROWS, rows * w.steps * DEEP * sizeof(float)), held);
        my_tiles(w.columns, &low, &high);
        for (long t = low; t < high; t++) {
            times(&w, t, held, rows, sums);
            for (long r = 0; r < rows; r++)
                for (long j = 0; j < LANES && t * LANES + j < n; j++)
                    out[r * out_stride + t * LANES + j] = round_one(sums[r][j] + (bias ? read_one(bias[t * LANES + j]) : 0.0f));
        }
    }
}

INLINE float silu(float x) { return x / (1.0f + expf(-x)); }

/* gate_up is [experts][2][inner][hidden], down [experts][hidden][inner]. Scratch: left, as floats act[pairs][inner in whole
   steps]; sums[tokens][hidden in whole tiles]. tokens <= MOST_ROWS. */
EXPORT void NAME(experts_bytes)(const num *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                                const float *down_scales, long group, const int64_t *ids, const float *weights, char *left,
                                num *unused, float *sums, int *order, num *out, long tokens, long top, long experts,
                                long inner, long hidden, int threads) {
    byte_weight wide_weight = byte_weight_of(gate_up, gate_up_scales, inner, hidden, group);
    byte_weight back = byte_weight_of(down, down_scales, hidden, inner, group);
    float *act = (float *)left;
    long pairs = tokens * top, width = back.steps * DEEP, row = back.columns * LANES, used = 0;
    int *start = order + pairs;
    (void)unused;
    for (long e = 0; e < experts; e++) {
        start[e] = (int)used;
        for (long p = 0; p < pairs; p++)
            if (ids[p] == e) order[used++] = (int)p;
    }
    start[experts] = (int)used;
    if (3 * pairs * inner * hidden < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const float *held[MOST_ROWS], *mine[MOST_ROWS];
        float gate[MOST_ROWS][LANES], up[MOST_ROWS][LANES];
        long low, high;
        whole_rows(x, hidden, tokens, &wide_weight, agentspeed_scratch(FOR_ROWS, tokens * wide_weight.steps * DEEP * sizeof(float)), held);
        my_tiles(wide_weight.columns, &low, &high);
        for (long e = 0; e < experts; e++) {
            byte_weight g = wide_weight, u = wide_weight;
            g.data += 2 * e * weight_bytes(&g), g.scales += 2 * e * weight_scales(&g);
            u.data = g.data + weight_bytes(&g), u.scales = g.scales + weight_scales(&g);
            for (int at = start[e]; at < start[e + 1]; at += MOST_ROWS) {
                long many = start[e + 1] - at < MOST_ROWS ? start[e + 1] - at : MOST_ROWS;
                for (long i = 0; i < many; i++) mine[i] = held[order[at + i] / top];
                for (long t = low; t < high; t++) {
                    times(&g, t, mine, many, gate), times(&u, t, mine, many, up);
                    for (long i = 0; i < many; i++)
                        for (int j = 0; j < LANES; j++) act[order[at + i] * width + t * LANES + j] = silu(gate[i][j]) * up[i][j];
                }
            }
        }
        /* Whole steps are longer than whole tiles. */
        if (high == wide_weight.columns)
            for (long p = 0; p < pairs; p++) memset(act + p * width + high * LANES, 0, (width - high * LANES) * sizeof(float));
#pragma omp barrier
        my_tiles(back.columns, &low, &high);
        for (long t = 0; t < tokens; t++) memset(sums + t * row + low * LANES, 0, (high - low) * LANES * sizeof(float));
        for (long e = 0; e < experts; e++) {
            byte_weight d = back;
            d.data += e * weight_bytes(&d), d.scales += e * weight_scales(&d);
            for (int at = start[e]; at < start[e + 1]; at += MOST_ROWS) {
                long many = start[e + 1] - at < MOST_ROWS ? start[e + 1] - at : MOST_ROWS;
                for (long i = 0; i < many; i++) mine[i] = act + order[at + i] * width;
                for (long t = low; t < high; t++) {
                    times(&d, t, mine, many, gate);
                    for (long i = 0; i < many; i++)
                        for (int j = 0; j < LANES; j++) sums[order[at + i] / top * row + t * LANES + j] += weights[order[at + i]] * gate[i][j];
                }
            }
        }
        for (long t = 0; t < tokens; t++)
            for (long j = low * LANES; j < high * LANES && j < hidden; j++) out[t * hidden + j] = round_one(sums[t * row + j]);
    }
}
