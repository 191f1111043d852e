/* A recorded step: calls of kernels with their arguments, made once and run again and again. */
#ifndef AGENTSPEED_NATIVE_RUN_H
#define AGENTSPEED_NATIVE_RUN_H

#define EXPORT __attribute__((visibility("default")))
#define MOST_ARGUMENTS 31

typedef union {
    void *p;
    long l;
    int i;
    float f;
} argument; /* 8 bytes */

typedef struct {
    void (*entry)(const argument *);
    argument arguments[MOST_ARGUMENTS];
} call;
#endif
