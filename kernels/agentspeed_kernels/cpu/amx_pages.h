/* Cached rows as operands of tiles: straight from their page where 16 of them lie together, else copied and padded. */
#ifndef AGENTSPEED_AMX_PAGES_H
#define AGENTSPEED_AMX_PAGES_H
#include "amx_common.h"

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
} cache;

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

/* Where 16 tokens can be read: in their page, or in `copy` with zeros for what the tile does not have. */
INLINE sixteen group_of(const cache *c, const int *pages, long offset, long tokens, long at, bf16 *copy) {
    sixteen there = together(c, pages, offset, tokens, at);
    if (there.at) return there;
    for (long t = 0; t < 16; t++) {
        bf16 *to = copy + t * c->stride;
        if (at + t < tokens) copy_row(to, cached_row(c, pages, offset + at + t), c->width);
        else memset(to, 0, c->stride * sizeof(bf16));
    }
    sixteen copied = {copy, 2 * c->stride};
    return copied;
}
#endif
