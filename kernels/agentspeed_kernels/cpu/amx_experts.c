/* SwiGLU of routed experts in bf16: the weights of an expert are read once for all tokens that chose it. */
#include "amx_common.h"

typedef struct {
    const bf16 *x;
    long x_stride;
    const bf16 *gate_up, *down; /* tile order: [experts][2][inner][hidden] and [experts][hidden][inner] */
    const float *weights;
    const int *order, *start;
    bf16 *act, *out;
    float *sums;
    long tokens, top, experts, inner, hidden;
    int alone; /* rows are tokens, and nothing is summed */
} feed;

#include "many_experts.h"

#ifndef VECTOR_TILES
/* act = silu(x . gate) * (x . up) of an expert's up to 16 rows, tiles [low, high) of the inner width. */
static void inner_few(const feed *f, long e, long low, long high) {
    float gate[SUMS] __attribute__((aligned(64))), up[SUMS] __attribute__((aligned(64)));
    long steps = whole_steps(f->hidden), columns = whole_tiles(f->inner), width = whole_steps(f->inner) * STEP;
    long count = f->start[e + 1] - f->start[e];
    const bf16 *x = f->x + f->start[e] * f->x_stride, *w = f->gate_up + e * 2 * columns * steps * TILE;
    bf16 *act = f->act + f->start[e] * width;
    tiles_begin(count % 16);
    for (long t = low; t < high; t++) {
        chain(x, 2 * f->x_stride, w + t * steps * TILE, steps, gate, count == 16, 0, 1);
        chain(x, 2 * f->x_stride, w + (columns + t) * steps * TILE, steps, up, count == 16, 0, 1);
        for (long r = 0; r < count; r++)
            write16(act + r * width + t * 16, _mm512_mul_ps(silu(_mm512_load_ps(gate + r * 16)), _mm512_load_ps(up + r * 16)));
    }
}

static void outer_few(const feed *f, long e, long low, long high) {
    float made[SUMS] __attribute__((aligned(64)));
    long steps = whole_steps(f->inner), columns = whole_tiles(f->hidden), width = steps * STEP;
    long count = f->start[e + 1] - f->start[e];
    const bf16 *act = f->act + f->start[e] * width, *w = f->down + e * columns * steps * TILE;
    tiles_begin(count % 16);
    for (long t = low; t < high; t++) {
        chain(act, 2 * width, w + t * steps * TILE, steps, made, count == 16, 0, 1);
        for (long r = 0; r < count; r++) put_outer_tile(f, _mm512_load_ps(made + r * 16), f->start[e] + r, t);
    }
}
#endif

/* act = silu(x . gate) * (x . up), tiles [low, high) of the inner width; padding columns become 0 by zero weights. */
static void inner_part(const feed *f, long low, long high) {
    for (long e = 0; e < f->experts; e++) {
        long count = f->start[e + 1] - f->start[e];
        if (!count) continue;
#ifndef VECTOR_TILES
        if (!in_panels(count)) {
            inner_few(f, e, low, high);
            continue;
        }
#endif
        inner_many(f, e, low, high);
    }
}

/* sums += weight * (act . down), or out = act . down for a lone expert; tiles [low, high) of the hidden width. */
static void outer_part(const feed *f, long low, long high) {
    for (long e = 0; e < f->experts; e++) {
        long count = f->start[e + 1] - f->start[e];
        if (!count) continue;
#ifndef VECTOR_TILES
        if (!in_panels(count)) {
            outer_few(f, e, low, high);
            continue;
        }
#endif
        outer_many(f, e, low, high);
    }
}

/* Rows of x in order of expert, padded with zeros to whole steps. */
static void gather(const feed *f, const bf16 *x, bf16 *to, long width) {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (long p = 0; p < f->tokens * f->top; p++) {
        const bf16 *row = x + (f->alone ? p : f->order[p] / f->top) * f->hidden;
        for (long s = 0; s < width; s += STEP)
            _mm512_storeu_si512(to + p * width + s, _mm512_maskz_loadu_epi16(first_halves(f->hidden - s), row + s));
    }
}

/* A dense layer: its one expert is chosen by every token with weight 1. */
static int dense(const float *weights, long tokens, long top, long experts) {
    if (experts > 1 || top > 1) return 0;
    for (long t = 0; t < tokens; t++)
        if (weights[t] != 1.0f) return 0;
    return 1;
}

/* Scratch: gathered[pairs][hidden in whole steps], act[pairs][inner in whole steps], sums[tokens][hidden in whole tiles],
   order[pairs], start[experts + 1]. */
EXPORT void NAME(experts)(const bf16 *x, const bf16 *gate_up, const bf16 *down, const int64_t *ids,
                                        const float *weights, bf16 *gathered, bf16 *act, float *sums, int *order,
                                        int *start, bf16 *out, long tokens, long top, long experts, long inner,
                                        long hidden, int threads) {
    int alone = dense(weights, tokens, top, experts);
    if (alone) start[0] = 0, start[1] = (int)tokens;
    else pairs_by_expert(ids, tokens * top, experts, order, start);
    feed f = {x, hidden, gate_up, down, weights, order, start, act, out, sums, tokens, top, experts, inner, hidden, alone};
    long columns = whole_tiles(hidden), width = whole_steps(inner) * STEP;
    int copied = hidden % STEP != 0 || (!alone && tokens > 1);
    /* All choices of one token read the same row, also where it chose one expert twice. */
    if (tokens == 1) f.x_stride = 0;
    if (copied) f.x = gathered, f.x_stride = whole_steps(hidden) * STEP;
    if (3 * tokens * top * inner * hidden < WORTH_A_TEAM) threads = 1;
    if (alone && in_blocks(&f, threads)) {
        f.x = x, f.x_stride = hidden; /* packing pads rows */
        dense_blocks(&f, threads);
        return;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long low, high;
        if (copied) gather(&f, x, gathered, f.x_stride);
        my_part(whole_tiles(inner), &low, &high);
        inner_part(&f, low, high);
        /* The last half step of act has no weights above it to make it 0. */
        if (high == whole_tiles(inner) && high % 2 && low < high)
            for (long p = 0; p < tokens * top; p++) memset(act + p * width + high * 16, 0, 32);
#pragma omp barrier
        my_part(columns, &low, &high);
        if (!alone)
            for (long t = 0; t < tokens; t++) memset(sums + (t * columns + low) * 16, 0, (high - low) * 64);
        outer_part(&f, low, high);
        if (!alone)
            for (long t = 0; t < tokens; t++)
                for (long c = low; c < high; c++)
                    write_some(out + t * hidden + c * 16, first_lanes(hidden - c * 16),
                               _mm512_loadu_ps(sums + (t * columns + c) * 16));
        tiles_end();
    }
}
