/* Products of a few rows with weight matrices, and the feed-forward of routed experts: one pass over the weights. */
#include "native_common.h"

#define MOST_ROWS 16

/* Rows [low, high) of w against every token; out[t][r]. */
static void rows_of(const float *w, const float *const *x, long tokens, long k, long low, long high, const float *bias,
                    float *const *out) {
    float held[MOST_ROWS][4];
    long r = low;
    for (; r + 4 <= high; r += 4) {
        dots4_any(w + r * k, k, x, tokens, k, held);
        for (long t = 0; t < tokens; t++)
            for (int j = 0; j < 4; j++) out[t][r + j] = held[t][j] + (bias ? bias[r + j] : 0.0f);
    }
    for (; r < high; r++)
        for (long t = 0; t < tokens; t++) out[t][r] = dot(w + r * k, x[t], k) + (bias ? bias[r] : 0.0f);
}

/* This thread's rows, cut at multiples of 4. */
INLINE void share(long n, long *low, long *high, int index, int count) {
    long part = ((n + 4 * count - 1) / (4 * count)) * 4;
    *low = index * part < n ? index * part : n;
    *high = *low + part < n ? *low + part : n;
}

EXPORT void agentspeed_linear(const float *x, long x_stride, const float *w, const float *bias, float *out,
                              long out_stride, long tokens, long n, long k, int threads) {
    const float *rows[MOST_ROWS];
    float *outs[MOST_ROWS];
    for (long t = 0; t < tokens; t++) rows[t] = x + t * x_stride, outs[t] = out + t * out_stride;
    if (tokens * n * k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int index = 0, count = 1;
#ifdef _OPENMP
        index = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        long low, high;
        share(n, &low, &high, index, count);
        rows_of(w, rows, tokens, k, low, high, bias, outs);
    }
}

/* x[t * x_t + h * x_h], w[h][n][k], out[t * out_t + h * out_h]. */
EXPORT void agentspeed_heads_linear(const float *x, long x_t, long x_h, const float *w, float *out, long out_t,
                                    long out_h, long tokens, long heads, long n, long k, int threads) {
    if (tokens * heads * n * k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long h = 0; h < heads; h++) {
        const float *rows[MOST_ROWS];
        float *outs[MOST_ROWS];
        for (long t = 0; t < tokens; t++) rows[t] = x + t * x_t + h * x_h, outs[t] = out + t * out_t + h * out_h;
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

/* act[pairs][inner] is scratch, order[pairs] and start[experts + 1] too. out is overwritten. tokens <= MOST_ROWS. */
EXPORT void agentspeed_experts(const float *x, const float *gate_up, const float *down, const int64_t *ids,
                               const float *weights, float *act, int *order, int *start, float *out, long tokens,
                               long top, long experts, long inner, long hidden, int threads) {
    by_expert(ids, tokens * top, experts, order, start);
    if (3 * tokens * top * inner * hidden < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int index = 0, count = 1;
#ifdef _OPENMP
        index = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        long low, high;
        share(inner, &low, &high, index, count);
        for (long e = 0; e < experts; e++) {
            const float *both = gate_up + e * 2 * inner * hidden;
            for (int at = start[e]; at < start[e + 1]; at += MOST_ROWS) {
                long many = start[e + 1] - at < MOST_ROWS ? start[e + 1] - at : MOST_ROWS;
                const float *rows[MOST_ROWS];
                for (long i = 0; i < many; i++) rows[i] = x + (order[at + i] / top) * hidden;
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
        for (long t = 0; t < tokens; t++) memset(out + t * hidden + low, 0, (high - low) * sizeof(float));
        for (long e = 0; e < experts; e++) {
            const float *matrix = down + e * hidden * inner;
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
                            out[(order[at + i] / top) * hidden + r + j] += weights[order[at + i]] * held[i][j];
                }
                for (; r < high; r++)
                    for (long i = 0; i < many; i++)
                        out[(order[at + i] / top) * hidden + r] +=
                            weights[order[at + i]] * dot(matrix + r * inner, rows[i], inner);
            }
        }
    }
}
