/* Vectors of 16 floats and the few operations the kernels share. Plain C with vector extensions: any gcc or clang target.

   Each source is compiled once for every form (FORM: avx2, avx512, neon, ...) and kind of number (KIND: f32, or bf16 with
   HALF defined); all sums are float. */
#ifndef AGENTSPEED_NATIVE_COMMON_H
#define AGENTSPEED_NATIVE_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 16
#ifdef __AVX512F__
#define REGISTERS 32 /* that hold a vector of LANES */
#else
#define REGISTERS 8
#endif
#define WORTH_A_TEAM (1L << 16) /* multiply-adds below which waking the other threads costs more than they save */
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define NAME_OF(form, kind, op) agentspeed_##form##_##kind##_##op
#define NAMED(form, kind, op) NAME_OF(form, kind, op)
#define NAME(op) NAMED(FORM, KIND, op)

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));

INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec v) { *(vec *)at = v; }
INLINE vec splat(float x) { return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

typedef uint16_t bf16; /* the upper half of a float */
INLINE float of_half(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE uint16_t half_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

typedef uint16_t half16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4), may_alias));

/* Where there is an instruction for it, it is named: gcc 12 widens halves of the vector and joins them. */
INLINE vec bf16_vec(const bf16 *at) {
#ifdef __AVX512F__
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
#else
    return (vec)(__builtin_convertvector(*(const half16 *)at, uvec) << 16);
#endif
}

#ifdef HALF
typedef bf16 num;
INLINE vec read_vec(const num *at) { return bf16_vec(at); }
/* Rounded to the nearest, to even between two; what is not a number stays none. */
INLINE void write_vec(num *at, vec v) {
    uvec bits = (uvec)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = (uvec)pick((ivec)(v != v), (vec)(bits * 0 + 0x7fc0), (vec)bits);
    *(half16 *)at = __builtin_convertvector(bits, half16);
}
INLINE float read_one(num x) { return of_half(x); }
INLINE num round_one(float x) { return half_of(x); }
#else
typedef float num;
INLINE vec read_vec(const num *at) { return load(at); }
INLINE void write_vec(num *at, vec v) { store(at, v); }
INLINE float read_one(num x) { return x; }
INLINE num round_one(float x) { return x; }
#endif

INLINE void widen_row(float *to, const num *from, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, read_vec(from + i));
    for (; i < n; i++) to[i] = read_one(from[i]);
}
INLINE void round_row(num *to, const float *from, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) write_vec(to + i, load(from + i));
    for (; i < n; i++) to[i] = round_one(from[i]);
}

/* Memory of this thread that lasts until its next call with the same `use`; 64-byte aligned. */
enum { FOR_ROWS, FOR_ATTENTION };
void *agentspeed_scratch(int use, size_t bytes);

INLINE float total(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

INLINE float peak(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

/* Adds lanes that are `far` apart, from a into one half of the result and from b into the other. */
INLINE vec fold1(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
INLINE vec fold2(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
INLINE vec fold4(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
INLINE vec fold8(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

/* Lane i of the result is the sum of all lanes of v[i]: a third of the work of 16 separate sums. */
INLINE vec totals(const vec v[LANES]) {
    vec a[8], b[4];
    for (int i = 0; i < 8; i++) a[i] = fold1(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++) b[i] = fold2(a[2 * i], a[2 * i + 1]);
    return fold8(fold4(b[0], b[1]), fold4(b[2], b[3]));
}

/* e^x for x <= 0 (softmax); relative error under 2e-7, 0 below about -87. */
INLINE vec exp_down(vec x) {
    ivec low = x < -87.0f;
    x = pick(low, splat(-87.0f), x);
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = x * 1.44269504088896341f + magic;
    n = n - magic;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    return pick(low, splat(0.0f), p * (vec)bits);
}

#if REGISTERS < 32
/* A vector that this set has a register for: compilers keep wider ones in memory. */
#ifdef __AVX2__
#define NARROW 8
#else
#define NARROW 4
#endif
typedef float narrow __attribute__((vector_size(4 * NARROW), aligned(4), may_alias));
typedef uint32_t narrow_bits __attribute__((vector_size(4 * NARROW), aligned(4), may_alias));

INLINE narrow bf16_narrow(const bf16 *at) {
#ifdef __AVX2__
    return (narrow)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16);
#else
    typedef uint16_t halves __attribute__((vector_size(2 * NARROW), aligned(2), may_alias));
    return (narrow)(__builtin_convertvector(*(const halves *)at, narrow_bits) << 16);
#endif
}
INLINE narrow read_narrow(const num *at) {
#ifdef HALF
    return bf16_narrow(at);
#else
    return *(const narrow *)at;
#endif
}

INLINE float narrow_total(narrow v) {
    float sum = 0;
    for (int i = 0; i < NARROW; i++) sum += v[i];
    return sum;
}
#endif

/* The vector that this set has a register for, whichever it is. */
#if REGISTERS >= 32
#define WIDE LANES
typedef vec wide;
typedef ivec wide_ints;
#else
#define WIDE NARROW
typedef narrow wide;
typedef int32_t wide_ints __attribute__((vector_size(4 * NARROW), aligned(4), may_alias));
#endif

#endif
