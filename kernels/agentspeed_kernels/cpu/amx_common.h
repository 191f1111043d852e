/* AMX tiles and 16-lane vectors for the bf16 kernels of processors with AMX and AVX512-BF16; with VECTOR_TILES vectors alone,
   which read weights in the same order of tiles, for processors with AVX512-BF16 and no AMX.

   The tile instructions are inline assembly that names memory: the intrinsics of some compilers do not, so a store to a
   buffer could sink below the load of a tile from it. Accumulators have a load of their own, TILE_LOAD_SUM.
   All products are chains: one accumulator, and one or two loads for each product. A unit that is shared with another
   hyperthread slows down every change of the register it writes; a chain alone is good in both of its states. */
#ifndef AGENTSPEED_AMX_COMMON_H
#define AGENTSPEED_AMX_COMMON_H

#include "native_common.h"
#include <immintrin.h>
#include <stdlib.h>


#define STEP 32    /* bf16 numbers in a tile row: the depth of one product */
#define TILE 512   /* bf16 numbers in a tile */
#define SUMS 256   /* floats in an accumulator */
#define COLUMNS 32 /* outputs of two columns of tiles */
#define NEVER -1e30f /* below every finite score; its difference to itself is 0, not NaN */
#define LOG2E 1.44269504f

#define NEAR(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#define FAR(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

#ifdef VECTOR_TILES
INLINE void tiles_begin(long tail) { (void)tail; }
INLINE void tiles_end(void) {}
#elif defined(TILE_MODEL) /* a file: tests run the kernels for AMX where there is none */
#include TILE_MODEL
#else
#define TILES /* what a function that uses tiles begins with */
#define TILE_LOAD(t, p, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((const void *)(p)), "r"((long)(stride)) : "memory")
#define TILE_LOAD_SUM(t, p, stride) TILE_LOAD(t, p, stride)
#define TILE_STORE(t, p, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void *)(p)), "r"((long)(stride)) : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define TILE_DOT(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)
#define TILE_DOT_BYTES(sum, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

/* Tiles 0, 1, 2 and 5 to 7 have 16 rows; 3 (sums) and 4 (left operand) have `tail` rows, for the last rows of a block. */
INLINE void tiles_begin(long tail) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed, aligned(64))) shape;
    memset(&shape, 0, sizeof shape);
    shape.palette = 1;
    for (int i = 0; i < 8; i++) shape.rows[i] = (i == 3 || i == 4) && tail ? (uint8_t)tail : 16, shape.bytes[i] = 64;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}
INLINE void tiles_end(void) { __asm__ volatile("tilerelease" ::); }
#endif

INLINE int my_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
INLINE int team_size(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
/* This thread's part [low, high) of n things. */
INLINE void my_part(long n, long *low, long *high) {
    long index = my_index(), count = team_size();
    *low = n * index / count, *high = n * (index + 1) / count;
}

INLINE long whole_steps(long n) { return (n + STEP - 1) / STEP; }
INLINE long whole_tiles(long n) { return (n + 15) / 16; }
INLINE long at_most(long n, long most) { return n < most ? n : most; }
INLINE __mmask16 first_lanes(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
INLINE __mmask32 first_halves(long n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

INLINE __m512 widen(__m256i v) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16); }
INLINE __m512 read16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512 read_some(const bf16 *p, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, p)); }
INLINE __m256i round16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
INLINE void write16(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, round16(v)); }
INLINE void write_some(bf16 *p, __mmask16 lanes, __m512 v) { _mm256_mask_storeu_epi16(p, lanes, round16(v)); }
/* 16 dwords of (bf16(even), bf16(odd)) */
INLINE __m512i paired(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32(round16(even)), high = _mm512_cvtepu16_epi32(round16(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Transposes 16 x 16 dwords. */
INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        __m512i low = t[i], high = t[i + 8];
        r[i] = _mm512_shuffle_i32x4(low, high, 0x88), r[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    }
}

/* 2^x for x up to 126, relative error about 4e-6: far below the rounding of a share to bf16. Of no number it is none: a maximum
   is its second operand then. */
INLINE __m512 exp2_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0096181291f), f, _mm512_set1_ps(0.0555041087f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2402265070f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931471806f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

INLINE __m512 silu(__m512 g) {
    __m512 e = exp2_16(_mm512_min_ps(_mm512_mul_ps(g, _mm512_set1_ps(-LOG2E)), _mm512_set1_ps(120.0f)));
    return _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* Pairs (token, choice) in order of expert, those of one expert in order of token. */
static inline void pairs_by_expert(const int64_t *ids, long pairs, long experts, int *order, int *start) {
    for (long e = 0; e <= experts; e++) start[e] = 0;
    for (long p = 0; p < pairs; p++) start[ids[p] + 1]++;
    for (long e = 0; e < experts; e++) start[e + 1] += start[e];
    for (long p = 0; p < pairs; p++) order[start[ids[p]]++] = (int)p;
    for (long e = experts; e > 0; e--) start[e] = start[e - 1];
    start[0] = 0;
}

/* ---- products with weights in tile order, amx_linear.c ---- */
/* A weight [n][k] in tile order is [tiles of 16 n][steps of 32 k], each a tile of 16 rows: row i holds numbers 2i and
   2i + 1 of 16 outputs. n and k are padded with zeros. */
typedef struct {
    const bf16 *x;
    long x_stride; /* numbers between rows */
    const bf16 *weight, *bias; /* bias may be 0 */
    bf16 *out;
    long out_stride, rows, n, k;
} product;

/* Of rows in whole tiles, COLUMNS of each. */
INLINE size_t sums_bytes(long rows) { return whole_tiles(rows) * 16 * COLUMNS * sizeof(float); }

/* Sums [rows][COLUMNS] of columns `tile` and, with `both`, the next one, to rows from `low` on of what comes out. */
INLINE void put_columns(const product *p, const float *sums, long low, long rows, long tile, int both) {
    __mmask16 left = first_lanes(p->n - tile * 16), right = both ? first_lanes(p->n - tile * 16 - 16) : 0;
    __m512 more = p->bias ? read_some(p->bias + tile * 16, left) : _mm512_setzero_ps(), further = _mm512_setzero_ps();
    if (p->bias && both) further = read_some(p->bias + tile * 16 + 16, right);
    for (long r = 0; r < rows; r++) {
        bf16 *to = p->out + (low + r) * p->out_stride + tile * 16;
        __builtin_prefetch(to + 16 * p->out_stride, 1, 2); /* rows far apart: each waits for its line otherwise */
        write_some(to, left, _mm512_add_ps(_mm512_loadu_ps(sums + r * COLUMNS), more));
        if (both) write_some(to + 16, right, _mm512_add_ps(_mm512_loadu_ps(sums + r * COLUMNS + 16), further));
    }
}

/* Row `at` in its place of [rows of 16][steps][16][32], zeros behind k numbers. */
INLINE void pack_row(const bf16 *row, long at, long k, bf16 *to) {
    to += (at / 16 * whole_steps(k) * 16 + at % 16) * STEP;
    for (long s = 0; s < whole_steps(k); s++)
        _mm512_store_si512(to + s * TILE, _mm512_maskz_loadu_epi16(first_halves(k - s * STEP), row + s * STEP));
}

#ifndef VECTOR_TILES
/* sums[16][16] = (more ? sums : 0) + rows of x times one column of tiles. */
INLINE void chain(const bf16 *x, long x_bytes, const bf16 *w, long steps, float *sums, int full, int more, int ahead) {
    TILES;
#define BODY(sum, left)                                                                \
    if (more) TILE_LOAD_SUM(sum, sums, 64);                                              \
    else TILE_ZERO(sum);                                                               \
    for (long s = 0; s < steps; s++) {                                                 \
        if (ahead) for (int z = 0; z < 16; z++) NEAR((const char *)(w + s * TILE + z * STEP) + 6144); \
        TILE_LOAD(left, x + s * STEP, x_bytes);                                        \
        TILE_LOAD(2, w + s * TILE, 64);                                                \
        TILE_DOT(sum, left, 2);                                                        \
    }                                                                                  \
    TILE_STORE(sum, sums, 64);
    if (full) {
        BODY(0, 1)
    } else {
        BODY(3, 4)
    }
#undef BODY
}
#endif
#endif
