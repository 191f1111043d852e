/* Products and feed-forwards with weights of 8 bits, on processors with AMX: see amx_int8.h. */
#ifndef VECTOR_TILES /* there the kernels of native_int8.c run */
#include "amx_int8.h"

/* Rows above which a weight becomes tiles of bf16, once for all of them (many_int8.c). */
#define MOST_IN_GROUPS 8
#define MOST_IN_BYTES 32

void NAME(many_linear_bytes)(const bf16 *, long, const uint8_t *, const float *, long, const bf16 *, bf16 *, long, char *, long, long,
                             long, int);
void NAME(many_experts_bytes)(const bf16 *, const uint8_t *, const float *, const uint8_t *, const float *, long, const int64_t *,
                              const float *, char *, bf16 *, float *, int *, bf16 *, long, long, long, long, long, int);

INLINE int are_few(long rows, long group) { return rows <= (group ? MOST_IN_GROUPS : MOST_IN_BYTES); }

/* left: block_bytes for each 16 rows. */
EXPORT void NAME(linear_bytes)(const bf16 *x, long x_stride, const uint8_t *data, const float *scales, long group,
                               const bf16 *bias, bf16 *out, long out_stride, char *left, long rows, long n, long k,
                               int threads) {
    if (!are_few(rows, group)) {
        NAME(many_linear_bytes)(x, x_stride, data, scales, group, bias, out, out_stride, left, rows, n, k, threads);
        return;
    }
    byte_weight w = byte_weight_of(data, scales, n, k, group);
    long blocks = whole_tiles(rows), size = block_bytes(w.steps, groups_of(&w));
    if (rows * n * k < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float sums[SUMS] __attribute__((aligned(64)));
        long low, high;
#pragma omp for schedule(static)
        for (long b = 0; b < blocks; b++) {
            const bf16 *held[16];
            for (long r = 0; r < 16 && b * 16 + r < rows; r++) held[r] = x + (b * 16 + r) * x_stride;
            prepare(held, at_most(rows - b * 16, 16), &w, left + b * size);
        }
        my_part(w.columns, &low, &high);
        tiles_begin(0);
        for (long t = low; t < high; t++) {
            const uint8_t *tiles = w.data + t * w.steps * BYTES;
            __mmask16 lanes = first_lanes(n - t * 16);
            __m512 add = bias ? read_some(bias + t * 16, lanes) : _mm512_setzero_ps();
            for (long b = 0; b < blocks; b++) {
                long count = at_most(rows - b * 16, 16);
                times(left + b * size, &w, tiles, t, count, sums);
                for (long r = 0; r < count; r++)
                    write_some(out + (b * 16 + r) * out_stride + t * 16, lanes, _mm512_add_ps(_mm512_load_ps(sums + r * 16), add));
            }
        }
        tiles_end();
    }
}

/* Pairs (token, choice) in order of expert, in blocks of up to 16 that never span two. */
typedef struct {
    int *order, *start, *block_at, *expert; /* [pairs], [experts + 1], [experts + 1], [blocks] */
} sorted;

/* Returns the most pairs of an expert. */
static long sort_pairs(const int64_t *ids, long pairs, long experts, const sorted *s) {
    long most = 0;
    for (long e = 0; e <= experts; e++) s->start[e] = 0;
    for (long p = 0; p < pairs; p++) s->start[ids[p] + 1]++;
    s->block_at[0] = 0;
    for (long e = 0; e < experts; e++) {
        long count = s->start[e + 1];
        most = count > most ? count : most;
        s->block_at[e + 1] = s->block_at[e] + (int)whole_tiles(count);
        for (long b = s->block_at[e]; b < s->block_at[e + 1]; b++) s->expert[b] = (int)e;
        s->start[e + 1] += s->start[e];
    }
    for (long p = 0; p < pairs; p++) s->order[s->start[ids[p]]++] = (int)p;
    for (long e = experts; e > 0; e--) s->start[e] = s->start[e - 1];
    s->start[0] = 0;
    return most;
}

INLINE long first_of(const sorted *s, long block) {
    return s->start[s->expert[block]] + 16 * (block - s->block_at[s->expert[block]]);
}
INLINE long count_of(const sorted *s, long block) {
    return at_most(s->start[s->expert[block] + 1] - first_of(s, block), 16);
}

/* gate_up is [experts][2][inner][hidden], down [experts][hidden][inner]. Scratch: left, block_bytes of the wider for each
   block; act[pairs][inner in whole tiles]; sums[tokens][hidden in whole tiles]; order[2 * pairs + 2 * experts + 2]. */
EXPORT void NAME(experts_bytes)(const bf16 *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                                const float *down_scales, long group, const int64_t *ids, const float *weights, char *left,
                                bf16 *act, float *sums, int *order, bf16 *out, long tokens, long top, long experts,
                                long inner, long hidden, int threads) {
    long pairs = tokens * top;
    sorted s = {order, order + pairs, order + pairs + experts + 1, order + pairs + 2 * experts + 2};
    if (!are_few(sort_pairs(ids, pairs, experts, &s), group)) {
        NAME(many_experts_bytes)(x, gate_up, gate_up_scales, down, down_scales, group, ids, weights, left, act, sums, order, out, tokens,
                                 top, experts, inner, hidden, threads);
        return;
    }
    long blocks = s.block_at[experts];
    byte_weight wide = byte_weight_of(gate_up, gate_up_scales, inner, hidden, group);
    byte_weight back = byte_weight_of(down, down_scales, hidden, inner, group);
    long size = block_bytes(wide.steps, groups_of(&wide)), second = block_bytes(back.steps, groups_of(&back));
    long width = wide.columns * 16, row = back.columns * 16;
    if (3 * pairs * inner * hidden < WORTH_A_TEAM) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float gate[SUMS] __attribute__((aligned(64))), up[SUMS] __attribute__((aligned(64)));
        const bf16 *held[16];
        long low, high;
#pragma omp for schedule(static)
        for (long b = 0; b < blocks; b++) {
            for (long r = 0; r < count_of(&s, b); r++) held[r] = x + order[first_of(&s, b) + r] / top * hidden;
            prepare(held, count_of(&s, b), &wide, left + b * size);
        }
        my_part(wide.columns, &low, &high);
        tiles_begin(0);
        for (long e = 0; e < experts; e++) {
            if (s.start[e] == s.start[e + 1]) continue;
            byte_weight g = wide, u = wide;
            g.data += 2 * e * weight_bytes(&wide), g.scales += 2 * e * weight_scales(&wide);
            u.data = g.data + weight_bytes(&wide), u.scales = g.scales + weight_scales(&wide);
            for (long t = low; t < high; t++) {
                const uint8_t *gate_tiles = g.data + t * g.steps * BYTES, *up_tiles = u.data + t * u.steps * BYTES;
                for (long b = s.block_at[e]; b < s.block_at[e + 1]; b++) {
                    times(left + b * size, &g, gate_tiles, t, count_of(&s, b), gate);
                    times(left + b * size, &u, up_tiles, t, count_of(&s, b), up);
                    for (long r = 0; r < count_of(&s, b); r++)
                        write16(act + (first_of(&s, b) + r) * width + t * 16,
                                _mm512_mul_ps(silu(_mm512_load_ps(gate + r * 16)), _mm512_load_ps(up + r * 16)));
                }
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long b = 0; b < blocks; b++) {
            for (long r = 0; r < count_of(&s, b); r++) held[r] = act + (first_of(&s, b) + r) * width;
            prepare(held, count_of(&s, b), &back, left + b * second);
        }
        my_part(back.columns, &low, &high);
        for (long t = 0; t < tokens; t++) memset(sums + t * row + low * 16, 0, (high - low) * 64);
        for (long e = 0; e < experts; e++) {
            byte_weight d = back;
            d.data += e * weight_bytes(&back), d.scales += e * weight_scales(&back);
            for (long t = low; t < high && s.start[e] < s.start[e + 1]; t++) {
                const uint8_t *tiles = d.data + t * d.steps * BYTES;
                for (long b = s.block_at[e]; b < s.block_at[e + 1]; b++) {
                    times(left + b * second, &d, tiles, t, count_of(&s, b), gate);
                    for (long r = 0; r < count_of(&s, b); r++) {
                        int pair = order[first_of(&s, b) + r];
                        float *sum = sums + pair / top * row + t * 16;
                        _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(gate + r * 16), _mm512_set1_ps(weights[pair]), _mm512_loadu_ps(sum)));
                    }
                }
            }
        }
        for (long t = 0; t < tokens; t++)
            for (long c = low; c < high; c++)
                write_some(out + t * hidden + c * 16, first_lanes(hidden - c * 16), _mm512_loadu_ps(sums + t * row + c * 16));
        tiles_end();
    }
}
#endif
