/* Processes of one machine that compute together: they meet, sum and gather in memory that all of them have mapped. */
#define _GNU_SOURCE
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "native_run.h"

#define SPINS 2000      /* some tens of microseconds, before a rank lets others have its core */
#define NAP 50000000L   /* nanoseconds: how soon a rank that sleeps looks whether the group is broken */
enum { F32, F64, BF16 };
enum { DONE, ABANDONED, DIFFER, LATE }; /* LATE + the rank that did not come */

typedef struct {
    _Atomic uint32_t met;    /* how often this rank has come; it alone writes it */
    _Atomic uint32_t asleep; /* ranks that sleep until it comes */
    _Atomic uint64_t waited; /* nanoseconds that it waited for others */
    _Atomic int64_t doing[2];
    char rest[32];
} place;

typedef struct {
    _Atomic int broken; /* why, for all ranks: the first reason stays */
    char rest[60];
    place ranks[];
} hall;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void nap(_Atomic uint32_t *word, uint32_t seen) {
    struct timespec t = {0, NAP};
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, 0, 0);
#else
    (void)word, (void)seen;
    t.tv_nsec = 50000;
    nanosleep(&t, 0);
#endif
}

static void wake(_Atomic uint32_t *word) {
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, 0, 0, 0);
#else
    (void)word;
#endif
}

static inline void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline int here(const place *p, uint32_t turn) { return (int32_t)(atomic_load(&p->met) - turn) >= 0; }

static int broke(hall *h, int why) {
    int none = DONE;
    atomic_compare_exchange_strong(&h->broken, &none, why);
    return atomic_load(&h->broken);
}

static int await(hall *h, int other, uint32_t turn, int64_t began, int64_t patience) {
    place *p = &h->ranks[other];
    for (int i = 0; i < SPINS; i++) {
        if (here(p, turn)) return DONE;
        pause_core();
    }
    for (;;) {
        atomic_fetch_add(&p->asleep, 1);
        uint32_t seen = atomic_load(&p->met);
        if ((int32_t)(seen - turn) < 0) nap(&p->met, seen);
        atomic_fetch_sub(&p->asleep, 1);
        if (here(p, turn)) return DONE;
        if (atomic_load(&h->broken)) return atomic_load(&h->broken);
        if (now() - began > patience) return broke(h, LATE + other);
    }
}

/* Returns when all ranks have come as often as this one, all for the same. */
static int meet(hall *h, int rank, int ranks, int64_t doing, int64_t patience) {
    place *me = &h->ranks[rank];
    if (atomic_load(&h->broken)) return atomic_load(&h->broken);
    uint32_t turn = atomic_load(&me->met) + 1;
    atomic_store(&me->doing[turn & 1], doing);
    atomic_store(&me->met, turn);
    if (atomic_load(&me->asleep)) wake(&me->met);
    int64_t began = now();
    for (int other = 0; other < ranks; other++) {
        if (other == rank) continue;
        int answer = await(h, other, turn, began, patience);
        if (answer) return answer;
        if (atomic_load(&h->ranks[other].doing[turn & 1]) != doing) return broke(h, DIFFER);
    }
    atomic_fetch_add(&me->waited, (uint64_t)(now() - began));
    return DONE;
}

/* There are two slots a rank: whoever writes one for the turn after next knows that all have read this turn's. */
static char *slot(hall *h, int rank, int ranks, long bytes, uint32_t turn) {
    return (char *)&h->ranks[ranks] + ((turn & 1) * ranks + rank) * bytes;
}

static float wide(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* In the order of the ranks on every rank, so that all have the same bits. */
static void add(void *out, hall *h, int ranks, long bytes, uint32_t turn, long count, int kind) {
    if (kind == BF16) {
        uint16_t *to = out;
        for (long i = 0; i < count; i++) {
            float sum = 0;
            for (int r = 0; r < ranks; r++) sum += wide(((uint16_t *)slot(h, r, ranks, bytes, turn))[i]);
            to[i] = narrow(sum);
        }
        return;
    }
    memcpy(out, slot(h, 0, ranks, bytes, turn), count * (kind == F32 ? 4 : 8));
    for (int r = 1; r < ranks; r++) {
        const void *from = slot(h, r, ranks, bytes, turn);
        if (kind == F32) {
            float *to = out;
            const float *one = from;
            for (long i = 0; i < count; i++) to[i] += one[i];
        } else {
            double *to = out;
            const double *one = from;
            for (long i = 0; i < count; i++) to[i] += one[i];
        }
    }
}

/* Bytes of memory for a group whose slots have `bytes`, a multiple of 64. */
EXPORT long agentspeed_group_bytes(int ranks, long bytes) { return sizeof(hall) + ranks * (sizeof(place) + 2 * bytes); }

/* `data` becomes the sum of every rank's. A group that did not come together is broken afterwards. */
EXPORT int agentspeed_group_sum(void *memory, int rank, int ranks, long bytes, void *data, long count, int kind,
                                long milliseconds) {
    hall *h = memory;
    long item = kind == F64 ? 8 : kind == F32 ? 4 : 2, most = bytes / item;
    for (long at = 0; at < count; at += most) {
        long n = count - at < most ? count - at : most;
        char *mine = (char *)data + at * item;
        uint32_t turn = atomic_load(&h->ranks[rank].met) + 1;
        memcpy(slot(h, rank, ranks, bytes, turn), mine, n * item);
        int answer = meet(h, rank, ranks, n * 8 + kind + 1, milliseconds * 1000000LL);
        if (answer) return answer;
        add(mine, h, ranks, bytes, turn, n, kind);
    }
    return DONE;
}

EXPORT void agentspeed_group_sum_entry(const argument *a) {
    agentspeed_group_sum(a[0].p, a[1].i, a[2].i, a[3].l, a[4].p, a[5].l, a[6].i, a[7].l);
}

/* `all` [ranks, count] becomes every rank's `mine` [count], in bytes. With no bytes it only meets. */
EXPORT int agentspeed_group_gather(void *memory, int rank, int ranks, long bytes, const void *mine, void *all,
                                   long count, long milliseconds) {
    hall *h = memory;
    long at = 0;
    do {
        long n = count - at < bytes ? count - at : bytes;
        uint32_t turn = atomic_load(&h->ranks[rank].met) + 1;
        memcpy(slot(h, rank, ranks, bytes, turn), (const char *)mine + at, n);
        int answer = meet(h, rank, ranks, n * 8, milliseconds * 1000000LL);
        if (answer) return answer;
        for (int r = 0; r < ranks; r++) memcpy((char *)all + r * count + at, slot(h, r, ranks, bytes, turn), n);
        at += n;
    } while (at < count);
    return DONE;
}

EXPORT void agentspeed_group_abandon(void *memory) { broke(memory, ABANDONED); }

EXPORT int agentspeed_group_broken(void *memory) { return atomic_load(&((hall *)memory)->broken); }

EXPORT double agentspeed_group_waited(void *memory, int rank) {
    return atomic_load(&((hall *)memory)->ranks[rank].waited) * 1e-9;
}
