/* The thread pool: hands the tasks of a step out in chunks to whoever is awake.
 *
 * Each thread has a share of the chunks, the same part of every step, because its caches hold what
 * it has made of that part. The caller publishes a share by one store to the thread's `untaken`,
 * works like everybody else, and then waits for what others have begun. Who has done its own share
 * takes the last chunks of others', so a worker that wakes late finds its share done, and one that
 * never wakes holds nobody up. Spinning is bounded; who waits longer parks.
 *
 * Of many a model the steps take microseconds, and a cache line takes a tenth of one from core to
 * core. So all that a thread must know of a step is in one line, and it says but once that its
 * chunks are finished. */
#define _GNU_SOURCE /* sched_getaffinity */
#include "graphopt_runtime.h"

#include <sched.h>
#include <signal.h>
#include <time.h>

/* More chunks than threads even out cores of different speed; 4 keeps the last wait under about a
 * quarter of one thread's share. */
#define CHUNKS_PER_THREAD 4
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

/* The chunks [first, end) of a share that nobody has taken. */
static uint32_t range(uint32_t first, uint32_t end) { return end << 16 | first; }
static uint32_t first_of(uint32_t untaken) { return untaken & 0xffff; }
static uint32_t end_of(uint32_t untaken) { return untaken >> 16; }
static int is_empty(uint32_t untaken) { return first_of(untaken) >= end_of(untaken); }

static int has_work_or_stops(graphopt_pool *pool, unsigned index) {
    return !is_empty(atomic_load(&pool->shares[index].untaken)) || atomic_load(&pool->stopping);
}

/* Whether others have finished so many chunks. */
static int is_done(graphopt_pool *pool, unsigned chunks) {
    return atomic_load(&pool->finished) == chunks;
}

/* Spins until `ready`, at most the pool's spin time; returns whether it is. */
static int spin_until(graphopt_pool *pool, int (*ready)(graphopt_pool *, unsigned),
                      unsigned argument) {
    uint64_t deadline = 0;
    if (ready(pool, argument)) return 1;
    if (!pool->spin) return 0;
    for (;;) {
        for (int i = 0; i < 64; i++) {
            relax();
            if (ready(pool, argument)) return 1;
        }
        /* Whoever we wait for may be waiting for this very core. */
        sched_yield();
        const uint64_t now = graphopt_now();
        if (!deadline) deadline = now + pool->spin;
        if (now > deadline) return 0;
    }
}

/* Takes and does the first or the last chunk of this share; returns whether there was one. */
static int take(graphopt_share *share, int last, void *scratch) {
    uint32_t untaken = atomic_load(&share->untaken);
    uint32_t chunk, rest;
    do {
        const uint32_t first = first_of(untaken), end = end_of(untaken);
        if (is_empty(untaken)) return 0;
        chunk = last ? end - 1 : first;
        rest = last ? range(first, end - 1) : range(first + 1, end);
    } while (!atomic_compare_exchange_weak(&share->untaken, &untaken, rest));
    /* The chunk is ours, so the step cannot end and its fields cannot change before we say that it
     * is finished. */
    const int64_t tasks = share->tasks;
    share->function(share->frame, scratch, (int32_t)(chunk * tasks / share->chunks),
                    (int32_t)((chunk + 1) * tasks / share->chunks));
    return 1;
}

/* Does chunks of the current step until none is left: its own in ascending order, then the last
 * ones of others. Returns how many it did. */
static unsigned work(graphopt_pool *pool, unsigned index) {
    void *const scratch = pool->scratch + index * pool->scratch_bytes;
    unsigned did = 0;
    for (unsigned i = 0; i < pool->threads; i++) {
        graphopt_share *const share = &pool->shares[(index + i) % pool->threads];
        while (take(share, i > 0, scratch)) did++;
    }
    return did;
}

static void *worker_main(void *argument) {
    graphopt_share *const share = argument;
    graphopt_pool *const pool = share->pool;
    const unsigned index = (unsigned)(share - pool->shares);
    while (!atomic_load(&pool->stopping)) {
        if (!spin_until(pool, has_work_or_stops, index)) {
            /* Either we see the chunks that are published after this store, or their publisher sees
             * what is stored and, as we hold the lock until we really wait, wakes us. The step may
             * be done before we are awake. We spin for the next one then: whoever slept again here
             * would be late for every step that is shorter than a waking. */
            pthread_mutex_lock(&pool->lock);
            atomic_store(&share->asleep, 1);
            if (!has_work_or_stops(pool, index)) pthread_cond_wait(&share->wake, &pool->lock);
            atomic_store(&share->asleep, 0);
            pthread_mutex_unlock(&pool->lock);
        }
        const unsigned did = work(pool, index);
        if (!did) continue;
        atomic_fetch_add(&pool->finished, did);
        if (atomic_load(&pool->waiting)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
    return NULL;
}

static void wait_until_done(graphopt_pool *pool, unsigned chunks) {
    if (spin_until(pool, is_done, chunks)) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->waiting, 1);
    while (!is_done(pool, chunks)) pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->waiting, 0);
    pthread_mutex_unlock(&pool->lock);
}

static void wake(graphopt_pool *pool, unsigned index) {
    pthread_mutex_lock(&pool->lock);
    pthread_cond_signal(&pool->shares[index].wake);
    pthread_mutex_unlock(&pool->lock);
}

void graphopt_pool_run(graphopt_pool *pool, const graphopt_step *step,
                       const graphopt_frame *frame) {
    const int64_t wanted = ((int64_t)step->tasks + step->grain - 1) / step->grain;
    if (step->tasks <= 0) return;
    if (pool->threads == 1 || wanted == 1) {
        step->run(frame, pool->scratch, 0, step->tasks);
        return;
    }
    /* As many chunks for each thread, so that equally fast ones have done at the same time. */
    const uint32_t shares = wanted < pool->threads ? (uint32_t)wanted : pool->threads;
    const uint32_t each =
        wanted / shares < CHUNKS_PER_THREAD ? (uint32_t)(wanted / shares) : CHUNKS_PER_THREAD;
    atomic_store(&pool->finished, 0);
    for (uint32_t i = shares; i-- > 0;) {
        graphopt_share *const share = &pool->shares[i];
        share->function = step->run;
        share->frame = frame;
        share->tasks = step->tasks;
        share->chunks = (int32_t)(shares * each);
        atomic_store(&share->untaken, range(i * each, (i + 1) * each));
    }
    for (uint32_t i = 1; i < shares; i++)
        if (atomic_load(&pool->shares[i].asleep)) wake(pool, i);
    const unsigned did = work(pool, 0);
    wait_until_done(pool, shares * each - did);
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
    for (unsigned i = 1; i < pool->threads; i++) pthread_cond_init(&pool->shares[i].wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, WORKER_STACK);
    /* The application's signals are for its own threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (!error && pool->started < pool->threads - 1) {
        graphopt_share *const share = &pool->shares[pool->started + 1];
        share->pool = pool;
        error = pthread_create(&share->worker, &attributes, worker_main, share);
        if (!error) pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error) graphopt_pool_stop(pool);
    return error;
}

void graphopt_pool_stop(graphopt_pool *pool) {
    if (pool->threads == 1) return;
    atomic_store(&pool->stopping, 1);
    for (unsigned i = 1; i <= pool->started; i++) wake(pool, i);
    for (unsigned i = 0; i < pool->started; i++) pthread_join(pool->shares[i + 1].worker, NULL);
    pthread_cond_destroy(&pool->done);
    for (unsigned i = 1; i < pool->threads; i++) pthread_cond_destroy(&pool->shares[i].wake);
    pthread_mutex_destroy(&pool->lock);
}
