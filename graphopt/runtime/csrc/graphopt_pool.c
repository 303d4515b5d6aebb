/* The thread pool: hands the tasks of a step out in chunks to whoever is awake.
 *
 * The caller publishes a step by one store to `untaken`, works like everybody else until no chunk
 * is left, and then waits for the chunks others have begun. Each thread has chunks of its own, at
 * the same part of every step, which it takes first: its caches hold what it has made of that part.
 * A worker that wakes late finds its share done, and one that never wakes holds nobody up. Spinning
 * is bounded; who waits longer parks. */
#define _GNU_SOURCE /* sched_getaffinity */
#include "graphopt_runtime.h"

#include <sched.h>
#include <signal.h>
#include <time.h>

/* More chunks than threads even out cores of different speed; 4 keeps the last wait under about a
 * quarter of one thread's share. */
#define CHUNKS_PER_THREAD 4
/* Of `untaken`. */
#define BITS GRAPHOPT_MAX_THREADS
/* Longer than the gaps between the steps of a model, shorter than anybody minds. */
#define SPIN_NANOSECONDS 100000
/* Enough for any kernel, and the same on every libc (musl's default is 128 KB). */
#define WORKER_STACK ((size_t)1 << 20)

uint64_t graphopt_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    /* `yield` is a no-op on most cores; `isb` really waits some tens of cycles. */
    __asm__ volatile("isb" ::: "memory");
#endif
}

static int has_work(graphopt_pool *pool) {
    return atomic_load(&pool->untaken) != 0;
}

static int has_work_or_stops(graphopt_pool *pool) {
    return has_work(pool) || atomic_load(&pool->stopping);
}

static int is_done(graphopt_pool *pool) { return atomic_load(&pool->pending) == 0; }

/* Spins until `ready`, at most the pool's spin time; returns whether it is. */
static int spin_until(graphopt_pool *pool, int (*ready)(graphopt_pool *)) {
    uint64_t deadline = 0;
    if (ready(pool)) return 1;
    if (!pool->spin) return 0;
    for (;;) {
        for (int i = 0; i < 64; i++) {
            relax();
            if (ready(pool)) return 1;
        }
        /* Whoever we wait for may be waiting for this very core. */
        sched_yield();
        const uint64_t now = graphopt_now();
        if (!deadline) deadline = now + pool->spin;
        if (now > deadline) return 0;
    }
}

static uint64_t lowest_bits(unsigned count) {
    return count < BITS ? (UINT64_C(1) << count) - 1 : ~UINT64_C(0);
}

/* Takes chunks of the current step until none is left: its own ones in ascending order, then the
 * last ones of others. */
static void work(graphopt_pool *pool, unsigned index) {
    void *const scratch = pool->scratch + index * pool->scratch_bytes;
    const unsigned each = BITS / pool->threads;
    const uint64_t own = lowest_bits(each) << index * each;
    uint64_t untaken = atomic_load(&pool->untaken);
    while (untaken) {
        const unsigned bit = (unsigned)(untaken & own ? __builtin_ctzll(untaken & own)
                                                      : BITS - 1 - __builtin_clzll(untaken));
        if (!atomic_compare_exchange_weak(&pool->untaken, &untaken,
                                          untaken & ~(UINT64_C(1) << bit)))
            continue;
        /* The chunk is ours, so the step cannot end and its fields cannot change before we say
         * that it is finished. */
        const int64_t chunk = (int64_t)(bit / each) * pool->share + bit % each;
        pool->function(pool->frame, scratch, (int32_t)(chunk * pool->tasks / pool->chunks),
                       (int32_t)((chunk + 1) * pool->tasks / pool->chunks));
        if (atomic_fetch_sub(&pool->pending, 1) == 1 && atomic_load(&pool->waiting)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
        untaken = atomic_load(&pool->untaken);
    }
}

static void *worker_main(void *argument) {
    graphopt_pool *const pool = argument;
    const unsigned index = atomic_fetch_add(&pool->arrived, 1) + 1;
    while (!atomic_load(&pool->stopping)) {
        if (!spin_until(pool, has_work_or_stops)) {
            /* Either we see the step that is published after this increment, or its publisher sees
             * the increment and, as we hold the lock until we really wait, wakes us. The step may
             * be done before we are awake. We spin for the next one then: whoever slept again here
             * would be late for every step that is shorter than a waking. */
            pthread_mutex_lock(&pool->lock);
            atomic_fetch_add(&pool->sleepers, 1);
            if (!has_work_or_stops(pool)) pthread_cond_wait(&pool->work, &pool->lock);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->lock);
        }
        work(pool, index);
    }
    return NULL;
}

static void wait_until_done(graphopt_pool *pool) {
    if (spin_until(pool, is_done)) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->waiting, 1);
    while (!is_done(pool)) pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->waiting, 0);
    pthread_mutex_unlock(&pool->lock);
}

void graphopt_pool_run(graphopt_pool *pool, const graphopt_step *step,
                       const graphopt_frame *frame) {
    const int64_t tasks = step->tasks;
    const int64_t wanted = (tasks + step->grain - 1) / step->grain;
    if (tasks <= 0) return;
    if (pool->threads == 1 || wanted == 1) {
        step->run(frame, pool->scratch, 0, step->tasks);
        return;
    }
    /* As many chunks for each thread, so that equally fast ones have done at the same time. */
    const unsigned each = BITS / pool->threads;
    const int64_t homes = wanted < pool->threads ? wanted : pool->threads;
    int64_t share = wanted / homes;
    if (share > CHUNKS_PER_THREAD) share = CHUNKS_PER_THREAD;
    if (share > each) share = each;
    uint64_t untaken = 0;
    for (int64_t i = 0; i < homes; i++) untaken |= lowest_bits((unsigned)share) << i * each;
    pool->function = step->run;
    pool->frame = frame;
    pool->tasks = step->tasks;
    pool->share = (int32_t)share;
    pool->chunks = (int32_t)(homes * share);
    atomic_store(&pool->pending, (uint32_t)pool->chunks);
    atomic_store(&pool->untaken, untaken);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
    }
    work(pool, 0);
    wait_until_done(pool);
}

/* Spinning only pays while every thread has a core of its own. */
static uint64_t spin_time(unsigned threads) {
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) return 0;
    return threads <= (unsigned)CPU_COUNT(&cpus) ? SPIN_NANOSECONDS : 0;
}

int graphopt_pool_start(graphopt_pool *pool) {
    pthread_attr_t attributes;
    sigset_t all;
    sigset_t before;
    int error;
    if (pool->threads == 1) return 0;
    pool->spin = spin_time(pool->threads);
    if ((error = pthread_mutex_init(&pool->lock, NULL))) return error;
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, WORKER_STACK);
    /* The application's signals are for its own threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (!error && pool->started < pool->threads - 1) {
        error = pthread_create(&pool->workers[pool->started], &attributes, worker_main, pool);
        if (!error) pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error) graphopt_pool_stop(pool);
    return error;
}

void graphopt_pool_stop(graphopt_pool *pool) {
    if (pool->threads == 1) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stopping, 1);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 0; i < pool->started; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
}
