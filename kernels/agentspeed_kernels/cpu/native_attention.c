/* Attention of a few rows over paged keys and values: what is cached is read from memory once for all rows that see it.

   Latent attention has one head of the pool for all heads of queries, whose values are the first part of its keys. Rows in
   fp8 are taken back to numbers a block of tokens at a time. */
#include "native_cache.h"

#define BLOCK 32     /* tokens scored at a time; two vectors of scores a row */
#define GROUP 64     /* (row, head) pairs that share one pass over a tile */
#define HALF_ROWS 4  /* pairs are padded to as many */
#define FETCH 2      /* what is fetched ahead goes to the second cache: keys and values of 32 tokens may fill the first */
#if REGISTERS >= 32
#define ROWS 8       /* pairs whose queries stay in the first cache; sums for them and 2 tokens are in registers */
#define COLUMNS 4    /* vectors of columns, with sums for 4 pairs in registers */
#define LEAST_ROWS 2 /* so few pairs are padded no further: of one row, two heads that share keys */
#define WIDE_COLUMNS (2 * COLUMNS) /* with sums for those */
#else
#define ROWS HALF_ROWS
#define LEAST_ROWS HALF_ROWS
#endif
#define NEVER -1e30f /* below every finite score, and its difference to itself is 0, not NaN */

typedef struct {
    const num *q;
    long q_t, q_h;
    const num *keys, *values; /* pools; between their rows lie `row` numbers, between heads of a row `width` and `rank` */
    long row, page_tokens, width, rank, heads, groups; /* groups: heads of the pools */
    const coded_row *coded; /* how rows are kept in fp8; 0: they are numbers */
    const int *page_at, *pages, *offset, *tokens, *row_at, *rows, *visible;
    float scale;
    float *sums;    /* [entries][heads][rank] */
    float *peaks;   /* [entries][heads] */
    float *weights; /* [entries][heads] */
} step;

#if REGISTERS >= 32
/* s[i][b] = q[i] . k[b] for 8 rows × 2 tokens. With `ahead` the tokens there are fetched meanwhile: a row of one page is
   too short a stream for the hardware to run ahead on. */
INLINE void scores8(const float *q, const num *const *k, const num *const *ahead, long width, float *s) {
    vec acc[LANES];
    long j = 0;
    for (int i = 0; i < LANES; i++) acc[i] = splat(0);
    for (; j + LANES <= width; j += LANES) {
        vec first = read_vec(k[0] + j), second = read_vec(k[1] + j);
        if (ahead) {
            __builtin_prefetch(ahead[0] + j, 0, FETCH);
            __builtin_prefetch(ahead[1] + j, 0, FETCH);
        }
        for (int i = 0; i < 8; i++) {
            vec row = load(q + i * width + j);
            acc[2 * i] += row * first;
            acc[2 * i + 1] += row * second;
        }
    }
    float sums[LANES];
    store(sums, totals(acc));
    for (; j < width; j++)
        for (int i = 0; i < LANES; i++) sums[i] = fmaf(q[(i / 2) * width + j], read_one(k[i % 2][j]), sums[i]);
    for (int i = 0; i < 8; i++) memcpy(s + i * BLOCK, sums + 2 * i, 2 * sizeof(float));
}

/* The same for 4 rows x 4 tokens. */
INLINE void scores4(const float *q, const num *const *k, const num *const *ahead, long width, float *s) {
    vec acc[LANES];
    long j = 0;
    for (int i = 0; i < LANES; i++) acc[i] = splat(0);
    for (; j + LANES <= width; j += LANES) {
        vec tokens[4];
        for (int b = 0; b < 4; b++) tokens[b] = read_vec(k[b] + j);
        if (ahead)
            for (int b = 0; b < 4; b++) __builtin_prefetch(ahead[b] + j, 0, FETCH);
        for (int i = 0; i < 4; i++) {
            vec row = load(q + i * width + j);
            for (int b = 0; b < 4; b++) acc[4 * i + b] += row * tokens[b];
        }
    }
    float sums[LANES];
    store(sums, totals(acc));
    for (; j < width; j++)
        for (int i = 0; i < LANES; i++) sums[i] = fmaf(q[(i / 4) * width + j], read_one(k[i % 4][j]), sums[i]);
    for (int i = 0; i < 4; i++) memcpy(s + i * BLOCK, sums + 4 * i, 4 * sizeof(float));
}

/* The same for 2 rows x 8 tokens. */
INLINE void scores2(const float *q, const num *const *k, const num *const *ahead, long width, float *s) {
    vec acc[LANES];
    long j = 0;
    for (int i = 0; i < LANES; i++) acc[i] = splat(0);
    for (; j + LANES <= width; j += LANES) {
        vec first = load(q + j), second = load(q + width + j);
        for (int b = 0; b < 8; b++) {
            vec token = read_vec(k[b] + j);
            if (ahead) __builtin_prefetch(ahead[b] + j, 0, FETCH);
            acc[b] += first * token, acc[8 + b] += second * token;
        }
    }
    float sums[LANES];
    store(sums, totals(acc));
    for (; j < width; j++)
        for (int i = 0; i < LANES; i++) sums[i] = fmaf(q[(i / 8) * width + j], read_one(k[i % 8][j]), sums[i]);
    for (int i = 0; i < 2; i++) memcpy(s + i * BLOCK, sums + 8 * i, 8 * sizeof(float));
}

/* o[i] = o[i] * keep[i] + sum_b p[i][b] * v[b] for `rows` and `many` vectors of columns, both constants. */
INLINE void values_of(float *o, long o_stride, const float *keep, const float *p, const num *const *v,
                      const num *const *ahead, long column, const int rows, const int many) {
    vec acc[4][WIDE_COLUMNS];
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < many; c++) acc[i][c] = load(o + i * o_stride + column + c * LANES) * keep[i];
    for (int b = 0; b < BLOCK; b++) {
        vec columns[WIDE_COLUMNS];
        for (int c = 0; c < many; c++) columns[c] = read_vec(v[b] + column + c * LANES);
        if (ahead)
            for (int c = 0; c < many; c++) __builtin_prefetch(ahead[b] + column + c * LANES, 0, FETCH);
        for (int i = 0; i < rows; i++) {
            vec share = splat(p[i * BLOCK + b]);
            for (int c = 0; c < many; c++) acc[i][c] += share * columns[c];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < many; c++) store(o + i * o_stride + column + c * LANES, acc[i][c]);
}

INLINE long vectors_of(float *o, long rank, const float *keep, const float *p, const num *const *v,
                       const num *const *ahead, const int rows, const int many) {
    long column = 0;
    for (; column + many * LANES <= rank; column += many * LANES) values_of(o, rank, keep, p, v, ahead, column, rows, many);
    for (; column + LANES <= rank; column += LANES) values_of(o, rank, keep, p, v, ahead, column, rows, 1);
    return column;
}
INLINE long add_vectors(float *o, long rank, const float *keep, const float *p, const num *const *v,
                        const num *const *ahead, long rows) {
    if (rows == 2) return vectors_of(o, rank, keep, p, v, ahead, 2, WIDE_COLUMNS);
    /* Most calls fetch nothing, and their loop asks nothing. */
    return ahead ? vectors_of(o, rank, keep, p, v, ahead, 4, COLUMNS) : vectors_of(o, rank, keep, p, v, 0, 4, COLUMNS);
}
#else
/* s[i][b] = q[i] . k[b] for 4 rows x 4 tokens, in vectors that the set has registers for, two tokens at a time. */
INLINE void scores4(const float *q, const num *const *k, const num *const *ahead, long width, float *s) {
    for (int b = 0; b < 4; b += 2) {
        narrow acc[4][2] = {{{0}, {0}}, {{0}, {0}}, {{0}, {0}}, {{0}, {0}}};
        long j = 0;
        for (; j + NARROW <= width; j += NARROW) {
            narrow first = read_narrow(k[b] + j), second = read_narrow(k[b + 1] + j);
            if (ahead) {
                __builtin_prefetch(ahead[b] + j, 0, FETCH);
                __builtin_prefetch(ahead[b + 1] + j, 0, FETCH);
            }
            for (int i = 0; i < 4; i++) {
                narrow row = *(const narrow *)(q + i * width + j);
                acc[i][0] += row * first, acc[i][1] += row * second;
            }
        }
        for (int i = 0; i < 4; i++)
            for (int t = 0; t < 2; t++) {
                float sum = narrow_total(acc[i][t]);
                for (long rest = j; rest < width; rest++) sum += q[i * width + rest] * read_one(k[b + t][rest]);
                s[i * BLOCK + b + t] = sum;
            }
    }
}

/* o[i] = o[i] * keep[i] + sum_b p[i][b] * v[b] for 4 rows and 2 vectors of columns at a time. */
INLINE long add_vectors(float *o, long rank, const float *keep, const float *p, const num *const *v,
                        const num *const *ahead, long rows) {
    (void)rows;
    long column = 0;
    for (; column + 2 * NARROW <= rank; column += 2 * NARROW) {
        narrow acc[4][2];
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < 2; c++) acc[i][c] = *(const narrow *)(o + i * rank + column + c * NARROW) * keep[i];
        for (int b = 0; b < BLOCK; b++) {
            narrow low = read_narrow(v[b] + column), high = read_narrow(v[b] + column + NARROW);
            if (ahead) __builtin_prefetch(ahead[b] + column, 0, FETCH);
            for (int i = 0; i < 4; i++) acc[i][0] += p[i * BLOCK + b] * low, acc[i][1] += p[i * BLOCK + b] * high;
        }
        for (int i = 0; i < 4; i++)
            for (int c = 0; c < 2; c++) *(narrow *)(o + i * rank + column + c * NARROW) = acc[i][c];
    }
    return column;
}
#endif

/* Of 4 rows, or of LEAST_ROWS; with `ahead` the values there are fetched meanwhile. */
INLINE void add_values(float *o, long rank, const float *keep, const float *p, const num *const *v,
                       const num *const *ahead, long rows) {
    for (long column = add_vectors(o, rank, keep, p, v, ahead, rows); column < rank; column++)
        for (int i = 0; i < rows; i++) {
            float sum = o[i * rank + column] * keep[i];
            for (int b = 0; b < BLOCK; b++) sum = fmaf(p[i * BLOCK + b], read_one(v[b][column]), sum);
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

/* Rows of BLOCK tokens from `at`, counted in numbers from the start of a pool; past the end the last one is repeated (its
   shares are 0). */
INLINE void locate(const step *s, long tile, long at, long *rows) {
    const int *pages = s->pages + s->page_at[tile];
    for (int b = 0; b < BLOCK; b++) {
        long token = at + b < s->tokens[tile] ? at + b : s->tokens[tile] - 1;
        long place = s->offset[tile] + token;
        rows[b] = ((long)pages[place / s->page_tokens] * s->page_tokens + place % s->page_tokens) * s->row;
    }
}

INLINE void point(const num *pool, const long *rows, const num **to) {
    for (int b = 0; b < BLOCK; b++) to[b] = pool + rows[b];
}

/* Numbers between rows that were taken back, which end with whole vectors. */
INLINE long taken_row(const step *s) { return s->width + DEEP; }

/* A head's keys, and values that are no part of them, of a block of rows in fp8; the `next` ones are fetched meanwhile. */
INLINE void take_back(const step *s, long head, const long *rows, const long *next, num *to) {
    const coded_row *c = s->coded;
    for (int side = 0; side < (s->values == s->keys ? 1 : 2); side++)
        for (int b = 0; b < BLOCK; b++, to += taken_row(s)) {
            const num *pool = side ? s->values : s->keys;
            const uint8_t *ahead = (const uint8_t *)(pool + next[b]);
            for (long k = 0; k < c->width; k += 64) __builtin_prefetch(ahead + head * c->width + k, 0, FETCH);
            for (long k = c->scales_at; k < c->bytes; k += 64) __builtin_prefetch(ahead + k, 0, FETCH);
            decode_part(c, (const uint8_t *)(pool + rows[b]), head, to);
        }
}

/* One pass over a tile: of each of the `count` heads of the pools from `group` on the pairs [low, low + GROUP / count),
   where a head of the pools has rows x heads / groups of them. */
typedef struct {
    long tile, group, count, low;
} pass;

/* The keys and values of a head, and where the rows of a block of tokens lie from there; no rows: none. */
typedef struct {
    const num *keys, *values;
    const long *rows;
} block;

INLINE block block_at(const step *s, long head, const long *rows) {
    block of = {s->keys + head * s->width, s->values + head * s->rank, rows};
    return of;
}

/* Shares of a head's pairs and the sums of their values, for one block of tokens. The `next` one is fetched meanwhile,
   keys beside the scores and values beside the sums: all at once they would wait for each other and nothing would run. */
INLINE void block_of(const step *s, const block *of, const block *next, long at, long padded, const float *q, float *o,
                     const long *seen, float *most, float *sum) {
    const num *k[BLOCK], *v[BLOCK], *keys[BLOCK], *values[BLOCK];
    point(of->keys, of->rows, k), point(of->values, of->rows, v);
    if (next->rows) point(next->keys, next->rows, keys), point(next->values, next->rows, values);
    for (long i = 0; i < padded; i += ROWS) {
        float shares[ROWS * BLOCK], keep[ROWS];
        long many = padded - i < HALF_ROWS ? LEAST_ROWS : padded - i < ROWS ? HALF_ROWS : ROWS;
        const num *const *ahead = i == 0 && next->rows ? keys : 0;
        /* Values that are the first part of the keys are on their way already. */
        const num *const *later = ahead && next->values != next->keys ? values : 0;
#if REGISTERS >= 32
        if (many == ROWS && ahead)
            for (int b = 0; b < BLOCK; b += 2) scores8(q, k + b, ahead + b, s->width, shares + b);
        else if (many == ROWS)
            for (int b = 0; b < BLOCK; b += 2) scores8(q + i * s->width, k + b, 0, s->width, shares + b);
        else if (many == LEAST_ROWS)
            for (int b = 0; b < BLOCK; b += 8)
                scores2(q + i * s->width, k + b, ahead ? ahead + b : 0, s->width, shares + b);
        else
#endif
            for (int b = 0; b < BLOCK; b += 4)
                scores4(q + i * s->width, k + b, ahead ? ahead + b : 0, s->width, shares + b);
        for (int r = 0; r < many; r++)
            keep[r] = soften(shares + r * BLOCK, seen[i + r] - at, s->scale, most + i + r, sum + i + r);
        for (int r = 0; r < many; r += HALF_ROWS)
            add_values(o + (i + r) * s->rank, s->rank, keep + r, shares + r * BLOCK, v, r == 0 ? later : 0,
                       many < HALF_ROWS ? many : HALF_ROWS);
    }
}

/* memory: width + rank floats for each of GROUP pairs, and with fp8 two blocks of rows. */
static void run_pass(const step *s, pass of, float *memory) {
    long first = s->row_at[of.tile], each = s->heads / s->groups;
    long pairs = (s->row_at[of.tile + 1] - first) * each - of.low, most_pairs = GROUP / of.count;
    if (pairs > most_pairs) pairs = most_pairs;
    long padded = pairs <= LEAST_ROWS ? LEAST_ROWS : (pairs + HALF_ROWS - 1) / HALF_ROWS * HALF_ROWS;
    long all = padded * of.count;
    float *q = memory, *o = memory + all * s->width;
    num *taken = (num *)(memory + GROUP * (s->width + s->rank));
    float most[GROUP], sum[GROUP];
    long seen[GROUP];
    for (long i = 0; i < padded; i++) {
        long entry = first + (of.low + i) / each, head = of.group * each + (of.low + i) % each;
        seen[i] = i < pairs ? s->visible[entry] : 0;
        for (long g = 0; g < of.count; g++) {
            float *to = q + (g * padded + i) * s->width;
            most[g * padded + i] = NEVER, sum[g * padded + i] = 0;
            if (i < pairs) widen_row(to, s->q + s->rows[entry] * s->q_t + (head + g * each) * s->q_h, s->width);
            else memset(to, 0, s->width * sizeof(float));
        }
    }
    memset(o, 0, all * s->rank * sizeof(float));
    long rows[2][BLOCK], taken_rows[BLOCK];
    int side = 0;
    for (int b = 0; b < BLOCK; b++) taken_rows[b] = b * taken_row(s);
    locate(s, of.tile, 0, rows[0]);
    for (long at = 0; at < s->tokens[of.tile]; at += BLOCK, side ^= 1) {
        locate(s, of.tile, at + BLOCK, rows[side ^ 1]);
        for (long g = 0; g < of.count; g++) {
            const long *here = rows[side], *later = rows[side ^ 1];
            long follows = g + 1 < of.count ? g + 1 : 0;
            block now = block_at(s, of.group + g, here);
            block next = block_at(s, of.group + follows, follows ? here : later);
            if (s->coded) {
                take_back(s, of.group + g, here, later, taken);
                now.keys = taken, now.values = s->values == s->keys ? taken : taken + BLOCK * taken_row(s);
                now.rows = taken_rows, next.rows = 0;
            }
            block_of(s, &now, &next, at, padded, q + g * padded * s->width, o + g * padded * s->rank, seen,
                     most + g * padded, sum + g * padded);
        }
    }
    for (long g = 0; g < of.count; g++)
        for (long i = 0; i < pairs; i++) {
            long entry = first + (of.low + i) / each, from = g * padded + i;
            long slot = entry * s->heads + (of.group + g) * each + (of.low + i) % each;
            memcpy(s->sums + slot * s->rank, o + from * s->rank, s->rank * sizeof(float));
            s->peaks[slot] = most[from], s->weights[slot] = sum[from];
        }
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

static void attend(const step *s, long tiles, long merges, const int *merge_rows, const int *merge_at, const int *merge,
                   num *out, int threads) {
    long each = s->heads / s->groups, most_rows = 0, work = 0;
    for (long tile = 0; tile < tiles; tile++) {
        long count = s->row_at[tile + 1] - s->row_at[tile];
        most_rows = count > most_rows ? count : most_rows, work += count * s->tokens[tile];
    }
    if (most_rows == 0) return;
    if (work * s->heads * (s->width + s->rank) < WORTH_A_TEAM) threads = 1;
    /* Few pairs take all heads of the pools in one pass, which then reads whole rows: a stream the memory is fast at. */
    long together = most_rows * each >= GROUP ? 1 : GROUP / ((most_rows * each + HALF_ROWS - 1) / HALF_ROWS * HALF_ROWS);
    if (together > s->groups) together = s->groups;
    long spans = (s->groups + together - 1) / together;
    long parts = together > 1 ? 1 : (most_rows * each + GROUP - 1) / GROUP;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        size_t taken = s->coded ? 2 * BLOCK * taken_row(s) * sizeof(num) : 0;
        float *mine = agentspeed_scratch(FOR_ATTENTION, GROUP * (s->width + s->rank) * sizeof(float) + taken);
#pragma omp for schedule(dynamic)
        for (long job = 0; job < tiles * spans * parts; job++) {
            long tile = job / (spans * parts), span = job / parts % spans, low = job % parts * GROUP;
            if (low >= (s->row_at[tile + 1] - s->row_at[tile]) * each) continue;
            long group = span * together, count = s->groups - group < together ? s->groups - group : together;
            pass of = {tile, group, count, low};
            run_pass(s, of, mine);
        }
#pragma omp for schedule(static)
        for (long job = 0; job < merges * s->heads; job++) {
            long m = job / s->heads, head = job % s->heads;
            merge_row(s, merge + merge_at[m], merge_at[m + 1] - merge_at[m], head,
                      out + ((long)merge_rows[m] * s->heads + head) * s->rank);
        }
    }
}

/* partials: [entries][heads] rows of rank + 2 floats. Rows of the pool are numbers, or with `fp8` bytes. */
EXPORT void NAME(mla_rows)(const num *q, long q_t, long q_h, const num *pool, long page_tokens, long width, long rank,
                           long heads, long tiles, const int *page_at, const int *pages, const int *offset,
                           const int *tokens, const int *row_at, const int *rows, const int *visible, long merges,
                           const int *merge_rows, const int *merge_at, const int *merge, float scale, float *partials,
                           long entries, num *out, int fp8, int threads) {
    coded_row coded = coded_rows(1, rank, width - rank);
    long row = fp8 ? coded.bytes / (long)sizeof(num) : width;
    step s = {q, q_t, q_h, pool, pool, row, page_tokens, width, rank, heads, 1, fp8 ? &coded : 0, page_at, pages, offset,
              tokens, row_at, rows, visible, scale, partials, partials + entries * heads * rank,
              partials + entries * heads * (rank + 1)};
    attend(&s, tiles, merges, merge_rows, merge_at, merge, out, threads);
}

/* Head h of the queries reads head h / (heads / groups) of the pools, whose rows are [groups][width], or bytes. */
EXPORT void NAME(gqa_rows)(const num *q, long q_t, long q_h, const num *keys, const num *values, long page_tokens,
                           long width, long heads, long groups, long tiles, const int *page_at, const int *pages,
                           const int *offset, const int *tokens, const int *row_at, const int *rows, const int *visible,
                           long merges, const int *merge_rows, const int *merge_at, const int *merge, float scale,
                           float *partials, long entries, num *out, int fp8, int threads) {
    coded_row coded = coded_rows(groups, width, 0);
    long row = fp8 ? coded.bytes / (long)sizeof(num) : groups * width;
    step s = {q, q_t, q_h, keys, values, row, page_tokens, width, width, heads, groups, fp8 ? &coded : 0, page_at, pages,
              offset, tokens, row_at, rows, visible, scale, partials, partials + entries * heads * width,
              partials + entries * heads * (width + 1)};
    attend(&s, tiles, merges, merge_rows, merge_at, merge, out, threads);
}
