/* What a pass of attention over one tile of a plan is given: with tiles (amx_rows.h) or on vectors (vector_rows.h). */
#ifndef AGENTSPEED_AMX_STEP_H
#define AGENTSPEED_AMX_STEP_H
#include "amx_pages.h"

#define MOST_PAIRS 64
#define GROWTH 8.0f /* sums are rescaled only when a peak has grown by more than 2 to this power */

typedef struct {
    const bf16 *q;
    long q_t, q_h, heads, groups, rank, values; /* values: steps of 32 columns of values */
    tile_plan plan;
    cache keys, held; /* held: values */
    int shared;       /* values are the first part of the keys */
    float scale;
    float *sums, *peaks, *weights; /* [entries][heads][whole steps of rank], [entries][heads], [entries][heads] */
} step;

/* One tile, and of each of the `count` heads of the pools from `group` on the pairs [low, low + pairs) of rows x (heads of
   queries that read that head). */
typedef struct {
    long first, offset, tokens; /* first: entry of the plan */
    const int *pages;
    long group, count, each, low, pairs;
    cache keys, held; /* of head `group` of the pools */
} part;

/* Where the partial sums of a pair go; `g` is counted from `group`. */
INLINE long slot_of(const step *s, const part *p, long g, long pair) {
    return (p->first + (p->low + pair) / p->each) * s->heads + (p->group + g) * p->each + (p->low + pair) % p->each;
}
INLINE const bf16 *query_of(const step *s, const part *p, long g, long pair) {
    long row = s->plan.rows[p->first + (p->low + pair) / p->each], head = (p->group + g) * p->each + (p->low + pair) % p->each;
    return s->q + row * s->q_t + head * s->q_h;
}
INLINE int seen_by(const step *s, const part *p, long pair) { return s->plan.visible[p->first + (p->low + pair) / p->each]; }
#endif
