/* Runs the calls of a recorded step one after the other. */
#include "native_run.h"

EXPORT void agentspeed_run(const call *calls, long count) {
    for (long i = 0; i < count; i++) calls[i].entry(calls[i].arguments);
}
