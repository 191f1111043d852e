/* Weights of 8 bits in columns of 16 outputs, whatever the bytes stand for: a source that includes this says where bytes lie
   and how they become numbers (the functions that are declared here). */
#ifndef AGENTSPEED_AMX_BYTE_COLUMNS_H
#define AGENTSPEED_AMX_BYTE_COLUMNS_H
#include "amx_common.h"

#define BLOCK 128      /* inputs that share a scale in fp8, and as many are taken back together for tiles */
#define TOGETHER 512   /* for panels */
#define DEEP 64        /* inputs whose bytes are found together */
#define BLOCK_ROWS 512 /* rows that meet what was taken back */

typedef struct {
    const uint8_t *data;
    const float *scales;
    long n, k, group;
    long block; /* inputs that share their scales, or as many as are taken back together: whole steps */
} byte_weight;

/* A column of tiles of a matrix: outputs 16 t to 16 t + 15. No matrix: none. */
typedef struct {
    const byte_weight *of;
    long t;
} byte_column;

/* Of matrices that are stacked. */
INLINE byte_weight matrix_at(const byte_weight *first, long index);
/* The bytes of a column from an input on, DEEP of these, as [inputs by 4][16 outputs][4], zeros behind the last one; where they
   do not lie so, in `held`. */
INLINE const uint8_t *quads_at(const byte_weight *w, long t, long from, uint8_t *held);
/* 4 inputs of 16 outputs as two rows of a tile. */
INLINE void to_pairs(const uint8_t *quad, bf16 *to);
/* Of block b of the inputs of column t. */
INLINE __m512 block_scales(const byte_weight *w, long t, long b);

/* Steps of at most `most` inputs from an input on. */
INLINE long steps_from(const byte_weight *w, long from, long most) { return at_most(whole_steps(w->k) - from / STEP, most / STEP); }
#endif
