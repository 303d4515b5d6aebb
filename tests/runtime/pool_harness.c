/* The thread pool alone, for tests: counts how often each task of a step was done. */
#define _DEFAULT_SOURCE /* usleep */
#include "graphopt_runtime.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const graphopt_model_data graphopt_model = {.feature_count = 0};

static _Atomic int32_t *counts;
enum { KNOWN = 64 };
static _Atomic int32_t of_caller[KNOWN]; /* how often the calling thread did the first tasks */
static _Atomic uint64_t threads_seen; /* one bit per thread that did something */
static unsigned char *scratch_base;
static unsigned slow_thread;  /* sleeps before each of its chunks; 0: none */
static _Atomic int32_t slow_tasks; /* what it did all the same */
enum { EVERYBODY = 255 };

static void count(const graphopt_frame *frame, void *scratch, int32_t begin, int32_t end) {
    const unsigned thread = (unsigned)((unsigned char *)scratch - scratch_base) / 64;
    (void)frame;
    threads_seen |= UINT64_C(1) << (thread & 63);
    if (slow_thread == EVERYBODY || (slow_thread && thread == slow_thread)) usleep(2000);
    if (thread == slow_thread) slow_tasks += end - begin;
    for (int32_t task = begin; task < end; task++) {
        counts[task]++;
        if (!thread && task < KNOWN) of_caller[task]++;
    }
}

/* Runs `steps` steps of so many tasks; counts[task] is incremented once per step. Returns the set
 * of threads that worked, as bits, or 0 on failure. */
__attribute__((visibility("default"))) uint64_t cover(unsigned threads, int32_t tasks,
                                                      int32_t grain, int32_t steps,
                                                      unsigned slow, int32_t *result) {
    graphopt_pool *pool = aligned_alloc(GRAPHOPT_CACHE_LINE, sizeof *pool);
    graphopt_share *shares = aligned_alloc(GRAPHOPT_CACHE_LINE, threads * sizeof *shares);
    scratch_base = aligned_alloc(GRAPHOPT_CACHE_LINE, (size_t)threads * 64);
    counts = calloc((size_t)tasks + 1, sizeof *counts);
    if (!pool || !shares || !scratch_base || !counts) return 0;
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pool->scratch = scratch_base;
    pool->scratch_bytes = 64;
    memset(shares, 0, threads * sizeof *shares);
    pool->shares = shares;
    threads_seen = 0;
    slow_thread = slow;
    slow_tasks = 0;
    memset((void *)of_caller, 0, sizeof of_caller);
    if (graphopt_pool_start(pool)) return 0;
    const graphopt_step step = {count, tasks, grain};
    for (int32_t i = 0; i < steps; i++) graphopt_pool_run(pool, &step, NULL);
    graphopt_pool_stop(pool);
    for (int32_t i = 0; i < tasks; i++) result[i] = counts[i];
    free((void *)counts);
    free(scratch_base);
    free(shares);
    free(pool);
    return tasks ? threads_seen : 1;
}

__attribute__((visibility("default"))) int32_t share_of_the_slow(void) { return slow_tasks; }

__attribute__((visibility("default"))) int32_t share_of_the_caller(int32_t task) {
    return of_caller[task];
}

#ifdef HARNESS_MAIN
int main(void) {
    static int32_t result[64];
    for (unsigned threads = 1; threads <= 5; threads++)
        for (int32_t tasks = 0; tasks <= 40; tasks += 3)
            for (int32_t grain = 1; grain <= 7; grain += 3) {
                if (!cover(threads, tasks, grain, 20, 0, result)) return 2;
                for (int32_t i = 0; i < tasks; i++)
                    if (result[i] != 20) return 1;
            }
    return 0;
}
#endif
