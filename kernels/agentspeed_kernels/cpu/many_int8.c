/* Products and feed-forwards of many bf16 rows with weights in int8: all there are with AVX512-BF16 and no AMX; with AMX few
   rows are those of amx_int8.c.

   A weight is as in native_int8.c: [tiles of 16 outputs][steps of 64 inputs][16][16][4], each byte 128 above what it stands
   for; scales are [groups of 32 inputs, or 1][outputs in whole tiles]. */
#include "amx_bytes.h"

#define GROUPED 32

INLINE long width_of(const byte_weight *w) { return (w->k + DEEP - 1) / DEEP * DEEP; }
INLINE byte_weight int8_weight(const uint8_t *data, const float *scales, long n, long k, long group) {
    byte_weight w = {data, scales, n, k, group, group ? GROUPED : TOGETHER};
    return w;
}
INLINE byte_weight matrix_at(const byte_weight *first, long index) {
    byte_weight w = *first;
    w.data += index * whole_tiles(w.n) * width_of(&w) * 16;
    w.scales += index * (w.group ? width_of(&w) / GROUPED : 1) * whole_tiles(w.n) * 16;
    return w;
}
INLINE __m512 block_scales(const byte_weight *w, long t, long b) {
    return _mm512_loadu_ps(w->scales + ((w->group ? b : 0) * whole_tiles(w->n) + t) * 16);
}

/* Two floats of each lane, both whole numbers of 8 bits, as a pair of bf16. */
INLINE __m512i exact_pair(__m512i even, __m512i odd) {
    __m512i low = _mm512_srli_epi32((__m512i)_mm512_cvtepi32_ps(even), 16), high = (__m512i)_mm512_cvtepi32_ps(odd);
    return _mm512_or_si512(low, high); /* the lower half of such a float is 0 */
}

INLINE const uint8_t *quads_at(const byte_weight *w, long t, long from, uint8_t *unused) {
    (void)unused;
    return w->data + (t * width_of(w) + from) * 16;
}
INLINE void to_pairs(const uint8_t *quad, bf16 *to) {
    FAR(quad + 6144);
    __m512i v = _mm512_xor_si512(_mm512_loadu_si512(quad), _mm512_set1_epi32((int)0x80808080));
    __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24), second = _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 24);
    __m512i third = _mm512_srai_epi32(_mm512_slli_epi32(v, 8), 24), fourth = _mm512_srai_epi32(v, 24);
    _mm512_store_si512(to, exact_pair(first, second)), _mm512_store_si512(to + STEP, exact_pair(third, fourth));
}

#ifndef VECTOR_TILES
/* A scale has 32 inputs there, one step: sums would get theirs between any two products. */
INLINE int scales_in_tiles(const byte_weight *w) { return w->group != 0; }

/* Two whole numbers of 8 bits in each lane, each 128 above itself and moved into the mantissa of 2^15, times a scale; `off` is
   what that adds. Rounded to the nearest bf16. */
INLINE __m512i scaled_pair(__m512i even, __m512i odd, __m512 by, __m512 off) {
    const __m512i base = _mm512_set1_epi32(0x47000000), half = _mm512_set1_epi32(0x8000);
    __m512 low = _mm512_fmadd_ps((__m512)_mm512_or_si512(even, base), by, off);
    __m512 high = _mm512_fmadd_ps((__m512)_mm512_or_si512(odd, base), by, off);
    __m512i first = _mm512_add_epi32((__m512i)low, half), second = _mm512_add_epi32((__m512i)high, half);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
}

INLINE void to_tiles(const byte_weight *w, long t, long from, const uint8_t *quads, bf16 *to) {
    if (!w->group) {
        for (long q = 0; q < DEEP / 4; q++) to_pairs(quads + q * 64, to + q * 2 * STEP);
        return;
    }
#define BYTE(i) _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(-1, i, -1, -1, -1, 4 + i, -1, -1, -1, 8 + i, -1, -1, -1, 12 + i, -1, -1)))
    for (long g = 0; g < DEEP / GROUPED; g++) {
        __m512 by = block_scales(w, t, from / GROUPED + g), off = _mm512_mul_ps(by, _mm512_set1_ps(-32768.0f - 128));
        for (long q = g * GROUPED / 4; q < (g + 1) * GROUPED / 4; q++) {
            FAR(quads + q * 64 + 6144);
            __m512i v = _mm512_loadu_si512(quads + q * 64);
            _mm512_store_si512(to + q * 2 * STEP, scaled_pair(BYTE(0), BYTE(1), by, off));
            _mm512_store_si512(to + (q * 2 + 1) * STEP, scaled_pair(BYTE(2), BYTE(3), by, off));
        }
    }
#undef BYTE
}
#endif

#ifdef VECTOR_TILES
#define MANY(function) EXPORT void NAME(function)
#else
#define MANY(function) void NAME(many_##function) /* amx_int8.c declares and calls these */
#endif

/* `left` holds what lies between the products; `unused` is scratch memory of few rows with AMX. */
MANY(linear_bytes)(const bf16 *x, long x_stride, const uint8_t *data, const float *scales, long group,
                               const bf16 *bias, bf16 *out, long out_stride, char *left, long rows, long n, long k,
                               int threads) {
    (void)left;
    byte_linear(x, x_stride, int8_weight(data, scales, n, k, group), bias, out, out_stride, rows, threads);
}

MANY(experts_bytes)(const bf16 *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                                const float *down_scales, long group, const int64_t *ids, const float *weights, char *left,
                                bf16 *unused, float *sums, int *order, bf16 *out, long tokens, long top, long experts,
                                long inner, long hidden, int threads) {
    (void)unused;
    byte_experts(x, int8_weight(gate_up, gate_up_scales, inner, hidden, group), int8_weight(down, down_scales, hidden, inner, group),
                 ids, weights, (bf16 *)left, sums, order, out, tokens, top, experts, threads);
}
