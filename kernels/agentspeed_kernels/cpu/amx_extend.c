/* Attention of many new rows in bf16, head by head, a tile of the plan at a time.

   A head's keys are rows, left operands of transposed scores as in amx_attention.c; its values are written as pairs of
   tokens. Latents are decompressed to both first: two neighbouring rows of a product's result are such a pair already. Rows
   in fp8 are taken back to numbers before anything reads them. */
#include "amx_latents.h"

typedef struct {
    const bf16 *q;
    long q_t, q_h;
    const bf16 *key_up, *value_up; /* tile order: [heads][rank][nope] and [heads][value][rank] */
    long heads, rank, nope, rope, value, all_rows;
    tile_plan plan;
    cache rows;       /* padded rows are [whole steps of rank][whole steps of rope] */
    cache held;       /* values that are cached as they are, each head of them for `each` of the queries; else no pool */
    long each;
    long most_tokens; /* of a tile, whole groups of 32 */
    float scale;
    bf16 *out;
    /* Derived: steps of each width, and tiles of 16 values. */
    long rank_steps, nope_steps, rope_steps, value_tiles;
} extend;

/* One thread's memory for one head. */
typedef struct {
    bf16 *key_tiles, *keys, *values, *queries, *shares, *copies, *two; /* two: rows of values in fp8 as numbers */
    float *scores, *sums, *most, *weight, *block;
    sixteen *groups;
} desk;

/* The groups of 16 tokens of a tile, the last one padded with zeros. */
static void find_groups(const extend *e, const desk *d, const cache *rows, long tile) {
    const int *pages = e->plan.pages + e->plan.page_at[tile];
    long offset = e->plan.offset[tile], tokens = e->plan.tokens[tile];
    for (long g = 0; g < whole_tiles(tokens); g++) {
        d->groups[g] = together(rows, pages, offset, tokens, g * 16);
        if (d->groups[g].at) continue;
        bf16 *copy = d->copies + g * 16 * rows->stride;
        d->groups[g].at = copy, d->groups[g].bytes = 2 * rows->stride;
        memset(copy, 0, 16 * rows->stride * sizeof(bf16));
        for (long t = 0; t < 16 && g * 16 + t < tokens; t++) {
            const bf16 *from = cached_row(rows, pages, offset + g * 16 + t);
            bf16 *to = copy + t * rows->stride;
            if (rows->coded) {
                decode_head(rows->coded, bytes_of(from), rows->head, to);
                decode_plain(rows->coded, bytes_of(from), to + e->rank_steps * STEP);
                continue;
            }
            copy_row(to, from, e->rank);
            copy_row(to + e->rank_steps * STEP, from + e->rank, e->rope);
        }
    }
}

/* Cached values of a head as [value / 16][token / 32][16 pairs of tokens][16], zeros past the last token. */
static void pair_values(const extend *e, const desk *d, const cache *held, long tile) {
    const __m512i halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                            20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const int *pages = e->plan.pages + e->plan.page_at[tile];
    long offset = e->plan.offset[tile], tokens = e->plan.tokens[tile], pairs = e->most_tokens / 32;
    for (long t = 0; t < (tokens + 31) / 32 * 32; t += 2) {
        const bf16 *even = t < tokens ? cached_row(held, pages, offset + t) : 0;
        const bf16 *odd = t + 1 < tokens ? cached_row(held, pages, offset + t + 1) : 0;
        if (held->coded) {
            if (even) take_row(held, even, d->two), even = d->two;
            if (odd) take_row(held, odd, d->two + held->stride), odd = d->two + held->stride;
        }
        for (long v = 0; v < e->value_tiles; v++) {
            __mmask16 lanes = first_lanes(e->value - v * 16);
            __m256i x = even ? _mm256_maskz_loadu_epi16(lanes, even + v * 16) : _mm256_setzero_si256();
            __m256i y = odd ? _mm256_maskz_loadu_epi16(lanes, odd + v * 16) : _mm256_setzero_si256();
            __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
            _mm512_store_si512(d->values + ((v * pairs + t / 32) * 16 + t % 32 / 2) * STEP, _mm512_permutexvar_epi16(halves, both));
        }
    }
}

/* Keys [token][nope] and values [value / 16][token / 32][16 pairs of tokens][16] of a head. */
static void decompress(const extend *e, const desk *d, long head, long groups) {
    float made[SUMS] __attribute__((aligned(64)));
    long width = e->nope_steps * STEP, pairs = e->most_tokens / 32;
    const bf16 *value_up = e->value_up + head * e->value_tiles * e->rank_steps * TILE;
    for (long m = 0; m < groups; m += 2) {
        for (long t = 0; t < 2 * e->nope_steps; t++)
            for (long g = m; g < groups && g < m + 2; g++) {
                chain(d->groups[g].at, d->groups[g].bytes, d->key_tiles + t * e->rank_steps * TILE, e->rank_steps, made, 1, 0, 0);
                for (int r = 0; r < 16; r++) write16(d->keys + (g * 16 + r) * width + t * 16, _mm512_load_ps(made + r * 16));
            }
        for (long t = 0; t < e->value_tiles; t++)
            for (long g = m; g < groups && g < m + 2; g++) {
                chain(d->groups[g].at, d->groups[g].bytes, value_up + t * e->rank_steps * TILE, e->rank_steps, made, 1, 0, 0);
                bf16 *to = d->values + ((t * pairs + g / 2) * 16 + g % 2 * 8) * STEP;
                for (int r = 0; r < 8; r++)
                    _mm512_store_si512(to + r * STEP, paired(_mm512_load_ps(made + r * 32), _mm512_load_ps(made + r * 32 + 16)));
            }
    }
    if (groups % 2)
        for (long t = 0; t < e->value_tiles; t++) memset(d->values + ((t * pairs + groups / 2) * 16 + 8) * STEP, 0, 8 * STEP * 2);
}

/* Up to 16 rows of q as right operands: [steps of nope, then of rope][16][16 dwords]. */
static void load_queries(const extend *e, const desk *d, const int *rows, long count, long head) {
    for (long k = 0; k < e->nope_steps + e->rope_steps; k++) {
        int turned = k >= e->nope_steps;
        long at = turned ? (k - e->nope_steps) * STEP : k * STEP;
        __mmask32 lanes = first_halves((turned ? e->rope : e->nope) - at);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = i < count ? _mm512_maskz_loadu_epi16(lanes, e->q + rows[i] * e->q_t + head * e->q_h + (turned ? e->nope : 0) + at)
                             : _mm512_setzero_si512();
        transpose16(r);
        for (int i = 0; i < 16; i++) _mm512_store_si512(d->queries + k * TILE + i * STEP, r[i]);
    }
}

/* Scores of 16 rows and the tokens of `groups` groups, transposed. */
static void score(const extend *e, const desk *d, long groups) {
    long width = e->nope_steps * STEP, key_bytes = 2 * width;
    TILES;
    const bf16 *q = d->queries;
    if (e->nope_steps == 4 && e->rope_steps == 2) { /* the usual widths, 128 and 64: queries stay in registers */
        TILE_LOAD(2, q, 64);
        TILE_LOAD(3, q + TILE, 64);
        TILE_LOAD(4, q + 2 * TILE, 64);
        TILE_LOAD(5, q + 3 * TILE, 64);
        TILE_LOAD(6, q + 4 * TILE, 64);
        TILE_LOAD(7, q + 5 * TILE, 64);
        for (long g = 0; g < groups; g++) {
            const bf16 *key = d->keys + g * 16 * width, *turned = d->groups[g].at + e->rank_steps * STEP;
            long row_bytes = d->groups[g].bytes;
            TILE_ZERO(0);
            TILE_LOAD(1, key, key_bytes); TILE_DOT(0, 1, 2);
            TILE_LOAD(1, key + STEP, key_bytes); TILE_DOT(0, 1, 3);
            TILE_LOAD(1, key + 2 * STEP, key_bytes); TILE_DOT(0, 1, 4);
            TILE_LOAD(1, key + 3 * STEP, key_bytes); TILE_DOT(0, 1, 5);
            TILE_LOAD(1, turned, row_bytes); TILE_DOT(0, 1, 6);
            TILE_LOAD(1, turned + STEP, row_bytes); TILE_DOT(0, 1, 7);
            TILE_STORE(0, d->scores + g * SUMS, 64);
        }
        return;
    }
    for (long g = 0; g < groups; g++) {
        if (e->nope_steps) chain(d->keys + g * 16 * width, key_bytes, q, e->nope_steps, d->scores + g * SUMS, 1, 0, 0);
        chain(d->groups[g].at + e->rank_steps * STEP, d->groups[g].bytes, q + e->nope_steps * TILE, e->rope_steps,
              d->scores + g * SUMS, 1, e->nope_steps > 0, 0);
    }
}

/* Scores to shares in bf16, [token / 32] left operands; updates the peaks and sums of the rows, multiplies what they had. */
static void soften(const extend *e, const desk *d, const int *rows, long count, const int *seen, long groups) {
    const __m512 never = _mm512_set1_ps(NEVER), scale = _mm512_set1_ps(e->scale * LOG2E);
    float most[16], sum[16], keep[16];
    long low = 1L << 30, width = e->value_tiles * 16, halves = (groups + 1) / 2;
    for (long i = 0; i < 16; i++) {
        most[i] = i < count ? d->most[rows[i]] : NEVER, sum[i] = i < count ? d->weight[rows[i]] : 0;
        low = at_most(low, seen[i]);
    }
    __m512i last = _mm512_loadu_si512(seen);
    for (long t = low / 16 * 16; t < groups * 16; t++)
        _mm512_store_ps(d->scores + t * 16, _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(_mm512_set1_epi32((int)t), last), never,
                                                               _mm512_load_ps(d->scores + t * 16)));
    __m512 a = never, b = never;
    for (long t = 0; t < groups * 16; t += 2) {
        a = _mm512_max_ps(a, _mm512_load_ps(d->scores + t * 16));
        b = _mm512_max_ps(b, _mm512_load_ps(d->scores + t * 16 + 16));
    }
    /* A row that sees nothing here must not take the peak of nothing: its shares would not be 0. */
    __m512 before = _mm512_loadu_ps(most), here = _mm512_max_ps(_mm512_mul_ps(_mm512_max_ps(a, b), scale), _mm512_set1_ps(-1e20f));
    __m512 now = _mm512_max_ps(before, here), total = _mm512_loadu_ps(sum);
    if (_mm512_cmp_ps_mask(now, before, _CMP_GT_OQ)) {
        __m512 by = exp2_16(_mm512_sub_ps(before, now));
        _mm512_storeu_ps(keep, by), _mm512_storeu_ps(most, now);
        total = _mm512_mul_ps(total, by);
        for (long i = 0; i < count; i++)
            for (long j = 0; j < width; j += 16) {
                float *at = d->sums + rows[i] * width + j;
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(keep[i])));
            }
    }
    if (groups % 2)
        for (int t = 0; t < 16; t++) _mm512_store_ps(d->scores + (groups * 16 + t) * 16, never);
    for (long h = 0; h < halves; h++) {
        __m512i r[16];
        for (int t = 0; t < 16; t++) {
            const float *at = d->scores + (h * 32 + 2 * t) * 16;
            __m512 even = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(at), scale, now));
            __m512 odd = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(at + 16), scale, now));
            total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
            r[t] = paired(even, odd);
        }
        transpose16(r);
        for (int t = 0; t < 16; t++) _mm512_store_si512(d->shares + h * TILE + t * STEP, r[t]);
    }
    _mm512_storeu_ps(sum, total);
    for (long i = 0; i < count; i++) d->most[rows[i]] = most[i], d->weight[rows[i]] = sum[i];
}

/* sums of the rows += shares x values */
static void add_values(const extend *e, const desk *d, const int *rows, long count, long halves) {
    long width = e->value_tiles * 16, pairs = e->most_tokens / 32;
    int neighbours = count == 16;
    TILES;
    for (long i = 1; i < count; i++) neighbours &= rows[i] == rows[0] + i;
    float *at = neighbours ? d->sums + rows[0] * width : d->block;
    if (!neighbours)
        for (long i = 0; i < count; i++) memcpy(at + i * width, d->sums + rows[i] * width, width * sizeof(float));
    for (long v = 0; v < e->value_tiles; v++) {
        TILE_LOAD_SUM(0, at + v * 16, width * 4);
        for (long h = 0; h < halves; h++) {
            TILE_LOAD(1, d->shares + h * TILE, 64);
            TILE_LOAD(2, d->values + (v * pairs + h) * TILE, 64);
            TILE_DOT(0, 1, 2);
        }
        TILE_STORE(0, at + v * 16, width * 4);
    }
    if (!neighbours)
        for (long i = 0; i < count; i++) memcpy(d->sums + rows[i] * width, at + i * width, width * sizeof(float));
}

static void attend_tile(const extend *e, const desk *d, long tile, long head) {
    long first = e->plan.row_at[tile], count = e->plan.row_at[tile + 1] - first;
    cache keys = e->rows, held = e->held;
    if (held.pool) keys = from_head(keys, head / e->each, e->rope), held = from_head(held, head / e->each, e->value);
    find_groups(e, d, &keys, tile);
    if (held.pool) pair_values(e, d, &held, tile);
    else decompress(e, d, head, whole_tiles(e->plan.tokens[tile]));
    for (long b = 0; b < count; b += 16) {
        const int *rows = e->plan.rows + first + b;
        long many = at_most(count - b, 16), groups = 0;
        int seen[16];
        for (long i = 0; i < 16; i++) {
            seen[i] = i < many ? e->plan.visible[first + b + i] : 0;
            groups = whole_tiles(seen[i]) > groups ? whole_tiles(seen[i]) : groups;
        }
        load_queries(e, d, rows, many, head);
        score(e, d, groups);
        soften(e, d, rows, many, seen, groups);
        add_values(e, d, rows, many, (groups + 1) / 2);
    }
}

INLINE char *cut_off(char **memory, size_t bytes) {
    char *at = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return at;
}

/* The memory of one thread; with memory 0, only how much it is. */
static size_t lay_out(const extend *e, char *memory, desk *d) {
    char *at = memory;
    long tokens = e->most_tokens, values = e->value_tiles * 16;
    d->key_tiles = (bf16 *)cut_off(&at, 2 * e->nope_steps * e->rank_steps * TILE * 2);
    d->keys = (bf16 *)cut_off(&at, tokens * e->nope_steps * STEP * 2);
    d->values = (bf16 *)cut_off(&at, tokens * values * 2);
    d->queries = (bf16 *)cut_off(&at, (e->nope_steps + e->rope_steps) * TILE * 2);
    d->shares = (bf16 *)cut_off(&at, tokens / 32 * TILE * 2);
    d->copies = (bf16 *)cut_off(&at, tokens * e->rows.stride * 2);
    d->two = (bf16 *)cut_off(&at, e->held.coded ? 2 * e->held.stride * 2 : 0);
    d->scores = (float *)cut_off(&at, tokens * 64);
    d->sums = (float *)cut_off(&at, e->all_rows * values * 4);
    d->most = (float *)cut_off(&at, e->all_rows * 4);
    d->weight = (float *)cut_off(&at, e->all_rows * 4);
    d->block = (float *)cut_off(&at, 16 * values * 4);
    d->groups = (sixteen *)cut_off(&at, tokens / 16 * sizeof(sixteen));
    return at - memory;
}

static void attend(extend e, long tiles, long merges, const int *merge_rows, int threads) {
    e.rank_steps = whole_steps(e.rank), e.nope_steps = whole_steps(e.nope), e.rope_steps = whole_steps(e.rope);
    e.value_tiles = whole_tiles(e.value), e.rows.stride = (e.rank_steps + e.rope_steps) * STEP;
    for (long tile = 0; tile < tiles; tile++)
        if (e.plan.tokens[tile] > e.most_tokens) e.most_tokens = e.plan.tokens[tile];
    e.most_tokens = (e.most_tokens + 31) / 32 * 32;
    desk plan;
    size_t bytes = lay_out(&e, 0, &plan);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        desk d;
        lay_out(&e, agentspeed_scratch(FOR_ATTENTION, bytes), &d);
        long values = e.value_tiles * 16;
        tiles_begin(0);
#pragma omp for schedule(dynamic)
        for (long head = 0; head < e.heads; head++) {
            memset(d.sums, 0, e.all_rows * values * sizeof(float));
            memset(d.block, 0, 16 * values * sizeof(float));
            for (long r = 0; r < e.all_rows; r++) d.most[r] = NEVER, d.weight[r] = 0;
            if (e.key_up) turn_key_up(e.key_up, e.rank, e.nope, head, d.key_tiles);
            for (long tile = 0; tile < tiles; tile++) attend_tile(&e, &d, tile, head);
            for (long i = 0; i < merges; i++) {
                long r = merge_rows[i];
                __m512 by = _mm512_set1_ps(1.0f / d.weight[r]);
                bf16 *to = e.out + (r * e.heads + head) * e.value;
                for (long j = 0; j < e.value; j += 16)
                    write_some(to + j, first_lanes(e.value - j), _mm512_mul_ps(_mm512_loadu_ps(d.sums + r * values + j), by));
            }
        }
        tiles_end();
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
    int direct = rank % STEP == 0 && rope % STEP == 0;
    extend e = {.q = q, .q_t = q_t, .q_h = q_h, .key_up = key_up, .value_up = value_up, .heads = heads, .rank = rank,
                .nope = nope, .rope = rope, .value = value, .all_rows = all_rows, .scale = scale, .out = out,
                .plan = {page_at, pages, offset, tokens, row_at, rows, visible},
                .rows = cache_of(pool, page_tokens, width, width, direct, fp8 ? &coded : 0)};
    attend(e, tiles, merges, merge_rows, threads);
}

/* Head h of the queries reads head h / (heads / groups) of the pools, whose rows are [groups][width], or bytes. */
EXPORT void NAME(gqa_extend)(const bf16 *q, long q_t, long q_h, const bf16 *keys, const bf16 *values, long page_tokens,
                             long width, long heads, long groups, long all_rows, long tiles, const int *page_at,
                             const int *pages, const int *offset, const int *tokens, const int *row_at, const int *rows,
                             const int *visible, long merges, const int *merge_rows, float scale, bf16 *out, int fp8,
                             int threads) {
    coded_row bytes = coded_rows(groups, width, 0), *coded = fp8 ? &bytes : 0;
    /* Keys are what latents have behind their rank: the part that is read as it is cached. */
    extend e = {.q = q, .q_t = q_t, .q_h = q_h, .heads = heads, .rope = width, .value = width, .all_rows = all_rows,
                .scale = scale, .out = out, .plan = {page_at, pages, offset, tokens, row_at, rows, visible},
                .rows = cache_of(keys, page_tokens, groups * width, width, width % STEP == 0, coded),
                .held = cache_of(values, page_tokens, groups * width, width, 0, coded), .each = heads / groups};
    attend(e, tiles, merges, merge_rows, threads);
}
