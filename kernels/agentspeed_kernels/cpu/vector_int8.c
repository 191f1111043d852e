/* Products and feed-forwards of many bf16 rows with weights in int8, on vectors: for processors with AVX512-BF16 and no AMX.

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

/* `left` holds what lies between the products; `unused` is scratch memory of the form with AMX. */
EXPORT void NAME(linear_bytes)(const bf16 *x, long x_stride, const uint8_t *data, const float *scales, long group,
                               const bf16 *bias, bf16 *out, long out_stride, char *left, long rows, long n, long k,
                               int threads) {
    (void)left;
    byte_linear(x, x_stride, int8_weight(data, scales, n, k, group), bias, out, out_stride, rows, threads);
}

EXPORT void NAME(experts_bytes)(const bf16 *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                                const float *down_scales, long group, const int64_t *ids, const float *weights, char *left,
                                bf16 *unused, float *sums, int *order, bf16 *out, long tokens, long top, long experts,
                                long inner, long hidden, int threads) {
    (void)unused;
    byte_experts(x, int8_weight(gate_up, gate_up_scales, inner, hidden, group), int8_weight(down, down_scales, hidden, inner, group),
                 ids, weights, (bf16 *)left, sums, order, out, tokens, top, experts, threads);
}
