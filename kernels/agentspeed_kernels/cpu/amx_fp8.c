/* Products and feed-forwards of many bf16 rows with weights in fp8 e4m3, [outputs][inputs] with a scale for each block of
   128 x 128. No byte is "not a number" here: the scale of its block is none. */
#define WHOLE_BLOCKS
#include "amx_bytes.h"

INLINE long parts_of(long extent) { return (extent + BLOCK - 1) / BLOCK; }
INLINE byte_weight fp8_weight(const uint8_t *data, const float *scales, long n, long k) {
    byte_weight w = {data, scales, n, k, 0, BLOCK};
    return w;
}
INLINE byte_weight matrix_at(const byte_weight *first, long index) {
    byte_weight w = *first;
    w.data += index * w.n * w.k, w.scales += index * parts_of(w.n) * parts_of(w.k);
    return w;
}
INLINE __m512 block_scales(const byte_weight *w, long t, long b) { return _mm512_set1_ps(w->scales[t * 16 / BLOCK * parts_of(w->k) + b]); }

/* Bytes of e4m3 as bf16: those of the lower half of every 16 bytes, and those of the upper half.

   The exponent is 120 more there, so the upper byte of a number follows from four bits and the lower one from the other
   four; but for the numbers below the smallest normal one, of which there are few. */
INLINE void to_numbers(__m512i bytes, __m512i *low, __m512i *high) {
    const __m512i lowest = _mm512_set1_epi8(15);
    const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi8(60, 61, 62, 63, 64, 65, 66, 67, -68, -67, -66, -65, -64, -63, -62, -61));
    const __m512i lower = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 16, 32, 48, 64, 80, 96, 112, -128, -112, -96, -80, -64, -48, -32, -16));
    __m512i above = _mm512_shuffle_epi8(upper, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), lowest));
    __m512i below = _mm512_shuffle_epi8(lower, _mm512_and_si512(bytes, lowest));
    *low = _mm512_unpacklo_epi8(below, above), *high = _mm512_unpackhi_epi8(below, above);
    if (__builtin_expect(_mm512_testn_epi8_mask(bytes, _mm512_set1_epi8(0x78)) != 0, 0)) {
        const __m512i small = _mm512_castsi256_si512(_mm256_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0));
        const __m512i sign = _mm512_set1_epi16((short)0x8000), nothing = _mm512_setzero_si512();
        for (int side = 0; side < 2; side++) {
            __m512i word = side ? _mm512_unpackhi_epi8(bytes, nothing) : _mm512_unpacklo_epi8(bytes, nothing), *made = side ? high : low;
            __m512i number = _mm512_or_si512(_mm512_permutexvar_epi16(_mm512_and_si512(word, _mm512_set1_epi16(7)), small), _mm512_and_si512(*made, sign));
            *made = _mm512_mask_mov_epi16(*made, _mm512_testn_epi16_mask(word, _mm512_set1_epi16(0x78)), number);
        }
    }
}

INLINE const uint8_t *quads_at(const byte_weight *w, long t, long from, uint8_t *held) {
    const uint8_t *at = w->data + t * 16 * w->k + from;
    long n = w->n - t * 16, k = w->k - from;
    __mmask64 there = k >= DEEP ? ~0ull : k > 0 ? (1ull << k) - 1 : 0;
    __m512i rows[16];
    for (int o = 0; o < 16; o++) {
        rows[o] = o < n ? _mm512_maskz_loadu_epi8(there, at + o * w->k) : _mm512_setzero_si512();
        FAR(at + (32 + o) * w->k); /* columns are taken by two */
    }
    transpose16(rows);
    for (int i = 0; i < 16; i++) _mm512_store_si512(held + i * 64, rows[i]);
    return held;
}

INLINE void to_pairs(const uint8_t *quad, bf16 *to) {
    /* Of 4 outputs with 4 inputs each: two inputs of every output first. */
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    __m512i first, second;
    to_numbers(_mm512_shuffle_epi8(_mm512_load_si512(quad), pairs), &first, &second);
    _mm512_store_si512(to, first), _mm512_store_si512(to + STEP, second);
}

#ifndef VECTOR_TILES
INLINE int scales_in_tiles(const byte_weight *w) {
    (void)w;
    return 0;
}
INLINE void to_tiles(const byte_weight *w, long t, long from, const uint8_t *quads, bf16 *to) {
    (void)w, (void)t, (void)from;
#pragma GCC unroll 16 /* many constants: in one piece they stay in registers */
    for (long q = 0; q < DEEP / 4; q++) to_pairs(quads + q * 64, to + q * 2 * STEP);
}
#endif

EXPORT void NAME(linear_fp8)(const bf16 *x, long x_stride, const uint8_t *data, const float *scales, const bf16 *bias, bf16 *out,
                             long out_stride, long rows, long n, long k, int threads) {
    byte_linear(x, x_stride, fp8_weight(data, scales, n, k), bias, out, out_stride, rows, threads);
}

/* Scratch as in byte_experts. */
EXPORT void NAME(experts_fp8)(const bf16 *x, const uint8_t *gate_up, const float *gate_up_scales, const uint8_t *down,
                              const float *down_scales, const int64_t *ids, const float *weights, bf16 *act, float *sums,
                              int *order, bf16 *out, long tokens, long top, long experts, long inner, long hidden,
                              int threads) {
    byte_experts(x, fp8_weight(gate_up, gate_up_scales, inner, hidden), fp8_weight(down, down_scales, hidden, inner), ids, weights,
                 act, sums, order, out, tokens, top, experts, threads);
}
