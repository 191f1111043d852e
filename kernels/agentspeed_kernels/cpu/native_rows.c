/* Row-wise work between the products: norms, rotary turns, latent rows written to their pages, and routing. */
#include "native_common.h"

static void norm_row(const float *x, const float *weight, float eps, float *out, long n) {
    float scale = 1.0f / sqrtf(dot(x, x, n) / n + eps);
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void turn(const float *x, const float *cos_row, const float *sin_row, float *out, long half) {
    for (long i = 0; i < half; i++) {
        float low = x[i], high = x[half + i];
        out[i] = low * cos_row[i] - high * sin_row[i];
        out[half + i] = high * cos_row[i] + low * sin_row[i];
    }
}

#define PARALLEL_ROWS 32

EXPORT void agentspeed_rms_norm(const float *x, long x_stride, const float *weight, float eps, float *out,
                                long out_stride, long tokens, long n, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++) norm_row(x + t * x_stride, weight, eps, out + t * out_stride, n);
}

EXPORT void agentspeed_add_rms_norm(const float *x, float *residual, const float *weight, float eps, float *out,
                                    long tokens, long n, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++) {
        float *sum = residual + t * n;
        for (long i = 0; i < n; i++) sum[i] += x[t * n + i];
        norm_row(sum, weight, eps, out + t * n, n);
    }
}

EXPORT void agentspeed_rope(float *x, long x_t, long x_h, const float *cos_rows, const float *sin_rows, long tokens,
                            long heads, long half, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            float *at = x + t * x_t + h * x_h;
            turn(at, cos_rows + t * half, sin_rows + t * half, at, half);
        }
}

EXPORT void agentspeed_latent_append(const float *raw, long raw_stride, const float *weight, float eps,
                                     const float *cos_rows, const float *sin_rows, const int64_t *slots, float *pool,
                                     long tokens, long rank, long half, int threads) {
    long width = rank + 2 * half;
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++) {
        float *row = pool + slots[t] * width;
        norm_row(raw + t * raw_stride, weight, eps, row, rank);
        turn(raw + t * raw_stride + rank, cos_rows + t * half, sin_rows + t * half, row + rank, half);
    }
}

/* The `count` largest of score[0..n), larger first, the lower index first among equals; taken ones become -inf. */
static void take_top(float *score, long n, long count, int64_t *ids) {
    for (long c = 0; c < count; c++) {
        long best = -1;
        for (long i = 0; i < n; i++)
            if (score[i] > -INFINITY && (best < 0 || score[i] > score[best])) best = i;
        ids[c] = best < 0 ? 0 : best;
        if (best >= 0) score[best] = -INFINITY;
    }
}

static float group_worth(const float *score, long n, int top2) {
    float first = -INFINITY, second = -INFINITY;
    for (long i = 0; i < n; i++) {
        if (score[i] > first) second = first, first = score[i];
        else if (score[i] > second) second = score[i];
    }
    return top2 ? first + second : first;
}

static void keep_groups(float *choice, float *worth, int64_t *kept, long experts, long groups, long top_groups, int top2) {
    long size = experts / groups;
    for (long g = 0; g < groups; g++) worth[g] = group_worth(choice + g * size, size, top2);
    take_top(worth, groups, top_groups, kept);
    for (long g = 0; g < groups; g++) {
        int held = 0;
        for (long i = 0; i < top_groups; i++) held |= kept[i] == g;
        for (long i = 0; i < size && !held; i++) choice[g * size + i] = -INFINITY;
    }
}

static void scores_of(const float *x, const float *weight, float *score, long experts, long hidden, int softmax) {
    float most = -INFINITY, sum = 0;
    for (long e = 0; e < experts; e++) {
        score[e] = dot(x, weight + e * hidden, hidden);
        most = score[e] > most ? score[e] : most;
    }
    for (long e = 0; e < experts; e++) {
        score[e] = softmax ? expf(score[e] - most) : 1.0f / (1.0f + expf(-score[e]));
        sum += score[e];
    }
    for (long e = 0; e < experts && softmax; e++) score[e] /= sum;
}

/* scratch[3 * experts]; ids and out are [tokens][top]. */
EXPORT void agentspeed_route(const float *x, const float *weight, const float *bias, float *scratch, int64_t *kept,
                             int64_t *ids, float *out, long tokens, long hidden, long experts, long top, long groups,
                             long top_groups, int softmax, int top2, int normalise, float scale) {
    float *score = scratch, *choice = scratch + experts, *worth = scratch + 2 * experts;
    for (long t = 0; t < tokens; t++) {
        scores_of(x + t * hidden, weight, score, experts, hidden, softmax);
        for (long e = 0; e < experts; e++) choice[e] = score[e] + (bias ? bias[e] : 0.0f);
        if (groups > 1) keep_groups(choice, worth, kept, experts, groups, top_groups, top2);
        take_top(choice, experts, top, ids + t * top);
        float sum = 0;
        for (long c = 0; c < top; c++) sum += out[t * top + c] = score[ids[t * top + c]];
        float by = normalise ? scale / (sum + 1e-20f) : scale;
        for (long c = 0; c < top; c++) out[t * top + c] *= by;
    }
}
