/* The tiles of amx_common.h on vectors, for processors with AVX512-BF16 and no AMX: the same kernels, one source.

   An operand is not copied when it is "loaded": its address is kept, and a product reads it where it lies. So memory that
   an operand names must stay as it is until the last product with it, which the kernels see to. A product is 16 steps, in
   each of which a row of the right operand meets one pair of numbers of every row of the left one: 16 accumulators, which
   the latency of the instruction needs, and no transposing. */
#ifndef AGENTSPEED_VECTOR_TILES_H
#define AGENTSPEED_VECTOR_TILES_H

typedef struct {
    const char *at;
    long bytes; /* between rows */
} tile_operand;

/* Tiles 0 and 3 are the accumulators; 3 has `tail` rows, like the left operands that meet it. */
typedef struct {
    float sums[2][SUMS];
    tile_operand at[8];
    int tail;
} __attribute__((aligned(64))) vector_tiles;

/* Asked for once in a function (TILES): in a shared library an address of a thread's memory is a call. */
static __thread vector_tiles tiles_of_thread;
__attribute__((const, noinline)) static vector_tiles *my_tiles(void) { return &tiles_of_thread; }

#define TILES vector_tiles *tiles = my_tiles()
#define SUM_OF(t) tiles->sums[(t) == 3]
#define ROWS_OF(t) ((t) == 3 ? tiles->tail : 16)
#define TILE_LOAD(t, p, stride) (tiles->at[t].at = (const char *)(p), tiles->at[t].bytes = (long)(stride))
#define TILE_LOAD_SUM(t, p, stride) copy_sums(SUM_OF(t), 64, (const char *)(p), (long)(stride), ROWS_OF(t))
#define TILE_STORE(t, p, stride) copy_sums((float *)(p), (long)(stride), (const char *)SUM_OF(t), 64, ROWS_OF(t))
#define TILE_ZERO(t) memset(SUM_OF(t), 0, sizeof SUM_OF(t))
#define TILE_DOT(sum, a, b) tile_dot(SUM_OF(sum), ROWS_OF(sum), tiles->at[a], tiles->at[b])

INLINE void tiles_begin(long tail) { my_tiles()->tail = tail ? (int)tail : 16; }
INLINE void tiles_end(void) {}

INLINE void copy_sums(float *to, long to_bytes, const char *from, long from_bytes, int rows) {
    for (int i = 0; i < rows; i++)
        _mm512_storeu_ps((float *)((char *)to + i * to_bytes), _mm512_loadu_ps((const float *)(from + i * from_bytes)));
}

/* `rows` is a constant where this is called, so that the sums stay in registers. */
INLINE void dot_rows(float *sums, const int rows, tile_operand a, tile_operand b) {
    __m512 s[16];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) s[r] = _mm512_load_ps(sums + r * 16);
    for (int k = 0; k < 16; k++) {
        __m512bh right = (__m512bh)_mm512_loadu_si512(b.at + k * b.bytes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            int pair;
            memcpy(&pair, a.at + r * a.bytes + k * 4, sizeof pair);
            s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)_mm512_set1_epi32(pair), right);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) _mm512_store_ps(sums + r * 16, s[r]);
}

/* Few rows wait for the instruction's latency: even and odd steps have sums of their own. */
INLINE void dot_few(float *sums, const int rows, tile_operand a, tile_operand b) {
    __m512 s[2][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) s[0][r] = _mm512_load_ps(sums + r * 16), s[1][r] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) {
        __m512bh right = (__m512bh)_mm512_loadu_si512(b.at + k * b.bytes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int pair;
            memcpy(&pair, a.at + r * a.bytes + k * 4, sizeof pair);
            s[k % 2][r] = _mm512_dpbf16_ps(s[k % 2][r], (__m512bh)_mm512_set1_epi32(pair), right);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) _mm512_store_ps(sums + r * 16, _mm512_add_ps(s[0][r], s[1][r]));
}

static void tile_dot_tail(float *sums, int rows, tile_operand a, tile_operand b) {
    switch (rows) {
#define FEW(n) case n: dot_few(sums, n, a, b); break
#define MANY(n) case n: dot_rows(sums, n, a, b); break
    FEW(1); FEW(2); FEW(3); FEW(4);
    MANY(5); MANY(6); MANY(7); MANY(8); MANY(9); MANY(10); MANY(11); MANY(12); MANY(13); MANY(14); MANY(15);
#undef FEW
#undef MANY
    default: dot_rows(sums, 16, a, b);
    }
}

INLINE void tile_dot(float *sums, int rows, tile_operand a, tile_operand b) {
    if (rows == 16) dot_rows(sums, 16, a, b);
    else tile_dot_tail(sums, rows, a, b);
}
#endif
