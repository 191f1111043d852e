/* Decompressing latents: what both forms of attention over many new rows share. */
#ifndef AGENTSPEED_AMX_LATENTS_H
#define AGENTSPEED_AMX_LATENTS_H
#include "amx_pages.h"

/* key_up of a head, [rank][nope] in tile order, as right operands of latents x key_up: [nope / 16][rank / 32]. Turning
   them here, 2 us a head, saves a second copy of the weights. */
static void turn_key_up(const bf16 *key_up, long width, long nope_width, long head, bf16 *to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    long tiles = whole_tiles(width), rank_steps = whole_steps(width), nope_steps = whole_steps(nope_width);
    const bf16 *from = key_up + head * tiles * nope_steps * TILE;
    for (long rank = 0; rank < rank_steps; rank++)
        for (long nope = 0; nope < nope_steps; nope++) {
            __m512i rows[2][16];
            for (long half = 0; half < 2; half++) {
                long tile = 2 * rank + half;
                for (int i = 0; i < 16; i++)
                    rows[half][i] = tile < tiles ? _mm512_loadu_si512(from + (tile * nope_steps + nope) * TILE + i * STEP)
                                                 : _mm512_setzero_si512();
                transpose16(rows[half]); /* row r: 32 numbers of output r */
            }
            bf16 *even = to + (2 * nope * rank_steps + rank) * TILE, *odd = even + rank_steps * TILE;
            for (int i = 0; i < 16; i++) {
                __m512i first = rows[i / 8][i % 8 * 2], second = rows[i / 8][i % 8 * 2 + 1];
                _mm512_store_si512(even + i * STEP, _mm512_permutex2var_epi16(first, low, second));
                _mm512_store_si512(odd + i * STEP, _mm512_permutex2var_epi16(first, high, second));
            }
        }
}
#endif
