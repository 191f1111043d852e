/* Rows of a KV cache in fp8 (fp8_cache.py): what a kernel that knows rows of numbers needs to read and write them.

   A row is the bytes of its heads, a float scale for each of them, and plain numbers in bf16; each section begins at a
   multiple of 16 bytes. Kernels take a few rows back to numbers in the first cache, once for all that reads them there. */
#ifndef AGENTSPEED_NATIVE_CACHE_H
#define AGENTSPEED_NATIVE_CACHE_H
#include "native_e4m3.h"
#include <float.h>

#define MOST_E4M3 448.0f

typedef struct {
    long heads, width, plain;         /* numbers of a head, and plain ones */
    long scales_at, plain_at, bytes;  /* of a row */
} coded_row;

INLINE long in_sixteens(long bytes) { return (bytes + 15) / 16 * 16; }

INLINE coded_row coded_rows(long heads, long width, long plain) {
    coded_row made = {heads, width, plain, in_sixteens(heads * width), 0, 0};
    made.plain_at = made.scales_at + in_sixteens(4 * heads), made.bytes = made.plain_at + in_sixteens(2 * plain);
    return made;
}

/* DEEP numbers. */
INLINE void write_wide(num *to, wide low, wide high) {
#if defined(HALF) && defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#elif REGISTERS >= 32
    write_vec(to, low), write_vec(to + WIDE, high);
#elif defined(HALF)
    typedef uint16_t halves __attribute__((vector_size(2 * NARROW), aligned(2), may_alias));
    for (int side = 0; side < 2; side++) {
        narrow x = side ? high : low;
        narrow_bits bits = (narrow_bits)x, none = (narrow_bits)(x != x);
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        *(halves *)(to + side * WIDE) = __builtin_convertvector((bits & ~none) | (none & 0x7fc0), halves);
    }
#else
    *(wide *)to = low, *(wide *)(to + WIDE) = high;
#endif
}

/* The numbers of a head, and zeros up to a multiple of DEEP. */
INLINE void decode_head(const coded_row *c, const uint8_t *row, long head, num *to) {
    const uint8_t *from = row + head * c->width;
    float scale;
    memcpy(&scale, row + c->scales_at + 4 * head, sizeof scale);
    scale *= FACTOR;
    for (long k = 0; k < c->width; k += DEEP) {
        uint8_t end[DEEP] = {0};
        const uint8_t *at = from + k;
        if (c->width - k < DEEP) at = memcpy(end, at, c->width - k); /* the end of a row may be that of memory */
        wide low, high;
        to_floats(at, &low, &high);
        write_wide(to + k, low * scale, high * scale);
    }
}

INLINE void decode_plain(const coded_row *c, const uint8_t *row, num *to) {
#ifdef HALF
    memcpy(to, row + c->plain_at, c->plain * sizeof(num));
#else
    for (long i = 0; i < c->plain; i++) to[i] = of_half(((const uint16_t *)(row + c->plain_at))[i]);
#endif
}

/* What those read who read one head: its numbers, and behind them what is plain. */
INLINE void decode_part(const coded_row *c, const uint8_t *row, long head, num *to) {
    decode_head(c, row, head, to);
    if (c->plain) decode_plain(c, row, to + c->width);
}

INLINE wide choose(wide_ints mask, wide yes, wide no) { return (wide)(((wide_ints)yes & mask) | ((wide_ints)no & ~mask)); }

/* WIDE numbers, or n and zeros. */
INLINE wide read_wide(const num *x, long n) {
    num held[WIDE] __attribute__((aligned(64)));
    if (n < WIDE) memset(held, 0, sizeof held), x = memcpy(held, x, n * sizeof(num));
#if REGISTERS >= 32
    return read_vec(x);
#else
    return read_narrow(x);
#endif
}

/* The nearest byte of numbers of up to 448 in magnitude, to even between two; 0 for what is no number. */
INLINE wide_ints nearest_e4m3(wide x) {
    wide_ints sign = (wide_ints)x & INT32_MIN, bits = (wide_ints)x & INT32_MAX;
    wide_ints usual = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    const wide magic = (wide){0} + 16384.0f; /* whose last place is that of the smallest numbers */
    wide_ints small = (wide_ints)((wide)bits + magic) - (wide_ints)magic;
    wide_ints made = (wide_ints)choose(bits < 121 << 23, (wide)small, (wide)usual) | ((sign >> 24) & 0x80);
    return made & (wide_ints)(x == x);
}

/* A head of a row: the scale makes its largest number 448, is 1 where that would be no normal number, and none where a
   number is not finite. */
INLINE void code_head(const coded_row *c, const num *x, uint8_t *row, long head) {
    typedef uint8_t bytes __attribute__((vector_size(WIDE), aligned(1), may_alias));
    wide_ints most = {0}; /* as integers: the largest of those that are no number */
    for (long k = 0; k < c->width; k += WIDE) {
        wide_ints size = (wide_ints)read_wide(x + k, c->width - k) & INT32_MAX;
        most = (wide_ints)choose(size > most, (wide)size, (wide)most);
    }
    int32_t top = 0;
    for (int i = 0; i < WIDE; i++) top = most[i] > top ? most[i] : top;
    float largest;
    memcpy(&largest, &top, sizeof largest);
    largest /= MOST_E4M3;
    int finite = top < 0x7f800000;
    float by = finite && largest >= FLT_MIN ? largest : 1.0f, scale = finite ? by : NAN;
    const wide ceiling = (wide){0} + MOST_E4M3;
    for (long k = 0; k < c->width; k += WIDE) {
        wide v = read_wide(x + k, c->width - k) / by;
        v = choose(v > ceiling, ceiling, choose(v < -ceiling, -ceiling, v));
        bytes made = __builtin_convertvector(nearest_e4m3(v), bytes);
        if (c->width - k < WIDE) memcpy(row + head * c->width + k, &made, c->width - k);
        else *(bytes *)(row + head * c->width + k) = made;
    }
    memcpy(row + c->scales_at + 4 * head, &scale, sizeof scale);
}

/* What lies between the sections of a row. */
INLINE void blank_row(const coded_row *c, uint8_t *row) {
    memset(row + c->heads * c->width, 0, c->bytes - c->heads * c->width);
}

INLINE void code_plain(const coded_row *c, const num *x, uint8_t *row) {
    for (long i = 0; i < c->plain; i++) ((uint16_t *)(row + c->plain_at))[i] = half_of(read_one(x[i]));
}
#endif
