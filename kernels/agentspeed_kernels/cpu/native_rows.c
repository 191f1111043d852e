/* Row-wise work between the products: norms, rotary turns, latent rows written to their pages, and routing. */
#include "native_cache.h"
#include "native_dots.h"

static float squares(const num *x, long n) {
    vec first = splat(0), second = splat(0);
    long i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        vec a = read_vec(x + i), b = read_vec(x + i + LANES);
        first += a * a, second += b * b;
    }
    float sum = total(first + second);
    for (; i < n; i++) sum += read_one(x[i]) * read_one(x[i]);
    return sum;
}

static void norm_row(const num *x, const num *weight, float eps, num *out, long n) {
    float scale = 1.0f / sqrtf(squares(x, n) / n + eps);
    long i = 0;
    for (; i + LANES <= n; i += LANES) write_vec(out + i, read_vec(x + i) * scale * read_vec(weight + i));
    for (; i < n; i++) out[i] = round_one(read_one(x[i]) * scale * read_one(weight[i]));
}

/* Cosines and sines may be floats whatever the rows are. */
INLINE float angle(const void *table, long i, int wide) {
    return wide ? ((const float *)table)[i] : read_one(((const num *)table)[i]);
}

INLINE vec angles(const void *table, long i, int wide) {
    return wide ? load((const float *)table + i) : read_vec((const num *)table + i);
}

/* x may be out. */
static void turn(const num *x, const void *cosines, const void *sines, long at, long half, int wide, num *out) {
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        vec low = read_vec(x + i), high = read_vec(x + half + i);
        vec c = angles(cosines, at + i, wide), s = angles(sines, at + i, wide);
        write_vec(out + i, low * c - high * s);
        write_vec(out + half + i, high * c + low * s);
    }
    for (; i < half; i++) {
        float low = read_one(x[i]), high = read_one(x[half + i]);
        float c = angle(cosines, at + i, wide), s = angle(sines, at + i, wide);
        out[i] = round_one(low * c - high * s);
        out[half + i] = round_one(high * c + low * s);
    }
}

#define PARALLEL_ROWS 32

/* out[t][h] = x[t][h], rows of n numbers; both may be strided. */
EXPORT void NAME(copy)(const num *x, long x_t, long x_h, num *out, long out_t, long out_h, long tokens, long heads, long n) {
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) memcpy(out + t * out_t + h * out_h, x + t * x_t + h * x_h, n * sizeof(num));
}

/* Reads `bytes`, a multiple of 256, and does nothing else: what a kernel that must read as much is measured against. One
   vector of each thread's exclusive or goes to seen[threads]. */
EXPORT void NAME(read)(const char *from, long bytes, ivec *seen, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long index = 0, count = 1;
#ifdef _OPENMP
        index = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        const char *at = from + bytes / 256 * index / count * 256, *end = from + bytes / 256 * (index + 1) / count * 256;
        ivec a = {0}, b = a, c = a, d = a;
        for (; at < end; at += 256) {
            for (int line = 0; line < 4; line++) __builtin_prefetch(at + 6144 + line * 64, 0, 3);
            const ivec *v = (const ivec *)at;
            a ^= v[0], b ^= v[1], c ^= v[2], d ^= v[3];
        }
        seen[index] = a ^ b ^ c ^ d;
    }
}

/* sum += x, n numbers */
EXPORT void NAME(add)(const num *x, num *sum, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) write_vec(sum + i, read_vec(sum + i) + read_vec(x + i));
    for (; i < n; i++) sum[i] = round_one(read_one(sum[i]) + read_one(x[i]));
}

/* Of `count` choices of experts, those of [first, first + held) are renumbered from 0, and the others count nothing. */
EXPORT void NAME(own)(int64_t *ids, float *weights, long count, long first, long held) {
    for (long i = 0; i < count; i++) {
        int64_t local = ids[i] - first;
        int mine = local >= 0 && local < held;
        ids[i] = mine ? local : 0;
        if (!mine) weights[i] = 0;
    }
}

EXPORT void NAME(rms_norm)(const num *x, long x_stride, const num *weight, float eps, num *out, long out_stride, long tokens,
                           long n, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++) norm_row(x + t * x_stride, weight, eps, out + t * out_stride, n);
}

EXPORT void NAME(add_rms_norm)(const num *x, num *residual, const num *weight, float eps, num *out, long tokens, long n,
                               int threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++) {
        NAME(add)(x + t * n, residual + t * n, n);
        norm_row(residual + t * n, weight, eps, out + t * n, n);
    }
}

EXPORT void NAME(rope)(num *x, long x_t, long x_h, const void *cosines, const void *sines, int wide, long tokens, long heads,
                       long half, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            num *at = x + t * x_t + h * x_h;
            turn(at, cosines, sines, t * half, half, wide, at);
        }
}

/* The rows of the pool are numbers, or with `fp8` bytes. */
EXPORT void NAME(latent_append)(const num *raw, long raw_stride, const num *weight, float eps, const void *cosines,
                                const void *sines, int wide, const int64_t *slots, num *pool, long tokens, long rank,
                                long half, int fp8, int threads) {
    long width = rank + 2 * half;
    coded_row coded = coded_rows(1, rank, 2 * half);
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++) {
        num *row = fp8 ? agentspeed_scratch(FOR_ROWS, width * sizeof(num)) : pool + slots[t] * width;
        norm_row(raw + t * raw_stride, weight, eps, row, rank);
        turn(raw + t * raw_stride + rank, cosines, sines, t * half, half, wide, row + rank);
        if (!fp8) continue;
        uint8_t *to = (uint8_t *)pool + slots[t] * coded.bytes;
        blank_row(&coded, to);
        code_head(&coded, row, to, 0);
        code_plain(&coded, row + rank, to);
    }
}

/* A head of queries or keys, normed by its gain unless that is 0, and turned. */
INLINE void turn_head(const num *x, const num *gain, float eps, const void *cosines, const void *sines, int wide, long t,
                      long half, num *out) {
    if (gain) norm_row(x, gain, eps, out, 2 * half);
    turn(gain ? out : x, cosines, sines, t * half, half, wide, out);
}

/* x[t * x_t + h * x_h]: `heads` heads of queries, `groups` of keys and as many of values, each of 2 * half numbers. q is
   [tokens][heads]; rows of the pools are [groups], or with `fp8` bytes. */
EXPORT void NAME(qkv_append)(const num *x, long x_t, long x_h, const num *q_gain, const num *k_gain, float eps,
                             const void *cosines, const void *sines, int wide, const int64_t *slots, num *q, num *keys,
                             num *values, long tokens, long heads, long groups, long half, int fp8, int threads) {
    long width = 2 * half;
    coded_row coded = coded_rows(groups, width, 0);
#pragma omp parallel for num_threads(threads) if (tokens >= PARALLEL_ROWS && threads > 1)
    for (long t = 0; t < tokens; t++) {
        const num *row = x + t * x_t;
        uint8_t *key_row = (uint8_t *)keys + slots[t] * coded.bytes, *value_row = (uint8_t *)values + slots[t] * coded.bytes;
        for (long h = 0; h < heads; h++)
            turn_head(row + h * x_h, q_gain, eps, cosines, sines, wide, t, half, q + (t * heads + h) * width);
        if (fp8) blank_row(&coded, key_row), blank_row(&coded, value_row);
        for (long g = 0; g < groups; g++) {
            long to = (slots[t] * groups + g) * width;
            const num *value = row + (heads + groups + g) * x_h;
            num *key = fp8 ? agentspeed_scratch(FOR_ROWS, width * sizeof(num)) : keys + to;
            turn_head(row + (heads + g) * x_h, k_gain, eps, cosines, sines, wide, t, half, key);
            if (fp8) code_head(&coded, key, key_row, g), code_head(&coded, value, value_row, g);
            else memcpy(values + to, value, width * sizeof(num));
        }
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

/* logits[t][e] = x[t] . weight[e] for up to 4 tokens: a weight is read once for all of them. */
static void logits_of(const num *x, const float *weight, long tokens, long experts, long hidden, float *logits) {
    long e = 0;
    if (tokens == 4)
        for (; e + 4 <= experts; e += 4) {
            const float *rows[4];
            float held[4][4];
            for (int i = 0; i < 4; i++) rows[i] = weight + (e + i) * hidden;
            dots4(x, hidden, rows, 4, 4, hidden, held);
            for (int i = 0; i < 4; i++)
                for (int t = 0; t < 4; t++) logits[t * experts + e + i] = held[i][t];
        }
    for (; e < experts; e++)
        for (long t = 0; t < tokens; t++) logits[t * experts + e] = dot(x + t * hidden, weight + e * hidden, hidden);
}

static void scores_of(float *score, long experts, int softmax) {
    float most = -INFINITY, sum = 0;
    for (long e = 0; e < experts; e++) most = score[e] > most ? score[e] : most;
    for (long e = 0; e < experts; e++) {
        score[e] = softmax ? expf(score[e] - most) : 1.0f / (1.0f + expf(-score[e]));
        sum += score[e];
    }
    for (long e = 0; e < experts && softmax; e++) score[e] /= sum;
}

/* The router's weight and bias are floats whatever the rows are. ids and out are [tokens][top]. */
EXPORT void NAME(route)(const num *x, const float *weight, const float *bias, int64_t *ids, float *out, long tokens,
                        long hidden, long experts, long top, long groups, long top_groups, int softmax, int top2,
                        int normalise, float scale, int threads) {
    if (tokens * experts * hidden < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        size_t floats = (6 * experts + 1) / 2 * 2;
        float *scores = agentspeed_scratch(FOR_ROWS, floats * sizeof(float) + groups * sizeof(int64_t));
        float *choice = scores + 4 * experts, *worth = scores + 5 * experts;
        int64_t *kept = (int64_t *)(scores + floats);
#pragma omp for schedule(static)
        for (long block = 0; block < tokens; block += 4) {
            long count = tokens - block < 4 ? tokens - block : 4;
            logits_of(x + block * hidden, weight, count, experts, hidden, scores);
            for (long t = block; t < block + count; t++) {
                float *score = scores + (t - block) * experts;
                scores_of(score, experts, softmax);
                int broken = 0;
                for (long e = 0; e < experts; e++) {
                    choice[e] = score[e] + (bias ? bias[e] : 0.0f);
                    broken |= choice[e] != choice[e];
                }
                if (groups > 1) keep_groups(choice, worth, kept, experts, groups, top_groups, top2);
                take_top(choice, experts, top, ids + t * top);
                float sum = 0;
                for (long c = 0; c < top; c++) sum += out[t * top + c] = score[ids[t * top + c]];
                /* A score that is no number would never be chosen, and nobody would know. */
                float by = broken ? NAN : normalise ? scale / (sum + 1e-20f) : scale;
                for (long c = 0; c < top; c++) out[t * top + c] *= by;
            }
        }
    }
}
