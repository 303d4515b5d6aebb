/* What the runtime, the thread pool, the CPU check and a model's generated C file share.
 *
 * All of it is compiled once per model with -DGRAPHOPT_PREFIX=<name>: every function gets the
 * model's name, so that libraries of several models link into one program. */
#ifndef GRAPHOPT_RUNTIME_H
#define GRAPHOPT_RUNTIME_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#ifndef GRAPHOPT_PREFIX
#error "compile with -DGRAPHOPT_PREFIX=<model name>"
#endif

#define GRAPHOPT_JOIN_(a, b) a##_##b
#define GRAPHOPT_JOIN(a, b) GRAPHOPT_JOIN_(a, b)
#define GRAPHOPT_PUBLIC(name) GRAPHOPT_JOIN(GRAPHOPT_PREFIX, name)
#define GRAPHOPT_PRIVATE(name) GRAPHOPT_JOIN(GRAPHOPT_PREFIX, rt_##name)

#define graphopt_get_info GRAPHOPT_PUBLIC(get_info)
#define graphopt_arena_size GRAPHOPT_PUBLIC(arena_size)
#define graphopt_create GRAPHOPT_PUBLIC(create)
#define graphopt_run GRAPHOPT_PUBLIC(run)
#define graphopt_profile GRAPHOPT_PUBLIC(profile)
#define graphopt_destroy GRAPHOPT_PUBLIC(destroy)
#define graphopt_last_error GRAPHOPT_PUBLIC(last_error)
#define graphopt_status_text GRAPHOPT_PUBLIC(status_text)

#define graphopt_model GRAPHOPT_PRIVATE(model)
#define graphopt_weights GRAPHOPT_PRIVATE(weights)
#define graphopt_cpu_missing GRAPHOPT_PRIVATE(cpu_missing)
#define graphopt_now GRAPHOPT_PRIVATE(now)
#define graphopt_pool_start GRAPHOPT_PRIVATE(pool_start)
#define graphopt_pool_stop GRAPHOPT_PRIVATE(pool_stop)
#define graphopt_pool_run GRAPHOPT_PRIVATE(pool_run)

#pragma GCC visibility push(default)
#include "graphopt_api.h"
#pragma GCC visibility pop

#define GRAPHOPT_CACHE_LINE 64
#define GRAPHOPT_ALIGN(bytes) \
    (((size_t)(bytes) + GRAPHOPT_CACHE_LINE - 1) & ~(size_t)(GRAPHOPT_CACHE_LINE - 1))

/* --- What a model's generated C file says ---------------------------------------------------- */

/* Where the kernels of one inference find their data. */
typedef struct {
    unsigned char *arena;
    const graphopt_input *inputs;
    const graphopt_output *outputs;
} graphopt_frame;

/* Does the tasks begin <= task < end of one step. */
typedef void graphopt_step_function(const graphopt_frame *frame, void *scratch, int32_t begin,
                                    int32_t end);

typedef struct {
    graphopt_step_function *run;
    int32_t tasks;
    int32_t grain; /* a step of so many tasks at most stays with the caller */
} graphopt_step;

/* One instruction set extension and how to ask for it.
 * x86: cpuid leaf and subleaf, register 0..3 = eax..edx, and the xcr0 bits by which the system
 * says that it saves the registers. Arm: leaf is AT_HWCAP or AT_HWCAP2. Needs every bit of mask. */
typedef struct {
    const char *name;
    uint32_t leaf;
    uint32_t subleaf;
    uint32_t reg;
    uint32_t mask;
    uint32_t xcr0;
} graphopt_feature;

/* Weights of which a run reads little, here and there. */
typedef struct {
    const unsigned char *data;
    size_t bytes;
} graphopt_table;

typedef struct {
    graphopt_info info;
    const graphopt_step *steps;
    const graphopt_feature *features;
    uint32_t feature_count;
    const graphopt_table *tables;
    uint32_t table_count;
} graphopt_model_data;

extern const graphopt_model_data graphopt_model;

/* --- graphopt_cpu.c --------------------------------------------------------------------------- */

/* Writes the names of the model's features this CPU lacks, with commas between, to `text`;
 * returns how many. */
unsigned graphopt_cpu_missing(char *text, size_t size);

/* --- graphopt_pool.c -------------------------------------------------------------------------- */

/* What one thread is to do of the current step. The fields behind `untaken` are written only while
 * nobody owns a chunk, and read only by owners of a chunk of this share. */
typedef struct {
    /* The chunks that nobody has taken yet, from the lower 16 bits' up to the upper ones'. Whoever
     * takes one off owns it. */
    _Alignas(GRAPHOPT_CACHE_LINE) _Atomic uint32_t untaken;
    int32_t tasks;  /* of the whole step */
    int32_t chunks; /* of the whole step */
    graphopt_step_function *function;
    const graphopt_frame *frame;
    _Atomic uint32_t asleep; /* whether the worker is parked on `wake` */
    /* Not of share 0, which is the caller's. */
    pthread_t worker;
    pthread_cond_t wake;
    struct graphopt_pool *pool;
} graphopt_share;

/* Workers that do one step's tasks together with the thread that calls. */
typedef struct graphopt_pool {
    /* Chunks of the current step that workers have finished. */
    _Alignas(GRAPHOPT_CACHE_LINE) _Atomic uint32_t finished;
    _Alignas(GRAPHOPT_CACHE_LINE) _Atomic uint32_t waiting; /* whether the caller is parked */
    _Atomic uint32_t stopping;

    graphopt_share *shares; /* of each thread */
    unsigned char *scratch; /* of thread 0; the others' follow */
    size_t scratch_bytes;
    uint64_t spin; /* nanoseconds to spin before parking */
    unsigned threads;
    unsigned started; /* workers to join */
    pthread_mutex_t lock;
    pthread_cond_t done;
} graphopt_pool;

uint64_t graphopt_now(void); /* monotonic nanoseconds */
/* Fields threads, scratch, scratch_bytes and shares are set, all else zero. Returns 0, or an
 * errno with nothing left running. */
int graphopt_pool_start(graphopt_pool *pool);
void graphopt_pool_stop(graphopt_pool *pool);
void graphopt_pool_run(graphopt_pool *pool, const graphopt_step *step, const graphopt_frame *frame);

#endif
