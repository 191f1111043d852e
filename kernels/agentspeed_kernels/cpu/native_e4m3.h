/* Bytes of fp8 e4m3 as floats, in vectors that a set has registers for: of weights, and of rows of a KV cache.

   Every form converts half precision in hardware: a byte moved into the places of such a number is 2^-8 of what it stands
   for, the smallest ones included. No byte is "not a number" here: the scale of its block, or of its head, is none. */
#ifndef AGENTSPEED_NATIVE_E4M3_H
#define AGENTSPEED_NATIVE_E4M3_H
#include "native_common.h"
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define FACTOR 256.0f
#define DEEP (2 * WIDE) /* bytes that become floats together */

/* DEEP bytes by 1 / FACTOR. */
INLINE void to_floats(const uint8_t *at, wide *low, wide *high) {
#if defined(__AVX512F__)
    __m512i v = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)at)), 7);
    v = _mm512_and_si512(v, _mm512_set1_epi16((short)0xbf80));
    *low = (vec)_mm512_cvtph_ps(_mm512_castsi512_si256(v)), *high = (vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
#elif defined(__AVX2__)
    __m256i v = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at)), 7);
    v = _mm256_and_si256(v, _mm256_set1_epi16((short)0xbf80));
    *low = (narrow)_mm256_cvtph_ps(_mm256_castsi256_si128(v)), *high = (narrow)_mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
#elif defined(__aarch64__)
    int16x8_t v = vandq_s16(vshll_n_s8(vld1_s8((const int8_t *)at), 7), vdupq_n_s16((short)0xbf80));
    *low = (narrow)vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_s16(v)));
    *high = (narrow)vcvt_high_f32_f16(vreinterpretq_f16_s16(v));
#endif
}
#endif
