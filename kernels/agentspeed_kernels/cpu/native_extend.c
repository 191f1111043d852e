/* What lies around the two products of ordinary attention: cached rows in fp8 as numbers, softmax of a tile in one pass, and
   its place in the whole. */
#include "native_cache.h"

/* Rows of latents in fp8 as numbers: to[tokens][rank + rope]. */
EXPORT void NAME(take_back)(const uint8_t *pool, long page_tokens, long rank, long rope, const int *pages, long offset,
                            long tokens, num *to, int threads) {
    coded_row coded = coded_rows(1, rank, rope);
    long width = rank + rope;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long t = 0; t < tokens; t++) {
        long place = offset + t;
        const uint8_t *row = pool + ((long)pages[place / page_tokens] * page_tokens + place % page_tokens) * coded.bytes;
        num *held = agentspeed_scratch(FOR_ROWS, (width + DEEP) * sizeof(num));
        decode_part(&coded, row, 0, held);
        memcpy(to + t * width, held, width * sizeof(num));
    }
}

/* scores[heads][rows][tokens] become exp(scale * (score - peak)); row r sees visible[r] tokens, the others become 0.
   peaks and sums are [heads][rows]. */
EXPORT void NAME(soften)(float *scores, const int *visible, float scale, float *peaks, float *sums, long heads,
                              long rows, long tokens, int threads) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long job = 0; job < heads * rows; job++) {
        float *s = scores + job * tokens;
        long seen = visible[job % rows], whole = seen / LANES * LANES, i;
        vec most = splat(-INFINITY), sum = splat(0);
        for (i = 0; i < whole; i += LANES) most = pick(load(s + i) > most, load(s + i), most);
        float top = peak(most);
        for (; i < seen; i++) top = s[i] > top ? s[i] : top;
        top *= scale;
        for (i = 0; i < whole; i += LANES) {
            vec share = exp_down(load(s + i) * scale - top);
            store(s + i, share);
            sum += share;
        }
        if (i < seen) {
            vec last = splat(0);
            memcpy(&last, s + i, (seen - i) * sizeof(float));
            last = pick(lane < (int32_t)(seen - i), exp_down(last * scale - top), splat(0));
            memcpy(s + i, &last, (seen - i) * sizeof(float));
            sum += last;
        }
        memset(s + seen, 0, (tokens - seen) * sizeof(float));
        peaks[job] = top;
        sums[job] = total(sum);
    }
}

/* Adds a tile's part[heads][rows][width] to held[all_rows][heads][width], where tile row r is row at[r] of the whole.
   held stays unnormalised; most and weight are [all_rows][heads]. */
EXPORT void NAME(merge)(const float *part, const float *peaks, const float *sums, const int *at, float *held,
                             float *most, float *weight, long heads, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            long from = h * rows + r, to = at[r] * heads + h;
            float top = fmaxf(most[to], peaks[from]);
            float keep = expf(most[to] - top), take = expf(peaks[from] - top);
            float *sum = held + to * width;
            const float *add = part + from * width;
            for (long j = 0; j < width; j++) sum[j] = sum[j] * keep + add[j] * take;
            most[to] = top;
            weight[to] = weight[to] * keep + sums[from] * take;
        }
}

/* out[row] = held[row] / weight[row] for `count` rows of (row, head). */
EXPORT void NAME(normalise)(const float *held, const float *weight, const int *at, float *out, long heads,
                                 long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            long row = at[r] * heads + h;
            float by = 1.0f / weight[row];
            for (long j = 0; j < width; j++) out[row * width + j] = held[row * width + j] * by;
        }
}
