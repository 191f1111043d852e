/* Cached rows as operands of tiles: straight from their page where 16 of them lie together, else copied and padded. */
#ifndef AGENTSPEED_AMX_MLA_H
#define AGENTSPEED_AMX_MLA_H
#include "amx_common.h"

/* The plan of a step's tiles, as tiles.py makes it. */
typedef struct {
    const int *page_at, *pages, *offset, *tokens, *row_at, *rows, *visible;
} tile_plan;

typedef struct {
    const bf16 *pool;
    long page_tokens, width; /* of a cached row */
    long stride;             /* of a row that the tiles read, whole steps */
    int direct;              /* rows need no padding, so they may be read where they lie */
} cache;

/* 16 tokens from `at`, counted from the first of the tile, in one piece of the pool; 0 where there is none. */
INLINE const bf16 *together(const cache *c, const int *pages, long offset, long tokens, long at) {
    long place = offset + at, within = place % c->page_tokens;
    if (!c->direct || at + 16 > tokens || within + 16 > c->page_tokens) return 0;
    return c->pool + ((long)pages[place / c->page_tokens] * c->page_tokens + within) * c->width;
}

INLINE void copy_row(bf16 *to, const bf16 *from, long n) {
    long i = 0;
    for (; i + STEP <= n; i += STEP) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    if (i < n) _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(first_halves(n - i), from + i));
}
#endif
