/* Cached rows as operands of tiles: straight from their page where 16 of them lie together, else copied and padded. Rows in
   fp8 are taken back to numbers where others are copied. */
#ifndef AGENTSPEED_AMX_PAGES_H
#define AGENTSPEED_AMX_PAGES_H
#include "amx_common.h"
#include "native_cache.h"

/* The plan of a step's tiles, as tiles.py makes it. */
typedef struct {
    const int *page_at, *pages, *offset, *tokens, *row_at, *rows, *visible;
} tile_plan;

typedef struct {
    const bf16 *pool;
    long page_tokens, row; /* numbers between cached rows */
    long width;            /* numbers of a row that are read */
    long stride;           /* of a row that the tiles read where it is copied, whole steps */
    int direct;            /* rows need no padding, so they may be read where they lie */
    const coded_row *coded; /* how rows are kept in fp8; 0: they are numbers */
    long head;             /* that is read of rows in fp8; of others the pool begins with it */
} cache;

/* `row`: numbers of a row, or with `coded` nothing; `direct`: whether rows of numbers may be read where they lie. */
INLINE cache cache_of(const bf16 *pool, long page_tokens, long row, long width, int direct, const coded_row *coded) {
    cache made = {pool, page_tokens, coded ? coded->bytes / 2 : row, width, whole_steps(width) * STEP, direct && !coded, coded, 0};
    return made;
}

INLINE const uint8_t *bytes_of(const bf16 *row) { return (const uint8_t *)row; }

/* A cache of the same rows whose heads are counted from `head` on, which are so wide. */
INLINE cache from_head(cache c, long head, long width) {
    if (c.coded) c.head += head;
    else c.pool += head * width;
    return c;
}

/* 16 rows, `bytes` apart; 0 where there are none together. */
typedef struct {
    const bf16 *at;
    long bytes;
} sixteen;

INLINE const bf16 *cached_row(const cache *c, const int *pages, long place) {
    return c->pool + ((long)pages[place / c->page_tokens] * c->page_tokens + place % c->page_tokens) * c->row;
}

/* 16 tokens from `at`, counted from the first of the tile, in one piece of the pool. */
INLINE sixteen together(const cache *c, const int *pages, long offset, long tokens, long at) {
    long place = offset + at;
    sixteen found = {0, 2 * c->row};
    if (c->direct && at + 16 <= tokens && place % c->page_tokens + 16 <= c->page_tokens) found.at = cached_row(c, pages, place);
    return found;
}

INLINE void copy_row(bf16 *to, const bf16 *from, long n) {
    long i = 0;
    for (; i + STEP <= n; i += STEP) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    if (i < n) _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(first_halves(n - i), from + i));
}

/* A row with zeros up to its stride, which is no less than whole steps. */
INLINE void take_row(const cache *c, const bf16 *from, bf16 *to) {
    if (!c->coded) {
        copy_row(to, from, c->width);
        return;
    }
    decode_part(c->coded, bytes_of(from), c->head, to);
    memset(to + c->width, 0, (c->stride - c->width) * sizeof(bf16));
}

/* Where 16 tokens can be read: in their page, or in `copy` with zeros for what the tile does not have. */
INLINE sixteen group_of(const cache *c, const int *pages, long offset, long tokens, long at, bf16 *copy) {
    sixteen there = together(c, pages, offset, tokens, at);
    if (there.at) return there;
    for (long t = 0; t < 16; t++) {
        bf16 *to = copy + t * c->stride;
        if (at + t < tokens) take_row(c, cached_row(c, pages, offset + at + t), to);
        else memset(to, 0, c->stride * sizeof(bf16));
    }
    sixteen copied = {copy, 2 * c->stride};
    return copied;
}
#endif
