/* Passes over a tile with the tiles of AMX.

   Scores are made transposed, [token][pair]: cached rows are the left operand where they lie, queries are packed once a
   tile, and the softmax of 16 (row, head) pairs is vertical. A pair of bf16 numbers down a column is what a right operand
   wants, and two neighbouring columns of one token are not: so
   - up to 8 pairs take cached rows as the right operand as they are. Left rows 0 to 7 hold the shares as (p, 0) and rows
     8 to 15 as (0, p): even columns come out in the former, odd ones in the latter, and no operand is packed.
   - more pairs share rows whose tokens were interleaved two by two, 32 columns at a time, in the first cache.

   Rows in fp8 become bf16 numbers without their scales, exactly, once for scores and values: scales of keys go to the
   scores, before the plain part of latents is added, those of values to the shares. */
#ifndef AGENTSPEED_AMX_ROWS_H
#define AGENTSPEED_AMX_ROWS_H
#include "vector_cache.h"

#define FEW_PAIRS 8
#define FEW_TOKENS 64
#define MANY_TOKENS 128

#define SHARED_ROWS 8 /* of 16 rows, those that are fetched while scores are made, where values are part of them */

/* One chain: 16 tokens x 16 pairs. The rows at `far` go to the second cache meanwhile, all at `near` to the first: where
   they are values too, half of `far` is fetched while values are summed, so that neither phase waits for memory alone. */
INLINE void score_group(const step *s, sixteen rows, const bf16 *q, float *to, sixteen far, sixteen near) {
    long steps = s->keys.stride / STEP, many = s->shared ? SHARED_ROWS : 16;
    TILES;
    TILE_ZERO(0);
    for (long k = 0; k < steps; k++) {
        if (far.at) for (long z = 0; z < many; z++) FAR((const char *)far.at + z * far.bytes + k * 64);
        if (near.at) for (int z = 0; z < 16; z++) NEAR((const char *)near.at + z * near.bytes + k * 64);
        TILE_LOAD(1, rows.at + k * STEP, rows.bytes);
        TILE_LOAD(2, q + k * TILE, 64);
        TILE_DOT(0, 1, 2);
    }
    TILE_STORE(0, to, 64);
}

/* Part `j` of `parts` of what `score_group` left of the rows whose values come next. */
INLINE void fetch_rest(const step *s, sixteen far, long j, long parts) {
    long lines = (s->shared ? s->keys.stride : s->held.stride) / STEP, each = (lines + parts - 1) / parts;
    for (long z = s->shared ? SHARED_ROWS : 0; z < 16; z++)
        for (long k = j * each; k < (j + 1) * each && k < lines; k++) FAR((const char *)far.at + z * far.bytes + k * 64);
}

/* Where the groups of 16 tokens from `at` on are read, and those of the next block: keys, and values. */
typedef struct {
    sixteen keys[8], held[8], next_keys[8], next_held[8];
    float by_key[MANY_TOKENS] __attribute__((aligned(64))), by_value[MANY_TOKENS] __attribute__((aligned(64))); /* scales */
} rows_of_block;

/* Whether rows are read without their scales: what is plain of a row begins a step. */
INLINE int without_scales(const cache *c) { return c->coded && (!c->coded->plain || c->coded->width % STEP == 0); }

INLINE const uint8_t *coded_head(const cache *c, const uint8_t *row) { return row + c->head * c->coded->width; }

/* 16 rows in fp8 that lie together, for fetching. */
INLINE sixteen bytes_together(const cache *c, const part *p, long at) {
    long place = p->offset + at;
    sixteen found = {0, 2 * c->row};
    if (at + 16 <= p->tokens && place % c->page_tokens + 16 <= c->page_tokens)
        found.at = (const bf16 *)coded_head(c, bytes_of(cached_row(c, p->pages, place)));
    return found;
}

/* One row, while the first lines of the row at `next` (0: none), one for 128 numbers, go to the second cache. Its scale. */
INLINE float take_bare(const cache *c, const uint8_t *row, bf16 *to, const char *next) {
    const coded_row *coded = c->coded;
    const uint8_t *from = coded_head(c, row);
    for (long k = 0; k < coded->width; k += STEP) {
        if (next && k % 128 == 0) FAR(next + k / 2);
        long left = coded->width - k;
        __m256i bytes = left >= STEP ? _mm256_loadu_si256((const __m256i *)(from + k)) : _mm256_maskz_loadu_epi8(first_halves(left), from + k);
        _mm512_store_si512(to + k, numbers_in(bytes));
    }
    copy_row(to + coded->width, (const bf16 *)(row + coded->plain_at), coded->plain);
    float scale;
    memcpy(&scale, row + coded->scales_at + 4 * c->head, sizeof scale);
    return scale;
}

/* Lines of a row in fp8 that a pass reads: all, or those of a head. */
INLINE long lines_of(const cache *c) { return c->coded->heads > 1 ? c->coded->width / 64 + 1 : (c->coded->bytes + 126) / 64; }

/* 16 tokens to `copy`, as `group_of` copies them but without their scales, which come to `by`. The first lines of the rows at
   `next` are fetched meanwhile, the others while scores are made (score_bare). */
INLINE void bare_group(const cache *c, const part *p, long at, bf16 *copy, float *by, sixteen next) {
    for (long t = 0; t < 16; t++) {
        bf16 *to = copy + t * c->stride;
        by[t] = 0;
        if (at + t < p->tokens)
            by[t] = take_bare(c, bytes_of(cached_row(c, p->pages, p->offset + at + t)), to, next.at ? (const char *)next.at + t * next.bytes : 0);
        else memset(to, 0, c->stride * sizeof(bf16));
    }
}

/* `after`: the part that is likely next, or 0. */
INLINE void find_rows(const step *s, const part *p, const part *after, long at, long groups, long block, bf16 *copies,
                      rows_of_block *b) {
    bf16 *values = copies + block * 16 * s->keys.stride;
    int ends = at + block * 16 >= p->tokens;
    const part *next = ends ? after : p;
    long then = ends ? 0 : at + block * 16;
    int bare = without_scales(&s->keys);
    for (long g = 0; g < groups && bare; g++) { /* score_rows fills them */
        sixteen key = {copies + g * 16 * s->keys.stride, 2 * s->keys.stride}, value = {values + g * 16 * s->held.stride, 2 * s->held.stride};
        b->keys[g] = key, b->held[g] = s->shared ? key : value;
    }
    for (long g = 0; g < groups && !bare; g++) {
        b->keys[g] = group_of(&p->keys, p->pages, p->offset, p->tokens, at + g * 16, copies + g * 16 * s->keys.stride);
        b->held[g] = s->shared ? b->keys[g]
                               : group_of(&p->held, p->pages, p->offset, p->tokens, at + g * 16, values + g * 16 * s->held.stride);
    }
    for (long g = 0; g < block; g++) {
        sixteen none = {0, 0};
        b->next_keys[g] = b->next_held[g] = none;
        if (next && bare) {
            b->next_keys[g] = bytes_together(&next->keys, next, then + g * 16);
            if (!s->shared) b->next_held[g] = bytes_together(&next->held, next, then + g * 16);
        }
        if (!next || bare) continue;
        b->next_keys[g] = together(&next->keys, next->pages, next->offset, next->tokens, then + g * 16);
        b->next_held[g] = s->shared ? b->next_keys[g] : together(&next->held, next->pages, next->offset, next->tokens, then + g * 16);
    }
}

/* As `score_group` of rows without scales; what is not fetched yet of the rows at `far` is. */
INLINE void score_bare(const step *s, sixteen rows, const bf16 *q, float *to, const float *by, sixteen far) {
    float more[SUMS] __attribute__((aligned(64)));
    const coded_row *coded = s->keys.coded;
    long steps = whole_steps(coded->width), plain = whole_steps(coded->plain), first = (coded->width + 127) / 128, lines = lines_of(&s->keys);
    TILES;
    TILE_ZERO(0);
    for (long k = 0; k < steps; k++) {
        for (long z = k * 16 / steps; far.at && z < (k + 1) * 16 / steps; z++)
            for (long line = first; line < lines; line++) FAR((const char *)far.at + z * far.bytes + line * 64);
        TILE_LOAD(1, rows.at + k * STEP, rows.bytes);
        TILE_LOAD(2, q + k * TILE, 64);
        TILE_DOT(0, 1, 2);
    }
    TILE_STORE(0, to, 64);
    if (plain) {
        TILE_ZERO(3);
        for (long k = steps; k < steps + plain; k++) {
            TILE_LOAD(4, rows.at + k * STEP, rows.bytes);
            TILE_LOAD(2, q + k * TILE, 64);
            TILE_DOT(3, 4, 2);
        }
        TILE_STORE(3, more, 64);
    } else memset(more, 0, sizeof more);
    for (int t = 0; t < 16; t++)
        _mm512_store_ps(to + t * 16, _mm512_fmadd_ps(_mm512_load_ps(to + t * 16), _mm512_set1_ps(by[t]), _mm512_load_ps(more + t * 16)));
}

/* Scores of group `g` of the block from `at` on. With `first`, which is so for one set of pairs, rows in fp8 are taken back, each
   group before its scores: chains run while the next group is taken back. The rows at `next_keys` and `near` are fetched. */
INLINE void score_rows(const step *s, const part *p, rows_of_block *b, long at, long g, const bf16 *q, float *to, int first, sixteen near) {
    const sixteen none = {0, 0};
    if (!without_scales(&s->keys)) {
        score_group(s, b->keys[g], q, to, first ? b->next_keys[g] : none, near);
        return;
    }
    if (first) {
        bare_group(&p->keys, p, at + g * 16, (bf16 *)b->keys[g].at, b->by_key + g * 16, b->next_keys[g]);
        if (s->shared) memcpy(b->by_value + g * 16, b->by_key + g * 16, 64);
        else bare_group(&p->held, p, at + g * 16, (bf16 *)b->held[g].at, b->by_value + g * 16, b->next_held[g]);
    }
    score_bare(s, b->keys[g], q, to, b->by_key + g * 16, first ? b->next_keys[g] : none);
    for (long t = 0; first && b->next_held[g].at && t < 16; t++)
        for (long line = (p->held.coded->width + 127) / 128; line < lines_of(&p->held); line++)
            FAR((const char *)b->next_held[g].at + t * b->next_held[g].bytes + line * 64);
}

/* Shares of n tokens by the scales of their values; a token that is not seen may have none. */
INLINE void scale_shares(const step *s, const rows_of_block *b, float *shares, long n) {
    if (!without_scales(&s->keys)) return;
    for (long t = 0; t < n; t++) {
        __m512 share = _mm512_load_ps(shares + t * 16);
        __mmask16 seen = _mm512_cmp_ps_mask(share, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        _mm512_store_ps(shares + t * 16, _mm512_maskz_mul_ps(seen, share, _mm512_set1_ps(b->by_value[t])));
    }
}

/* Accumulator tiles at `o` multiplied row by row. */
INLINE void rescale(float *o, long tiles, __m512 keep) {
    float by[16];
    _mm512_storeu_ps(by, keep);
    for (long j = 0; j < tiles; j++)
        for (int i = 0; i < 16; i++) {
            float *at = o + j * SUMS + i * 16;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(by[i])));
        }
}

/* sum (zero at the `first` block) += P . V for `groups` products; P is in tiles 4 to 7. */
INLINE void add_four(float *sum, int first, long groups, const sixteen *v) {
    TILES;
    if (first) TILE_ZERO(0);
    else TILE_LOAD_SUM(0, sum, 64);
    TILE_LOAD(1, v[0].at, v[0].bytes);
    TILE_DOT(0, 4, 1);
    if (groups > 1) { TILE_LOAD(2, v[1].at, v[1].bytes); TILE_DOT(0, 5, 2); }
    if (groups > 2) { TILE_LOAD(1, v[2].at, v[2].bytes); TILE_DOT(0, 6, 1); }
    if (groups > 3) { TILE_LOAD(2, v[3].at, v[3].bytes); TILE_DOT(0, 7, 2); }
    TILE_STORE(0, sum, 64);
}

INLINE void load_four(const bf16 *p, long groups) {
    TILES;
    TILE_LOAD(4, p, 64);
    if (groups > 1) TILE_LOAD(5, p + TILE, 64);
    if (groups > 2) TILE_LOAD(6, p + 2 * TILE, 64);
    if (groups > 3) TILE_LOAD(7, p + 3 * TILE, 64);
}

/* Shares of 16 tokens x 8 pairs, twice, as the left operand that takes cached rows as they are. */
INLINE void split_shares(const float *shares, bf16 *p) {
    const __m512i down = _mm512_setr_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i r[16];
    for (int t = 0; t < 16; t++) {
        __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(round16(_mm512_load_ps(shares + t * 16))), 16);
        r[t] = _mm512_srlv_epi32(bits, down);
    }
    transpose16(r);
    for (int t = 0; t < 16; t++) _mm512_store_si512(p + t * STEP, r[t]);
}

static void few_pairs(const step *s, const part *t, const part *after, char *memory) {
    long steps = s->keys.stride / STEP;
    bf16 *q = (bf16 *)memory, *p = q + steps * TILE, *copies = p + 4 * TILE;
    float *scores = (float *)(copies + FEW_TOKENS * (s->keys.stride + s->held.stride)), *o = scores + FEW_TOKENS * 16;
    int seen[16], bare = without_scales(&s->keys);
    softmax of = {_mm512_set1_ps(NEVER), _mm512_setzero_ps(), _mm512_setzero_ps()};
    load_queries(s, t, 0, 0, FEW_PAIRS, q);
    long seen_by_all = visible_to(s, t, 0, FEW_PAIRS, seen);
    for (int i = 0; i < FEW_PAIRS; i++) seen[i + FEW_PAIRS] = seen[i];
    __m512i last = _mm512_loadu_si512(seen);
    for (long at = 0; at < t->tokens; at += FEW_TOKENS) {
        long groups = whole_tiles(at_most(t->tokens - at, FEW_TOKENS));
        rows_of_block rows;
        find_rows(s, t, after, at, groups, FEW_TOKENS / 16, copies, &rows);
        for (long g = 0; g < groups; g++)
            score_rows(s, t, &rows, at, g, q, scores + g * SUMS, 1, g + 1 < groups ? rows.keys[g + 1] : rows.held[0]);
        if (soften(scores, groups * 16, at, last, at + groups * 16 <= seen_by_all, s->scale * LOG2E, &of) && at)
            rescale(o, s->values, of.keep);
        scale_shares(s, &rows, scores, groups * 16);
        for (long g = 0; g < groups; g++) split_shares(scores + g * SUMS, p + g * TILE);
        load_four(p, groups);
        for (long j = 0; j < s->values; j++) {
            sixteen v[4];
            for (long g = 0; g < groups; g++) v[g].at = rows.held[g].at + j * STEP, v[g].bytes = rows.held[g].bytes;
            for (long g = 0; g < 4 && !bare; g++) if (rows.next_held[g].at) fetch_rest(s, rows.next_held[g], j, s->values);
            add_four(o + j * SUMS, at == 0, groups, v);
        }
    }
    float most[16], sum[16];
    _mm512_storeu_ps(most, _mm512_mul_ps(of.most, _mm512_set1_ps(1 / LOG2E))), _mm512_storeu_ps(sum, of.sum);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for (long i = 0; i < t->pairs; i++) {
        long slot = slot_of(s, t, 0, i);
        s->peaks[slot] = most[i], s->weights[slot] = sum[i];
        for (long j = 0; j < s->values; j++) {
            __m512 even = _mm512_load_ps(o + j * SUMS + i * 16), odd = _mm512_load_ps(o + j * SUMS + (8 + i) * 16);
            float *to = s->sums + (slot * s->values + j) * STEP;
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, low, odd));
            _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, high, odd));
        }
    }
}

/* 32 tokens x 32 columns to two right operands; unpacking leaves the columns in the order `restore` undoes. */
INLINE void interleave(const sixteen *groups, long column, bf16 *even, bf16 *odd) {
    for (int t = 0; t < 16; t++) {
        long between = groups[t / 8].bytes / (long)sizeof(bf16);
        const bf16 *v = groups[t / 8].at + (t % 8) * 2 * between + column;
        __m512i x = _mm512_loadu_si512(v), y = _mm512_loadu_si512(v + between);
        _mm512_store_si512(even + t * STEP, _mm512_unpacklo_epi16(x, y));
        _mm512_store_si512(odd + t * STEP, _mm512_unpackhi_epi16(x, y));
    }
}

/* Up to 16 * G pairs. */
INLINE void many_pairs(const step *s, const part *t, const part *after, char *memory, const int G) {
    long steps = s->keys.stride / STEP, columns = 2 * s->values;
    bf16 *q = (bf16 *)memory, *p = q + G * steps * TILE, *v = p + G * 4 * TILE, *copies = v + 8 * TILE;
    float *scores = (float *)(copies + MANY_TOKENS * (s->keys.stride + s->held.stride)), *o = scores + MANY_TOKENS * 16;
    int seen[MOST_PAIRS] __attribute__((aligned(64))), bare = without_scales(&s->keys);
    TILES;
    softmax of[4];
    for (int g = 0; g < G; g++) {
        load_queries(s, t, 0, g * 16, 16, q + g * steps * TILE);
        of[g].most = _mm512_set1_ps(NEVER), of[g].sum = of[g].keep = _mm512_setzero_ps();
    }
    long seen_by_all = visible_to(s, t, 0, 16 * G, seen);
    for (long at = 0; at < t->tokens; at += MANY_TOKENS) {
        long halves = (at_most(t->tokens - at, MANY_TOKENS) + 31) / 32, groups = 2 * halves;
        rows_of_block rows;
        find_rows(s, t, after, at, groups, MANY_TOKENS / 16, copies, &rows);
        int whole = at + groups * 16 <= seen_by_all;
        for (int g = 0; g < G; g++) {
            for (long b = 0; b < groups; b++)
                score_rows(s, t, &rows, at, b, q + g * steps * TILE, scores + b * SUMS, g == 0,
                           b + 1 < groups ? rows.keys[b + 1] : rows.keys[0]);
            __m512i last = _mm512_load_si512(seen + g * 16);
            if (soften(scores, groups * 16, at, last, whole, s->scale * LOG2E, &of[g]) && at)
                rescale(o + g * columns * SUMS, columns, of[g].keep);
            scale_shares(s, &rows, scores, groups * 16);
            for (long h = 0; h < halves; h++) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) {
                    const float *share = scores + (h * 32 + 2 * i) * 16;
                    r[i] = paired(_mm512_load_ps(share), _mm512_load_ps(share + 16));
                }
                transpose16(r);
                for (int i = 0; i < 16; i++) _mm512_store_si512(p + (g * 4 + h) * TILE + i * STEP, r[i]);
            }
        }
        if (G == 1) load_four(p, halves);
        for (long j = 0; j < s->values; j++) {
            for (long b = 0; b < 8 && !bare; b++) if (rows.next_held[b].at) fetch_rest(s, rows.next_held[b], j, s->values);
            for (long h = 0; h < halves; h++) interleave(rows.held + 2 * h, j * STEP, v + h * TILE, v + (4 + h) * TILE);
            for (int side = 0; side < 2; side++) {
                const bf16 *b = v + side * 4 * TILE;
                if (G == 1) {
                    const sixteen four[4] = {{b, 64}, {b + TILE, 64}, {b + 2 * TILE, 64}, {b + 3 * TILE, 64}};
                    add_four(o + (j * 2 + side) * SUMS, at == 0, halves, four);
                    continue;
                }
                load_four(b, halves);
                for (int g = 0; g < G; g++) {
                    float *sum = o + (g * columns + j * 2 + side) * SUMS;
                    const bf16 *a = p + g * 4 * TILE;
                    if (at == 0) TILE_ZERO(0);
                    else TILE_LOAD_SUM(0, sum, 64);
                    TILE_LOAD(1, a, 64);
                    TILE_DOT(0, 1, 4);
                    if (halves > 1) { TILE_LOAD(2, a + TILE, 64); TILE_DOT(0, 2, 5); }
                    if (halves > 2) { TILE_LOAD(1, a + 2 * TILE, 64); TILE_DOT(0, 1, 6); }
                    if (halves > 3) { TILE_LOAD(2, a + 3 * TILE, 64); TILE_DOT(0, 2, 7); }
                    TILE_STORE(0, sum, 64);
                }
            }
        }
    }
    float most[MOST_PAIRS], sum[MOST_PAIRS];
    for (int g = 0; g < G; g++) {
        _mm512_storeu_ps(most + g * 16, _mm512_mul_ps(of[g].most, _mm512_set1_ps(1 / LOG2E)));
        _mm512_storeu_ps(sum + g * 16, of[g].sum);
    }
    const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (long i = 0; i < t->pairs; i++) {
        long slot = slot_of(s, t, 0, i);
        const float *from = o + (i / 16 * columns) * SUMS + i % 16 * 16;
        s->peaks[slot] = most[i], s->weights[slot] = sum[i];
        for (long j = 0; j < s->values; j++) {
            __m512 x = _mm512_load_ps(from + 2 * j * SUMS), y = _mm512_load_ps(from + (2 * j + 1) * SUMS);
            float *to = s->sums + (slot * s->values + j) * STEP;
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(x, left, y));
            _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(x, right, y));
        }
    }
}

static void pairs_16(const step *s, const part *t, const part *after, char *memory) { many_pairs(s, t, after, memory, 1); }
static void pairs_32(const step *s, const part *t, const part *after, char *memory) { many_pairs(s, t, after, memory, 2); }
static void pairs_64(const step *s, const part *t, const part *after, char *memory) { many_pairs(s, t, after, memory, 4); }

/* `after`: the part that is likely next, or 0. */
static void run_on_tiles(const step *s, const part *t, const part *after, char *memory) {
    if (t->low == 0 && t->pairs <= FEW_PAIRS) few_pairs(s, t, after, memory);
    else if (t->pairs <= 16) pairs_16(s, t, after, memory);
    else if (t->pairs <= 32) pairs_32(s, t, after, memory);
    else pairs_64(s, t, after, memory);
}

static size_t tiles_scratch(const step *s) {
    size_t operands = 4 * s->keys.stride / STEP + 4 * 4 + 8, sums = 4 * 2 * s->values;
    return operands * TILE * 2 + MANY_TOKENS * ((s->keys.stride + s->held.stride) * 2 + 64) + sums * SUMS * 4 + 4096;
}
#endif
