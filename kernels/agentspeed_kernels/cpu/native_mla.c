/* Absorbed latent attention over paged rows: each latent is read from memory once, for keys and values and all rows. */
#include "native_common.h"

#define BLOCK 32     /* tokens scored at a time; two vectors of scores a row */
#define ROWS 8      /* (row, head) pairs whose queries stay in the first cache */
#define AT_ONCE (REGISTERS / 4)  /* of them, with sums for 2 tokens in registers */
#define COLUMNS (REGISTERS / 8)  /* vectors of columns, with sums for 4 pairs in registers */
#define GROUP 64     /* (row, head) pairs that share one pass over a tile */
#define NEVER -1e30f /* below every finite score, and its difference to itself is 0, not NaN */

typedef struct {
    const num *q;
    long q_t, q_h;
    const num *pool;
    long page_tokens, width, rank, heads;
    const int *page_at, *pages, *offset, *tokens, *row_at, *rows, *visible;
    float scale;
    float *sums;    /* [entries][heads][rank] */
    float *peaks;   /* [entries][heads] */
    float *weights; /* [entries][heads] */
} step;

/* s[i][b] = q[i] . k[b] for 8 rows × 2 tokens. With `ahead` the tokens there are fetched meanwhile: a row of one page is
   too short a stream for the hardware to run ahead on. */
INLINE void scores8(const float *q, const num *const *k, const num *const *ahead, long width, float *s) {
    vec acc[LANES];
    long j = 0;
    for (int low = 0; low < ROWS; low += AT_ONCE) {
        vec part[2 * AT_ONCE];
        for (int i = 0; i < 2 * AT_ONCE; i++) part[i] = splat(0);
        for (j = 0; j + LANES <= width; j += LANES) {
            vec first = read_vec(k[0] + j), second = read_vec(k[1] + j);
            if (ahead && low == 0) {
                __builtin_prefetch(ahead[0] + j, 0, 2);
                __builtin_prefetch(ahead[1] + j, 0, 2);
            }
            for (int i = 0; i < AT_ONCE; i++) {
                vec row = load(q + (low + i) * width + j);
                part[2 * i] += row * first;
                part[2 * i + 1] += row * second;
            }
        }
        memcpy(acc + 2 * low, part, sizeof part);
    }
    float sums[LANES];
    store(sums, totals(acc));
    for (; j < width; j++)
        for (int i = 0; i < LANES; i++) sums[i] += q[(i / 2) * width + j] * read_one(k[i % 2][j]);
    for (int i = 0; i < ROWS; i++) memcpy(s + i * BLOCK, sums + 2 * i, 2 * sizeof(float));
}

/* o[i] = o[i] * keep[i] + sum_b p[i][b] * v[b] for 4 rows and `many` (a constant) vectors of columns. */
INLINE void values4(float *o, long o_stride, const float *keep, const float *p, const num *const *v, long column,
                    int many) {
    vec acc[4][4];
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < many; c++) acc[i][c] = load(o + i * o_stride + column + c * LANES) * keep[i];
    for (int b = 0; b < BLOCK; b++) {
        vec columns[4];
        for (int c = 0; c < many; c++) columns[c] = read_vec(v[b] + column + c * LANES);
        for (int i = 0; i < 4; i++) {
            vec share = splat(p[i * BLOCK + b]);
            for (int c = 0; c < many; c++) acc[i][c] += share * columns[c];
        }
    }
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < many; c++) store(o + i * o_stride + column + c * LANES, acc[i][c]);
}

INLINE void add_values(float *o, long rank, const float *keep, const float *p, const num *const *v) {
    long column = 0;
    for (; column + COLUMNS * LANES <= rank; column += COLUMNS * LANES) values4(o, rank, keep, p, v, column, COLUMNS);
    for (; column + LANES <= rank; column += LANES) values4(o, rank, keep, p, v, column, 1);
    for (; column < rank; column++)
        for (int i = 0; i < 4; i++) {
            float sum = o[i * rank + column] * keep[i];
            for (int b = 0; b < BLOCK; b++) sum += p[i * BLOCK + b] * read_one(v[b][column]);
            o[i * rank + column] = sum;
        }
}

/* Scores of one row become shares of its softmax so far; tokens from `seen` on are invisible. Returns what to keep. */
INLINE float soften(float *s, long seen, float scale, float *most, float *sum) {
    if (seen <= 0) {
        memset(s, 0, BLOCK * sizeof(float));
        return 1.0f;
    }
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec first = lane < (int32_t)seen, second = (lane + LANES) < (int32_t)seen;
    vec low = pick(first, load(s) * scale, splat(NEVER)), high = pick(second, load(s + LANES) * scale, splat(NEVER));
    float before = *most, here = fmaxf(peak(low), peak(high));
    float now = here > before ? here : before;
    low = pick(first, exp_down(low - now), splat(0)), high = pick(second, exp_down(high - now), splat(0));
    store(s, low), store(s + LANES, high);
    float keep = before == now ? 1.0f : expf(before - now);
    *sum = *sum * keep + total(low + high);
    *most = now;
    return keep;
}

/* Pointers to BLOCK tokens from `at`; past the end the last one is repeated (its shares are 0). */
INLINE void locate(const step *s, long tile, long at, const num **k) {
    const int *pages = s->pages + s->page_at[tile];
    for (int b = 0; b < BLOCK; b++) {
        long token = at + b < s->tokens[tile] ? at + b : s->tokens[tile] - 1;
        long place = s->offset[tile] + token;
        k[b] = s->pool + ((long)pages[place / s->page_tokens] * s->page_tokens + place % s->page_tokens) * s->width;
    }
}

/* (row, head) pairs [low, low + GROUP) of a tile. q is scratch [GROUP][width], o is scratch [GROUP][rank]. */
static void pairs_of(const step *s, long tile, long low, float *q, float *o) {
    long first = s->row_at[tile], pairs = (s->row_at[tile + 1] - first) * s->heads - low;
    if (pairs > GROUP) pairs = GROUP;
    long padded = (pairs + ROWS - 1) / ROWS * ROWS, seen[GROUP] = {0};
    float most[GROUP], sum[GROUP];
    for (long i = 0; i < padded; i++) {
        long entry = first + (low + i) / s->heads, head = (low + i) % s->heads;
        most[i] = NEVER, sum[i] = 0;
        if (i < pairs) {
            widen_row(q + i * s->width, s->q + s->rows[entry] * s->q_t + head * s->q_h, s->width);
            seen[i] = s->visible[entry];
        } else
            memset(q + i * s->width, 0, s->width * sizeof(float));
    }
    memset(o, 0, padded * s->rank * sizeof(float));
    for (long at = 0; at < s->tokens[tile]; at += BLOCK) {
        const num *k[BLOCK], *next[BLOCK];
        locate(s, tile, at, k);
        locate(s, tile, at + BLOCK, next);
        for (long i = 0; i < padded; i += ROWS) {
            float shares[ROWS * BLOCK], keep[ROWS];
            if (i == 0)
                for (int b = 0; b < BLOCK; b += 2) scores8(q, k + b, next + b, s->width, shares + b);
            else
                for (int b = 0; b < BLOCK; b += 2) scores8(q + i * s->width, k + b, 0, s->width, shares + b);
            for (int r = 0; r < ROWS; r++)
                keep[r] = soften(shares + r * BLOCK, seen[i + r] - at, s->scale, most + i + r, sum + i + r);
            for (int r = 0; r < ROWS; r += 4)
                add_values(o + (i + r) * s->rank, s->rank, keep + r, shares + r * BLOCK, k);
        }
    }
    long slot = first * s->heads + low;
    memcpy(s->sums + slot * s->rank, o, pairs * s->rank * sizeof(float));
    memcpy(s->peaks + slot, most, pairs * sizeof(float));
    memcpy(s->weights + slot, sum, pairs * sizeof(float));
}

/* out[rank] = the partials of the row's entries, weighted by their share of the whole softmax. */
static void merge_row(const step *s, const int *entries, long count, long head, num *out) {
    float most = NEVER, sum = 0, *held = agentspeed_scratch(FOR_ATTENTION, s->rank * sizeof(float));
    for (long i = 0; i < count; i++) most = fmaxf(most, s->peaks[entries[i] * s->heads + head]);
    memset(held, 0, s->rank * sizeof(float));
    for (long i = 0; i < count; i++) {
        long slot = entries[i] * s->heads + head;
        float by = expf(s->peaks[slot] - most);
        const float *part = s->sums + slot * s->rank;
        sum += by * s->weights[slot];
        for (long j = 0; j < s->rank; j++) held[j] += by * part[j];
    }
    for (long j = 0; j < s->rank; j++) held[j] /= sum;
    round_row(out, held, s->rank);
}

/* partials: [entries][heads] rows of rank + 2 floats. */
EXPORT void NAME(mla_rows)(const num *q, long q_t, long q_h, const num *pool, long page_tokens, long width, long rank,
                           long heads, long tiles, const int *page_at, const int *pages, const int *offset,
                           const int *tokens, const int *row_at, const int *rows, const int *visible, long merges,
                           const int *merge_rows, const int *merge_at, const int *merge, float scale, float *partials,
                           long entries, num *out, int threads) {
    step s = {q, q_t, q_h, pool, page_tokens, width, rank, heads, page_at, pages, offset, tokens, row_at, rows,
              visible, scale, partials, partials + entries * heads * rank,
              partials + entries * heads * (rank + 1)};
    long pairs = 0;
    for (long tile = 0; tile < tiles; tile++) pairs += (long)(row_at[tile + 1] - row_at[tile]) * tokens[tile];
    if (pairs * heads * (width + rank) < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *mine = agentspeed_scratch(FOR_ATTENTION, GROUP * (width + rank) * sizeof(float));
#pragma omp for schedule(dynamic)
        for (long tile = 0; tile < tiles; tile++)
            for (long low = 0; low < (row_at[tile + 1] - row_at[tile]) * heads; low += GROUP)
                pairs_of(&s, tile, low, mine, mine + GROUP * width);
#pragma omp for schedule(static)
        for (long job = 0; job < merges * heads; job++) {
            long m = job / heads, head = job % heads;
            merge_row(&s, merge + merge_at[m], merge_at[m + 1] - merge_at[m], head,
                      out + ((long)merge_rows[m] * heads + head) * rank);
        }
    }
}
