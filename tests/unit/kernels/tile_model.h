/* The tile registers of AMX in software: what the kernels for AMX are run with where there is no such unit. A product whose
   operands do not fit ends the process, as the processor would. */
static __thread struct {
    char row[8][16][64];
    int rows[8];
} tile_model;
__attribute__((weak, visibility("default"))) long tile_products; /* of all files together */

#define TILES
#define TILE_LOAD(t, p, stride) model_load(t, (const char *)(p), (long)(stride))
#define TILE_LOAD_SUM(t, p, stride) TILE_LOAD(t, p, stride)
#define TILE_STORE(t, p, stride) model_store(t, (char *)(p), (long)(stride))
#define TILE_ZERO(t) memset(tile_model.row[t], 0, sizeof tile_model.row[t])
#define TILE_DOT(sum, a, b) model_dot(sum, a, b, 0)
#define TILE_DOT_BYTES(sum, a, b) model_dot(sum, a, b, 1)

static inline void tiles_begin(long tail) {
    for (int i = 0; i < 8; i++) tile_model.rows[i] = (i == 3 || i == 4) && tail ? (int)tail : 16;
}
static inline void tiles_end(void) { memset(tile_model.rows, 0, sizeof tile_model.rows); }

__attribute__((noinline)) static void model_load(int t, const char *from, long bytes) {
    if (!tile_model.rows[t]) abort(); /* before tiles_begin */
    memset(tile_model.row[t], 0, sizeof tile_model.row[t]);
    for (int r = 0; r < tile_model.rows[t]; r++) memcpy(tile_model.row[t][r], from + r * bytes, 64);
}
__attribute__((noinline)) static void model_store(int t, char *to, long bytes) {
    for (int r = 0; r < tile_model.rows[t]; r++) memcpy(to + r * bytes, tile_model.row[t][r], 64);
}

__attribute__((noinline)) static void model_dot(int sum, int a, int b, int bytes) {
    if (tile_model.rows[sum] != tile_model.rows[a] || tile_model.rows[b] != 16) abort();
    tile_products++;
    for (int r = 0; r < tile_model.rows[sum]; r++) {
        __m512i held = _mm512_loadu_si512(tile_model.row[sum][r]);
        for (int k = 0; k < 16; k++) {
            int four;
            memcpy(&four, tile_model.row[a][r] + 4 * k, sizeof four);
            __m512i left = _mm512_set1_epi32(four), right = _mm512_loadu_si512(tile_model.row[b][k]);
            if (bytes) held = _mm512_dpbusd_epi32(held, right, left);
            else held = (__m512i)_mm512_dpbf16_ps((__m512)held, (__m512bh)left, (__m512bh)right);
        }
        _mm512_storeu_si512(tile_model.row[sum][r], held);
    }
}
