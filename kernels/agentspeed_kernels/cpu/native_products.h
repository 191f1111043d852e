/* Products of a few rows with weight matrices, and the feed-forward of routed experts: one pass over the weights. Rows are
   taken to float once, so that only weights are converted in the inner loop.

   PRODUCT(op) names the functions, whose weights are of the kind or, with WEIGHTS16, in bf16 (native_dots.h). */
#include "native_dots.h"

#define MOST_ROWS 16

/* Rows [low, high) of w against every token; out[t][r]. */
static void rows_of(const wnum *w, const float *const *x, long tokens, long k, long low, long high, const num *bias,
                    num *const *out) {
    float held[MOST_ROWS][4];
    long r = low;
    for (; r + 4 <= high; r += 4) {
        dots4_any(w + r * k, k, x, tokens, k, held);
        for (long t = 0; t < tokens; t++)
            for (int j = 0; j < 4; j++) out[t][r + j] = round_one(held[t][j] + (bias ? read_one(bias[r + j]) : 0.0f));
    }
    for (; r < high; r++)
        for (long t = 0; t < tokens; t++) out[t][r] = round_one(dot(w + r * k, x[t], k) + (bias ? read_one(bias[r]) : 0.0f));
}

/* This thread's rows, cut at multiples of 4. */
INLINE void share(long n, long *low, long *high, int index, int count) {
    long part = ((n + 4 * count - 1) / (4 * count)) * 4;
    *low = index * part < n ? index * part : n;
    *high = *low + part < n ? *low + part : n;
}

/* The rows as floats: where they lie, or copies that last until the thread's next product. */
INLINE void wide_rows(const num *x, long x_stride, long tokens, long k, const float **rows) {
#ifdef HALF
    float *held = agentspeed_scratch(FOR_ROWS, tokens * k * sizeof(float));
    for (long t = 0; t < tokens; t++) widen_row(held + t * k, x + t * x_stride, k), rows[t] = held + t * k;
#else
    (void)k;
    for (long t = 0; t < tokens; t++) rows[t] = x + t * x_stride;
#endif
}

EXPORT void PRODUCT(linear)(const num *x, long x_stride, const wnum *w, const num *bias, num *out, long out_stride, long tokens,
                         long n, long k, int threads) {
    num *outs[MOST_ROWS];
    for (long t = 0; t < tokens; t++) outs[t] = out + t * out_stride;
    if (tokens * n * k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int index = 0, count = 1;
#ifdef _OPENMP
        index = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        long low, high;
        share(n, &low, &high, index, count);
        const float *rows[MOST_ROWS];
        wide_rows(x, x_stride, tokens, k, rows);
        rows_of(w, rows, tokens, k, low, high, bias, outs);
    }
}

/* x[t * x_t + h * x_h], w[h][n][k], out[t * out_t + h * out_h]. */
EXPORT void PRODUCT(heads_linear)(const num *x, long x_t, long x_h, const wnum *w, num *out, long out_t, long out_h, long tokens,
                               long heads, long n, long k, int threads) {
    if (tokens * heads * n * k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long h = 0; h < heads; h++) {
        const float *rows[MOST_ROWS];
        num *outs[MOST_ROWS];
        wide_rows(x + h * x_h, x_t, tokens, k, rows);
        for (long t = 0; t < tokens; t++) outs[t] = out + t * out_t + h * out_h;
        rows_of(w + h * n * k, rows, tokens, k, 0, n, 0, outs);
    }
}

INLINE float silu(float x) { return x / (1.0f + expf(-x)); }

/* Pairs (token, choice) in order of expert: weights of an expert are read once for all tokens that chose it. */
static long by_expert(const int64_t *ids, long pairs, long experts, int *order, int *start) {
    long used = 0;
    for (long e = 0; e < experts; e++) {
        start[e] = (int)used;
        for (long p = 0; p < pairs; p++)
            if (ids[p] == e) order[used++] = (int)p;
    }
    start[experts] = (int)used;
    return used;
}

/* act[pairs][inner], order[pairs], start[experts + 1] and sums[tokens][hidden] are scratch; sums may be out where that is
   float. out is overwritten. tokens <= MOST_ROWS. */
EXPORT void PRODUCT(experts)(const num *x, const wnum *gate_up, const wnum *down, const int64_t *ids, const float *weights,
                          float *act, int *order, int *start, float *sums, num *out, long tokens, long top, long experts,
                          long inner, long hidden, int threads) {
    by_expert(ids, tokens * top, experts, order, start);
    if (3 * tokens * top * inner * hidden < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int index = 0, count = 1;
#ifdef _OPENMP
        index = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        long low, high;
        const float *wide[MOST_ROWS];
        wide_rows(x, hidden, tokens, hidden, wide);
        share(inner, &low, &high, index, count);
        for (long e = 0; e < experts; e++) {
            const wnum *both = gate_up + e * 2 * inner * hidden;
            for (int at = start[e]; at < start[e + 1]; at += MOST_ROWS) {
                long many = start[e + 1] - at < MOST_ROWS ? start[e + 1] - at : MOST_ROWS;
                const float *rows[MOST_ROWS];
                for (long i = 0; i < many; i++) rows[i] = wide[order[at + i] / top];
                for (long r = low; r < high; r += 4) {
                    float gate[MOST_ROWS][4], up[MOST_ROWS][4];
                    if (r + 4 <= high) {
                        dots4_any(both + r * hidden, hidden, rows, many, hidden, gate);
                        dots4_any(both + (inner + r) * hidden, hidden, rows, many, hidden, up);
                        for (long i = 0; i < many; i++)
                            for (int j = 0; j < 4; j++)
                                act[order[at + i] * inner + r + j] = silu(gate[i][j]) * up[i][j];
                        continue;
                    }
                    for (long s = r; s < high; s++)
                        for (long i = 0; i < many; i++)
                            act[order[at + i] * inner + s] = silu(dot(both + s * hidden, rows[i], hidden)) *
                                                             dot(both + (inner + s) * hidden, rows[i], hidden);
                }
            }
        }
#pragma omp barrier
        share(hidden, &low, &high, index, count);
        for (long t = 0; t < tokens; t++) memset(sums + t * hidden + low, 0, (high - low) * sizeof(float));
        for (long e = 0; e < experts; e++) {
            const wnum *matrix = down + e * hidden * inner;
            for (int at = start[e]; at < start[e + 1]; at += MOST_ROWS) {
                long many = start[e + 1] - at < MOST_ROWS ? start[e + 1] - at : MOST_ROWS;
                const float *rows[MOST_ROWS];
                for (long i = 0; i < many; i++) rows[i] = act + order[at + i] * inner;
                float held[MOST_ROWS][4];
                long r = low;
                for (; r + 4 <= high; r += 4) {
                    dots4_any(matrix + r * inner, inner, rows, many, inner, held);
                    for (long i = 0; i < many; i++)
                        for (int j = 0; j < 4; j++)
                            sums[(order[at + i] / top) * hidden + r + j] += weights[order[at + i]] * held[i][j];
                }
                for (; r < high; r++)
                    for (long i = 0; i < many; i++)
                        sums[(order[at + i] / top) * hidden + r] +=
                            weights[order[at + i]] * dot(matrix + r * inner, rows[i], inner);
            }
        }
#ifdef HALF
        for (long t = 0; t < tokens; t++) round_row(out + t * hidden + low, sums + t * hidden + low, high - low);
#else
        (void)out;
#endif
    }
}
