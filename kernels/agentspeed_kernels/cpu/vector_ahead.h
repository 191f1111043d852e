/* Where the rows of a block of tokens lie, and those of the next one, fetched meanwhile. */
#ifndef AGENTSPEED_VECTOR_AHEAD_H
#define AGENTSPEED_VECTOR_AHEAD_H
#include "amx_sixteen.h"

#define BLOCK 32 /* tokens scored at a time, a vector of shares */

/* Rows of BLOCK tokens, counted in numbers from the start of a pool; past the end of a tile its last one again, whose
   shares are 0. */
typedef struct {
    long at[BLOCK];
} block_rows;

INLINE void locate(const part *p, const cache *c, long at, block_rows *to) {
    long place = p->offset + at_most(at, p->tokens - 1), page = place / c->page_tokens, in_page = place % c->page_tokens;
    long left = p->tokens - 1 - at;
    for (int b = 0; b < BLOCK; b++, left--) {
        to->at[b] = ((long)p->pages[page] * c->page_tokens + in_page) * c->row;
        if (left > 0 && ++in_page == c->page_tokens) in_page = 0, page++;
    }
}

/* The rows that the block after this one reads, fetched line by line between the products: many at once would wait for each
   other, and the products behind them with them. */
typedef struct {
    const char *now, *stop; /* the next line, and the end of its run */
} line;

typedef struct {
    const char *run[2 * BLOCK];
    line at;
    long bytes;     /* of a run */
    int next, last; /* runs; the last one is fetched again when all are */
    int each, more; /* lines for each turn of an inner loop, and before it */
} ahead;

/* To the second cache where the first is no larger than what a block reads, which it would drive out. */
#ifdef VECTOR_TILES
#define NEXT_LINE(p) FAR(p)
#else
#define NEXT_LINE(p) NEAR(p)
#endif

/* The line is a variable of the loop's own: in memory it would be the loop's longest chain. */
INLINE line fetch(ahead *a, line at, int lines) {
    for (; lines > 0; lines--) {
        NEXT_LINE(at.now);
        if ((at.now += 64) >= at.stop) {
            at.now = a->run[a->next], at.stop = at.now + a->bytes;
            a->next += a->next < a->last;
        }
    }
    return at;
}

/* Of a row, what a pass reads; scales of a part of the heads are few lines, and are waited for. */
INLINE long read_bytes(const step *s, const part *p) {
    const coded_row *c = s->keys.coded;
    if (!c) return 2 * p->count * s->keys.width;
    return p->count == s->groups ? c->bytes : p->count * c->width;
}

/* Whole rows, of keys and of values unless they are part of the keys. */
INLINE void look_ahead(const step *s, const part *p, const block_rows *rows, ahead *a) {
    int many = 0;
    long from = s->keys.coded ? p->keys.head * s->keys.coded->width : 0;
    for (int b = 0; b < BLOCK; b++) {
        a->run[many++] = (const char *)(p->keys.pool + rows->at[b]) + from;
        if (!s->shared) a->run[many++] = (const char *)(p->held.pool + rows->at[b]) + from;
    }
    a->bytes = read_bytes(s, p), a->next = 1, a->last = many - 1;
    a->at.now = a->run[0], a->at.stop = a->at.now + a->bytes;
}
#endif
