/* Scratch memory of a thread: it grows, is kept between calls, and goes with the thread. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define USES 2

typedef struct {
    void *memory[USES];
    size_t bytes[USES];
} held;

static __thread held mine;
static pthread_key_t at_end;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void let_go(void *of) {
    held *h = of;
    for (int i = 0; i < USES; i++) free(h->memory[i]), h->memory[i] = 0, h->bytes[i] = 0;
}
static void make_key(void) { pthread_key_create(&at_end, let_go); }

/* 64-byte aligned; the contents are whatever was there. */
void *agentspeed_scratch(int use, size_t bytes) {
    if (mine.bytes[use] >= bytes) return mine.memory[use];
    pthread_once(&once, make_key);
    pthread_setspecific(at_end, &mine);
    free(mine.memory[use]);
    size_t wanted = (bytes + 4095) & ~(size_t)4095;
    if (posix_memalign(&mine.memory[use], 64, wanted)) {
        fprintf(stderr, "agentspeed: no memory for %zu bytes of kernel scratch\n", wanted);
        abort();
    }
    mine.bytes[use] = wanted;
    return mine.memory[use];
}
