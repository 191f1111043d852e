/* Attention of a few rows over paged bf16 keys and values: tiles of a plan by passes with the tiles of AMX or on vectors, and
   their merge. Latent attention has one head of the pool for all heads of queries, whose values are the first part of its
   keys. */
#ifdef VECTOR_TILES
#include "vector_rows.h"
#else
#include "amx_rows.h"
#endif

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

INLINE part part_of(const step *s, long job, long spans, long parts, long together) {
    long tile = job / (spans * parts), group = job / parts % spans * together, low = job % parts * MOST_PAIRS;
    long each = s->heads / s->groups, pairs = (s->plan.row_at[tile + 1] - s->plan.row_at[tile]) * each - low;
    part one = {s->plan.row_at[tile], s->plan.offset[tile], s->plan.tokens[tile], s->plan.pages + s->plan.page_at[tile],
                group, at_most(s->groups - group, together), each, low, at_most(pairs, MOST_PAIRS),
                from_head(s->keys, group, s->keys.width), from_head(s->held, group, s->held.width)};
    return one;
}

static void attend(const step *s, long tiles, long merges, const int *merge_rows, const int *merge_at, const int *merge,
                   bf16 *out, int threads) {
    long each = s->heads / s->groups, most_rows = 0, work = 0;
    for (long tile = 0; tile < tiles; tile++) {
        long count = s->plan.row_at[tile + 1] - s->plan.row_at[tile];
        most_rows = count > most_rows ? count : most_rows, work += count * s->plan.tokens[tile];
    }
    long together = heads_together(s, most_rows), spans = (s->groups + together - 1) / together;
    /* Parts of one tile read the same pages: they stay on one core unless there are too few tiles. */
    long parts = (most_rows * each + MOST_PAIRS - 1) / MOST_PAIRS;
    long chunk = tiles * spans >= 2 * threads ? parts : 1;
    if (work * s->heads * (s->keys.width + s->rank) < WORTH_A_TEAM) threads = 1;
    if (parts == 0) return;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *memory = agentspeed_scratch(FOR_ATTENTION, scratch_bytes(s));
        tiles_begin(0);
#pragma omp for schedule(dynamic, chunk)
        for (long job = 0; job < tiles * spans * parts; job++) {
            part one = part_of(s, job, spans, parts, together), after = one;
            int more = job + threads < tiles * spans * parts;
            if (more) after = part_of(s, job + threads, spans, parts, together);
            if (one.pairs > 0) run_part(s, &one, more ? &after : 0, memory);
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
