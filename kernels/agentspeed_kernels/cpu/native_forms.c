/* Which forms of the kernels this processor and kernel can run: asked once in each process. */
#define EXPORT __attribute__((visibility("default")))

enum { AVX2 = 1, AVX512 = 2, AMX = 4, NEON = 8, AMX_REFUSED = 16, AVX512BF16 = 32 };

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static int has_avx512bf16(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && ((a >> 5) & 1);
}

static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && ((c >> 29) & 1);
}

static int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int tiles = (d >> 24) & 1, tile_bf16 = (d >> 22) & 1, tile_int8 = (d >> 25) & 1, vnni = (c >> 11) & 1;
    return tiles && tile_bf16 && tile_int8 && vnni && has_avx512bf16();
}

/* Linux gives the tile registers only to processes that ask (ARCH_REQ_XCOMP_PERM, state component 18). */
static int amx_granted(void) {
#ifdef __linux__
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

EXPORT int agentspeed_forms(void) {
    int forms = 0;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) forms |= AVX2;
    if ((forms & AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        forms |= AVX512;
    if ((forms & AVX512) && has_avx512bf16()) forms |= AVX512BF16;
    if ((forms & AVX512) && has_amx()) forms |= amx_granted() ? AMX : AMX_REFUSED;
    return forms;
}
#elif defined(__aarch64__)
EXPORT int agentspeed_forms(void) { return NEON; }
#else
EXPORT int agentspeed_forms(void) { return 0; }
#endif
