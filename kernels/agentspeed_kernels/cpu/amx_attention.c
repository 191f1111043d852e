/* Attention of a few rows over paged bf16 keys and values: tiles of a plan by passes with the tiles of AMX or on vectors, and
   their merge. Latent attention has one head of the pool for all heads of queries, whose values are the first part of its
   keys. */
#include "vector_rows.h"
#ifndef VECTOR_TILES
#include "amx_rows.h"
#endif

/* Up to so many pairs of (row, head of queries) for a head of the pool, vectors are faster than the tiles of AMX: they take
   all heads at once and read rows as the stream they are. Of latents, which are one head, each number serves keys and values. */
#define MOST_ON_VECTORS 4
#define MOST_LATENT_ON_VECTORS 2

INLINE int on_vectors(const step *s, long pairs) {
#ifdef VECTOR_TILES
    (void)s, (void)pairs;
    return 1;
#else
    return pairs <= (s->shared ? MOST_LATENT_ON_VECTORS : MOST_ON_VECTORS);
#endif
}

/* How a tile of so many rows is cut into jobs: heads of the pools that one pass takes, passes for all heads, and parts of the
   pairs. */
typedef struct {
    long together, spans, parts;
} cut;

INLINE cut cut_of(const step *s, long rows) {
    long pairs = rows * (s->heads / s->groups), together = on_vectors(s, pairs) ? heads_together(s, rows) : 1;
    cut made = {together, (s->groups + together - 1) / together, (pairs + MOST_PAIRS - 1) / MOST_PAIRS};
    return made;
}

static size_t scratch_bytes(const step *s) {
#ifdef VECTOR_TILES
    return vectors_scratch(s);
#else
    size_t vectors = vectors_scratch(s), tiles = tiles_scratch(s);
    return vectors > tiles ? vectors : tiles;
#endif
}

INLINE void run_part(const step *s, const part *p, const part *after, char *memory) {
#ifndef VECTOR_TILES
    if (!on_vectors(s, p->low + p->pairs)) {
        run_on_tiles(s, p, after, memory);
        return;
    }
#endif
    run_on_vectors(s, p, after, memory);
}

/* out[rank] = the partial sums of a row's entries, each by its share of the whole softmax. */
static void merge_row(const step *s, const int *entries, long count, long head, bf16 *out) {
    float most = NEVER, sum = 0;
    for (long i = 0; i < count; i++) most = fmaxf(most, s->peaks[entries[i] * s->heads + head]);
    for (long i = 0; i < count; i++) {
        long slot = entries[i] * s->heads + head;
        sum += expf(s->peaks[slot] - most) * s->weights[slot];
    }
    for (long from = 0; from < s->rank; from += 8 * 16) {
        __m512 total[8];
        for (int c = 0; c < 8; c++) total[c] = _mm512_setzero_ps();
        for (long i = 0; i < count; i++) {
            long slot = entries[i] * s->heads + head;
            __m512 by = _mm512_set1_ps(expf(s->peaks[slot] - most) / sum);
            for (int c = 0; c < 8 && from + c * 16 < s->rank; c++)
                total[c] = _mm512_fmadd_ps(by, _mm512_loadu_ps(s->sums + slot * s->values * STEP + from + c * 16), total[c]);
        }
        for (int c = 0; c < 8 && from + c * 16 < s->rank; c++)
            write_some(out + from + c * 16, first_lanes(s->rank - from - c * 16), total[c]);
    }
}

/* Jobs are tiles x `spans` x `parts`; a tile that is cut into fewer leaves the rest without pairs. */
INLINE part part_of(const step *s, long job, long spans, long parts) {
    long tile = job / (spans * parts), rows = s->plan.row_at[tile + 1] - s->plan.row_at[tile], low = job % parts * MOST_PAIRS;
    long together = cut_of(s, rows).together, group = job / parts % spans * together;
    long each = s->heads / s->groups, pairs = group < s->groups ? rows * each - low : 0;
    part one = {s->plan.row_at[tile], s->plan.offset[tile], s->plan.tokens[tile], s->plan.pages + s->plan.page_at[tile],
                group, at_most(s->groups - group, together), each, low, at_most(pairs, MOST_PAIRS),
                from_head(s->keys, group, s->keys.width), from_head(s->held, group, s->held.width)};
    return one;
}

static void attend(const step *s, long tiles, long merges, const int *merge_rows, const int *merge_at, const int *merge,
                   bf16 *out, int threads) {
    long spans = 1, parts = 0, work = 0;
    for (long tile = 0; tile < tiles; tile++) {
        long count = s->plan.row_at[tile + 1] - s->plan.row_at[tile];
        cut made = cut_of(s, count);
        spans = made.spans > spans ? made.spans : spans, parts = made.parts > parts ? made.parts : parts;
        work += count * s->plan.tokens[tile];
    }
    /* Parts of one tile read the same pages: they stay on one core unless there are too few tiles. */
    long chunk = tiles * spans >= 2 * threads ? parts : 1;
    if (work * s->heads * (s->keys.width + s->rank) < WORTH_A_TEAM) threads = 1;
    if (parts == 0) return;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *memory = agentspeed_scratch(FOR_ATTENTION, scratch_bytes(s));
        tiles_begin(0);
#pragma omp for schedule(dynamic, chunk)
        for (long job = 0; job < tiles * spans * parts; job++) {
            part one = part_of(s, job, spans, parts), after = {0};
            if (one.pairs <= 0) continue;
            for (long next = job + threads; next < tiles * spans * parts && after.pairs <= 0; next += threads)
                after = part_of(s, next, spans, parts);
            run_part(s, &one, after.pairs > 0 ? &after : 0, memory);
        }
        tiles_end();
#pragma omp for schedule(static)
        for (long job = 0; job < merges * s->heads; job++) {
            long m = job / s->heads, head = job % s->heads;
            merge_row(s, merge + merge_at[m], merge_at[m + 1] - merge_at[m], head,
                      out + ((long)merge_rows[m] * s->heads + head) * s->rank);
        }
    }
}

/* partials: [entries][heads] rows of (rank in whole steps) + 2 floats. Rows of the pool are numbers, or with `fp8` bytes. */
EXPORT void NAME(mla_rows)(const bf16 *q, long q_t, long q_h, const bf16 *pool, long page_tokens, long width, long rank,
                           long heads, long tiles, const int *page_at, const int *pages, const int *offset,
                           const int *tokens, const int *row_at, const int *rows, const int *visible, long merges,
                           const int *merge_rows, const int *merge_at, const int *merge, float scale, float *partials,
                           long entries, bf16 *out, int fp8, int threads) {
    long values = whole_steps(rank);
    coded_row coded = coded_rows(1, rank, width - rank);
    cache keys = cache_of(pool, page_tokens, width, width, width % STEP == 0, fp8 ? &coded : 0);
    step s = {q, q_t, q_h, heads, 1, rank, values, {page_at, pages, offset, tokens, row_at, rows, visible}, keys, keys, 1,
              scale, partials, partials + entries * heads * values * STEP, partials + entries * heads * (values * STEP + 1)};
    attend(&s, tiles, merges, merge_rows, merge_at, merge, out, threads);
}

/* Head h of the queries reads head h / (heads / groups) of the pools, whose rows are [groups][width], or bytes. */
EXPORT void NAME(gqa_rows)(const bf16 *q, long q_t, long q_h, const bf16 *keys, const bf16 *values, long page_tokens,
                           long width, long heads, long groups, long tiles, const int *page_at, const int *pages,
                           const int *offset, const int *tokens, const int *row_at, const int *rows, const int *visible,
                           long merges, const int *merge_rows, const int *merge_at, const int *merge, float scale,
                           float *partials, long entries, bf16 *out, int fp8, int threads) {
    long steps = whole_steps(width), row = groups * width;
    int direct = width % STEP == 0;
    coded_row held = coded_rows(groups, width, 0), *coded = fp8 ? &held : 0;
    step s = {q, q_t, q_h, heads, groups, width, steps, {page_at, pages, offset, tokens, row_at, rows, visible},
              cache_of(keys, page_tokens, row, width, direct, coded),
              cache_of(values, page_tokens, row, width, direct, coded), 0, scale, partials,
              partials + entries * heads * steps * STEP, partials + entries * heads * (steps * STEP + 1)};
    attend(&s, tiles, merges, merge_rows, merge_at, merge, out, threads);
}
