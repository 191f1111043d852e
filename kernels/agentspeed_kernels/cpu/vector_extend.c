/* Attention of many new rows in bf16 on vectors: blocks of cached tokens, and in each the heads that share them.

   Rows of queries are packed in panels of 12 (vector_products.h); a block's keys lie in the order of weights, and its values as
   pairs of tokens. Latents are decompressed to both: two neighbouring rows of a product's result are such a pair already.
   Shares of the softmax stay rows, for a pair of neighbouring tokens is what is broadcast. Rows in fp8 are taken back to
   numbers before they are packed. */
#include "amx_latents.h"
#include "vector_products.h"

#define TOKENS 512               /* of a block */
#define SCORES (TOKENS + 16)     /* floats between rows of scores, which must not fall on the same lines of the first cache */
#define SHARES (TOKENS + 32)     /* numbers between rows of shares, likewise */
#define GROWTH 8.0f              /* sums are rescaled only when a peak has grown by more than 2 to this power */
#define MOST_HEADS 4             /* that share a block in one job: their sums lie beside it */
#define AHEAD 32                 /* tokens that are fetched while others are packed */
#define HALF_TILE 8              /* rows of a packed tile that make one product with two columns */

typedef struct {
    const bf16 *q;
    long q_t, q_h;
    const bf16 *key_up, *value_up; /* tile order: [heads][rank][nope] and [heads][value][rank] */
    long heads, groups, rank, nope, rope, value, all_rows; /* groups: heads of the pools */
    tile_plan plan;
    cache rows, held;              /* held: cached values; without a pool they come from the latents */
    float scale;
    bf16 *out;
    /* Derived: steps of each width, and of both parts of a key; tiles of values, an even number of them. */
    long rank_steps, nope_steps, rope_steps, key_steps, value_tiles, width;
} extend;

/* One job's memory. */
typedef struct {
    bf16 *key_up, *latents, *keys, *values, *queries, *shares, *taken; /* taken: rows of fp8 as numbers */
    float *scores, *sums, *most, *weight, *panel, *made;
} desk;

/* The heads [low, high) of queries, which all read head `group` of the pools. */
typedef struct {
    long group, low, high;
} job;

/* Tokens [at, at + count) of a tile of the plan. */
typedef struct {
    long tile, at, count, whole; /* whole: count in whole steps */
} block;

INLINE void times_shares(long rows, const bf16 *shares, const bf16 *first, const bf16 *second, long pairs, float *sums, long stride) {
    const int32_t *a = (const int32_t *)shares;
    switch (rows) {
#define SOME(n) case n: times_rows(n, 2, a, 1, SHARES / 2, first, second, pairs, sums, stride, 1, 0); break;
    EVERY_PANEL(SOME)
#undef SOME
    }
}

/* The cached rows of a block; 0 past its last token. */
static void find_rows(const extend *e, const cache *c, const block *b, const bf16 **rows) {
    const int *pages = e->plan.pages + e->plan.page_at[b->tile];
    long place = e->plan.offset[b->tile] + b->at, page = place / c->page_tokens, within = place % c->page_tokens;
    for (long t = 0; t < b->whole; t++) {
        rows[t] = t < b->count ? c->pool + ((long)pages[page] * c->page_tokens + within) * c->row : 0;
        if (++within == c->page_tokens) page++, within = 0;
    }
}

/* Values of 16 tokens from t on, as [value / 16][pair of tokens][16]. */
INLINE void pair_values(const extend *e, const desk *d, const bf16 *const *rows, long t, long column) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (long i = t; i < t + 16; i += 2)
        for (long v = 0; v < e->value_tiles; v += 2) {
            __mmask32 lanes = first_halves(e->value - v * 16);
            long from = column + v * 16;
            __m512i even = rows[i] ? _mm512_maskz_loadu_epi16(lanes, rows[i] + from) : _mm512_setzero_si512();
            __m512i odd = rows[i + 1] ? _mm512_maskz_loadu_epi16(lanes, rows[i + 1] + from) : _mm512_setzero_si512();
            bf16 *to = d->values + (v * TOKENS / 2 + i / 2) * STEP;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(to + TOKENS / 2 * STEP, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* Pieces of rows are too short for the hardware to run ahead on. */
INLINE void fetch_rows(const bf16 *const *rows, long count, long column, long width) {
    for (long i = 0; i < count; i++)
        for (long k = 0; rows[i] && k < width; k += STEP) NEAR(rows[i] + column + k);
}

/* Rows in fp8 as numbers. */
static void take_back(const cache *c, long group, long count, bf16 *to, const bf16 **rows) {
    cache one = from_head(*c, group, 0);
    for (long t = 0; t < count; t++, to += c->stride) {
        for (long k = 0; k < c->coded->bytes && t + AHEAD < count; k += 64) NEAR(bytes_of(rows[t + AHEAD]) + k);
        take_row(&one, rows[t], to);
        rows[t] = to;
    }
}

/* What the heads of a job share: keys or the turned part of them, and values or latents. */
static void pack_block(const extend *e, const desk *d, const block *b, const job *j) {
    const bf16 *rows[TOKENS], *held[TOKENS];
    long keys = e->rank + j->group * e->rope, values = j->group * e->value;
    find_rows(e, &e->rows, b, rows);
    if (e->held.pool) find_rows(e, &e->held, b, held);
    if (e->rows.coded) {
        take_back(&e->rows, j->group, b->count, d->taken, rows);
        if (e->held.pool) take_back(&e->held, j->group, b->count, d->taken + TOKENS * e->rows.stride, held);
        keys = e->rank, values = 0; /* of what was taken back */
    }
    for (long t = 0; t < b->whole; t += 16) {
        const bf16 *turned[16];
        long next = at_most(b->whole - t - AHEAD, 16);
        if (next > 0 && e->held.pool && !e->rows.coded) {
            fetch_rows(rows + t + AHEAD, next, keys, e->rope);
            fetch_rows(held + t + AHEAD, next, values, e->value);
        }
        if (!e->held.pool) pack_panel(rows + t, 16, e->rank, d->latents + t / 16 * e->rank_steps * TILE);
        for (int i = 0; i < 16; i++) turned[i] = rows[t + i] ? rows[t + i] + keys : 0;
        pack_panel(turned, 16, e->rope, d->keys + (t / 16 * e->key_steps + e->nope_steps) * TILE);
        if (e->held.pool) pair_values(e, d, held, t, values);
    }
}

/* made[8][COLUMNS] as 4 rows of pairs, in two columns of tiles. */
INLINE void put_pairs(const float *made, bf16 *first, bf16 *second) {
    for (int i = 0; i < HALF_TILE / 2; i++) {
        const float *even = made + 2 * i * COLUMNS, *odd = even + COLUMNS;
        _mm512_store_si512(first + i * STEP, paired(_mm512_loadu_ps(even), _mm512_loadu_ps(odd)));
        if (second) _mm512_store_si512(second + i * STEP, paired(_mm512_loadu_ps(even + 16), _mm512_loadu_ps(odd + 16)));
    }
}

INLINE void times_half(const bf16 *tile, long half, const bf16 *first, const bf16 *second, long steps, float *made) {
    times_rows(HALF_TILE, 2, (const int32_t *)tile + half * HALF_TILE, 16, 1, first, second, steps * 16, made, COLUMNS, 0, 0);
}

/* A head's keys, but the turned part, and its values of a block. */
static void decompress(const extend *e, const desk *d, const block *b, long head, const bf16 *key_up) {
    long size = e->rank_steps * TILE, tiles = whole_tiles(e->value);
    const bf16 *value_up = e->value_up + head * tiles * size;
    for (long t = 0; t < b->whole / 16; t += 2)
        for (long n = 0; n < 2 * e->nope_steps; n++)
            for (long half = 0; half < 2; half++) {
                bf16 *to = d->keys + t * e->key_steps * TILE + (n * 2 + half) * HALF_TILE / 2 * STEP;
                times_half(key_up + n * size, half, d->latents + t * size, d->latents + (t + 1) * size, e->rank_steps, d->made);
                put_pairs(d->made, to, to + e->key_steps * TILE);
            }
    for (long t = 0; t < b->whole / 16; t++)
        for (long half = 0; half < 2; half++)
            for (long v = 0; v < tiles; v += 2) {
                bf16 *to = d->values + (v * TOKENS / 2 + (t * 2 + half) * HALF_TILE / 2) * STEP;
                const bf16 *first = value_up + v * size;
                times_half(d->latents + t * size, half, first, v + 1 < tiles ? first + size : first, e->rank_steps, d->made);
                put_pairs(d->made, to, v + 1 < tiles ? to + TOKENS / 2 * STEP : 0);
            }
}

/* Scores of a row to shares, zeros from `seen` to `whole`; updates the row's peak and sum, and multiplies what it had. */
static void soften(const extend *e, const float *scores, bf16 *shares, long seen, long whole, float *most, float *weight, float *sums) {
    const __m512 never = _mm512_set1_ps(NEVER);
    long full = seen / 32 * 32, t = 0;
    if (seen <= 0) {
        memset(shares, 0, whole * sizeof(bf16));
        return;
    }
    __mmask16 low = first_lanes(seen - full), high = first_lanes(seen - full - 16);
    __m512 a = never, b = never;
    for (; t < full; t += 32) {
        a = _mm512_max_ps(a, _mm512_load_ps(scores + t));
        b = _mm512_max_ps(b, _mm512_load_ps(scores + t + 16));
    }
    if (full < seen) {
        a = _mm512_mask_max_ps(a, low, a, _mm512_load_ps(scores + t));
        b = _mm512_mask_max_ps(b, high, b, _mm512_load_ps(scores + t + 16));
    }
    float here = _mm512_reduce_max_ps(_mm512_max_ps(a, b)) * e->scale;
    if (here > *most + GROWTH) {
        float keep = *most > NEVER ? exp2f(*most - here) : 0;
        for (long i = 0; i < e->width; i += 16)
            _mm512_store_ps(sums + i, _mm512_mul_ps(_mm512_load_ps(sums + i), _mm512_set1_ps(keep)));
        *weight *= keep, *most = here;
    }
    const __m512 peak = _mm512_set1_ps(*most), scale = _mm512_set1_ps(e->scale);
    a = b = _mm512_setzero_ps();
    for (t = 0; t < full; t += 32) {
        __m512 x = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + t), scale, peak));
        __m512 y = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + t + 16), scale, peak));
        a = _mm512_add_ps(a, x), b = _mm512_add_ps(b, y);
        _mm512_store_si512(shares + t, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
    if (full < seen) {
        __m512 x = _mm512_maskz_mov_ps(low, exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + t), scale, peak)));
        __m512 y = _mm512_maskz_mov_ps(high, exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + t + 16), scale, peak)));
        a = _mm512_add_ps(a, x), b = _mm512_add_ps(b, y);
        _mm512_store_si512(shares + t, (__m512i)_mm512_cvtne2ps_pbh(y, x));
        t += 32;
    }
    for (; t < whole; t += 32) _mm512_store_si512(shares + t, _mm512_setzero_si512());
    *weight += _mm512_reduce_add_ps(_mm512_add_ps(a, b));
}

/* Adds what `count` entries of a block's tile from `first` on see of it; sums, most and weight are the head's. */
static void attend_panel(const extend *e, const desk *d, const block *b, long head, long first, long count, float *sums,
                         float *most, float *weight) {
    const int *rows = e->plan.rows + first;
    const bf16 *q[PANEL];
    long seen[PANEL], whole = 0, neighbours = 1, size = e->key_steps * TILE, pairs = e->nope_steps * 16;
    for (long r = 0; r < count; r++) {
        seen[r] = at_most(e->plan.visible[first + r] - b->at, b->count);
        whole = seen[r] > whole ? seen[r] : whole;
        neighbours &= rows[r] == rows[0] + r;
        q[r] = e->q + rows[r] * e->q_t + head * e->q_h;
    }
    if (!whole) return;
    whole = whole_steps(whole) * STEP;
    if (e->nope) pack_panel(q, count, e->nope, d->queries);
    for (long r = 0; r < count; r++) q[r] += e->nope;
    pack_panel(q, count, e->rope, d->queries + pairs * 2 * count);
    for (long t = 0; t < whole; t += COLUMNS)
        times_panel(count, d->queries, d->keys + t / 16 * size, d->keys + (t / 16 + 1) * size, e->key_steps * 16, d->scores + t,
                    SCORES, 0, 0);
    for (long r = 0; r < count; r++)
        soften(e, d->scores + r * SCORES, d->shares + r * SHARES, seen[r], whole, most + rows[r], weight + rows[r],
               sums + rows[r] * e->width);
    float *to = neighbours ? sums + rows[0] * e->width : d->panel;
    if (!neighbours)
        for (long r = 0; r < count; r++) memcpy(to + r * e->width, sums + rows[r] * e->width, e->width * sizeof(float));
    for (long v = 0; v < e->value_tiles; v += 2) {
        const bf16 *values = d->values + v * TOKENS / 2 * STEP;
        times_shares(count, d->shares, values, values + TOKENS / 2 * STEP, whole / 2, to + v * 16, e->width);
    }
    if (!neighbours)
        for (long r = 0; r < count; r++) memcpy(sums + rows[r] * e->width, to + r * e->width, e->width * sizeof(float));
}

static void run_job(const extend *e, const desk *d, const job *j, long tiles, long merges, const int *merge_rows) {
    long up = 2 * e->nope_steps * e->rank_steps * TILE, heads = j->high - j->low;
    memset(d->sums, 0, heads * e->all_rows * e->width * sizeof(float));
    memset(d->weight, 0, heads * e->all_rows * sizeof(float));
    for (long i = 0; i < heads * e->all_rows; i++) d->most[i] = NEVER;
    /* An odd last tile of values has one of zeros beside it. */
    memset(d->values + (e->value_tiles - 1) * TOKENS / 2 * STEP, 0, TOKENS / 2 * STEP * sizeof(bf16));
    for (long h = 0; e->key_up && h < heads; h++)
        turn_key_up(e->key_up, e->rank, e->nope, j->low + h, d->key_up + h * up);
    for (long tile = 0; tile < tiles; tile++)
        for (long at = 0; at < e->plan.tokens[tile]; at += TOKENS) {
            long first = e->plan.row_at[tile], count = e->plan.row_at[tile + 1] - first;
            block b = {tile, at, at_most(e->plan.tokens[tile] - at, TOKENS), 0};
            b.whole = whole_steps(b.count) * STEP;
            pack_block(e, d, &b, j);
            for (long h = 0; h < heads; h++) {
                if (e->key_up) decompress(e, d, &b, j->low + h, d->key_up + h * up);
                for (long i = 0; i < panels_of(count); i++) {
                    long from = panel_at(count, i), many = panel_at(count, i + 1) - from;
                    attend_panel(e, d, &b, j->low + h, first + from, many, d->sums + h * e->all_rows * e->width,
                                 d->most + h * e->all_rows, d->weight + h * e->all_rows);
                }
            }
        }
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < merges; i++) {
            long r = merge_rows[i];
            __m512 by = _mm512_set1_ps(1.0f / d->weight[h * e->all_rows + r]);
            const float *from = d->sums + (h * e->all_rows + r) * e->width;
            bf16 *to = e->out + (r * e->heads + j->low + h) * e->value;
            for (long k = 0; k < e->value; k += 16)
                write_some(to + k, first_lanes(e->value - k), _mm512_mul_ps(_mm512_load_ps(from + k), by));
        }
}

INLINE char *cut_off(char **memory, size_t bytes) {
    char *at = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return at;
}

/* The memory of a job of so many heads; with memory 0, only how much it is. */
static size_t lay_out(const extend *e, long heads, char *memory, desk *d) {
    char *at = memory;
    long size = e->key_steps * TILE;
    d->key_up = (bf16 *)cut_off(&at, heads * 2 * e->nope_steps * e->rank_steps * TILE * 2);
    d->latents = (bf16 *)cut_off(&at, TOKENS / 16 * e->rank_steps * TILE * 2);
    d->keys = (bf16 *)cut_off(&at, TOKENS / 16 * size * 2);
    d->values = (bf16 *)cut_off(&at, e->value_tiles * TOKENS / 2 * STEP * 2);
    d->queries = (bf16 *)cut_off(&at, size * 2 + 64);
    d->shares = (bf16 *)cut_off(&at, PANEL * SHARES * 2);
    d->scores = (float *)cut_off(&at, PANEL * SCORES * 4);
    d->taken = (bf16 *)cut_off(&at, e->rows.coded ? TOKENS * (e->rows.stride + e->held.stride) * 2 : 0);
    d->made = (float *)cut_off(&at, HALF_TILE * COLUMNS * 4);
    d->panel = (float *)cut_off(&at, PANEL * e->width * 4);
    d->sums = (float *)cut_off(&at, heads * e->all_rows * e->width * 4);
    d->most = (float *)cut_off(&at, heads * e->all_rows * 4);
    d->weight = (float *)cut_off(&at, heads * e->all_rows * 4);
    return at - memory;
}

static void attend(extend e, long tiles, long merges, const int *merge_rows, int threads) {
    e.rank_steps = whole_steps(e.rank), e.nope_steps = whole_steps(e.nope), e.rope_steps = whole_steps(e.rope);
    e.key_steps = e.nope_steps + e.rope_steps, e.value_tiles = (whole_tiles(e.value) + 1) / 2 * 2, e.width = e.value_tiles * 16;
    e.scale *= LOG2E;
    long each = e.heads / e.groups, wanted = threads > 1 ? 2 * threads : 1;
    long parts = (wanted + e.groups - 1) / e.groups, least = (each + MOST_HEADS - 1) / MOST_HEADS;
    parts = at_most(parts > least ? parts : least, each);
    long most = (each + parts - 1) / parts;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        desk d;
        size_t bytes = lay_out(&e, most, 0, &d);
        lay_out(&e, most, agentspeed_scratch(FOR_ATTENTION, bytes), &d);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < e.groups * parts; i++) {
            long group = i / parts, part = i % parts;
            job j = {group, group * each + each * part / parts, group * each + each * (part + 1) / parts};
            run_job(&e, &d, &j, tiles, merges, merge_rows);
        }
    }
}

/* Rows of the pool are numbers, or with `fp8` bytes. */
EXPORT void NAME(mla_extend)(const bf16 *q, long q_t, long q_h, const bf16 *pool, long page_tokens, long width,
                             const bf16 *key_up, const bf16 *value_up, long heads, long rank, long nope, long rope,
                             long value, long all_rows, long tiles, const int *page_at, const int *pages,
                             const int *offset, const int *tokens, const int *row_at, const int *rows,
                             const int *visible, long merges, const int *merge_rows, float scale, bf16 *out, int fp8,
                             int threads) {
    coded_row coded = coded_rows(1, rank, rope);
    extend e = {.q = q, .q_t = q_t, .q_h = q_h, .key_up = key_up, .value_up = value_up, .heads = heads, .groups = 1,
                .rank = rank, .nope = nope, .rope = rope, .value = value, .all_rows = all_rows, .scale = scale, .out = out,
                .plan = {page_at, pages, offset, tokens, row_at, rows, visible},
                .rows = cache_of(pool, page_tokens, width, width, 0, fp8 ? &coded : 0)};
    attend(e, tiles, merges, merge_rows, threads);
}

/* Head h of the queries reads head h / (heads / groups) of the pools, whose rows are [groups][width], or bytes. */
EXPORT void NAME(gqa_extend)(const bf16 *q, long q_t, long q_h, const bf16 *keys, const bf16 *values, long page_tokens,
                             long width, long heads, long groups, long all_rows, long tiles, const int *page_at,
                             const int *pages, const int *offset, const int *tokens, const int *row_at, const int *rows,
                             const int *visible, long merges, const int *merge_rows, float scale, bf16 *out, int fp8,
                             int threads) {
    coded_row held = coded_rows(groups, width, 0), *coded = fp8 ? &held : 0;
    /* Keys are what latents have behind their rank: the part that is read as it is cached. */
    extend e = {.q = q, .q_t = q_t, .q_h = q_h, .heads = heads, .groups = groups, .rope = width, .value = width,
                .all_rows = all_rows, .scale = scale, .out = out, .plan = {page_at, pages, offset, tokens, row_at, rows, visible},
                .rows = cache_of(keys, page_tokens, groups * width, width, 0, coded),
                .held = cache_of(values, page_tokens, groups * width, width, 0, coded)};
    attend(e, tiles, merges, merge_rows, threads);
}
