/* The library's interface: contexts, their memory, checked arguments, and running the steps. */
#define _POSIX_C_SOURCE 200809L /* posix_madvise */
#include "graphopt_runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ERROR_BYTES 256
/* Failed creates of so many threads at a time are remembered. (Thread-local variables would do the
 * same, but tie the library to the dynamic linker.) */
#define FAILED_THREADS 8

struct graphopt_context {
    graphopt_pool pool;
    graphopt_frame frame;
    void *own_arena; /* NULL when the caller brought one */
    uint64_t *step_times;
    _Atomic uint32_t busy;
    char error[ERROR_BYTES];
};

static struct {
    pthread_mutex_t lock;
    unsigned next;
    struct {
        pthread_t thread;
        int used;
        char error[ERROR_BYTES];
    } slots[FAILED_THREADS];
} failed = {.lock = PTHREAD_MUTEX_INITIALIZER};

static const graphopt_info *const info = &graphopt_model.info;

/* The calling thread's slot among the failed creates; takes one over if `make`. */
static char *failed_slot(int make) {
    const pthread_t self = pthread_self();
    char *text = NULL;
    pthread_mutex_lock(&failed.lock);
    for (unsigned i = 0; i < FAILED_THREADS && !text; i++) {
        if (failed.slots[i].used && pthread_equal(failed.slots[i].thread, self))
            text = failed.slots[i].error;
    }
    if (!text && make) {
        const unsigned i = failed.next++ % FAILED_THREADS;
        failed.slots[i].thread = self;
        failed.slots[i].used = 1;
        text = failed.slots[i].error;
    }
    pthread_mutex_unlock(&failed.lock);
    return text;
}

__attribute__((format(printf, 3, 4))) static graphopt_status fail(graphopt_context *context,
                                                                  graphopt_status status,
                                                                  const char *format, ...) {
    char *const text = context ? context->error : failed_slot(1);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, ERROR_BYTES, format, arguments);
    va_end(arguments);
    return status;
}

const graphopt_info *graphopt_get_info(void) { return info; }

static size_t arena_bytes(void) { return GRAPHOPT_ALIGN(info->arena_bytes); }

static size_t scratch_bytes(void) { return GRAPHOPT_ALIGN(info->scratch_bytes); }

size_t graphopt_arena_size(unsigned threads) {
    if (threads > GRAPHOPT_MAX_THREADS) return 0;
    const size_t count = threads ? threads : info->threads;
    const size_t bytes = arena_bytes() + count * scratch_bytes();
    return bytes ? bytes : GRAPHOPT_CACHE_LINE;
}

static graphopt_status check_options(const graphopt_options *options) {
    const size_t needed = graphopt_arena_size(options->threads);
    if (!needed)
        return fail(NULL, GRAPHOPT_ERROR_ARGUMENT, "%s: %u threads asked for, at most %u work",
                    info->name, options->threads, GRAPHOPT_MAX_THREADS);
    if (!options->arena && options->arena_size)
        return fail(NULL, GRAPHOPT_ERROR_ARGUMENT,
                    "%s: arena is NULL but arena_size is %zu; set both or neither", info->name,
                    options->arena_size);
    if (!options->arena) return GRAPHOPT_OK;
    if ((uintptr_t)options->arena % GRAPHOPT_ARENA_ALIGNMENT)
        return fail(NULL, GRAPHOPT_ERROR_ARGUMENT, "%s: the arena must be aligned to %d bytes",
                    info->name, GRAPHOPT_ARENA_ALIGNMENT);
    if (options->arena_size < needed)
        return fail(NULL, GRAPHOPT_ERROR_SIZE,
                    "%s: the arena has %zu bytes; with this number of threads it needs %zu",
                    info->name, options->arena_size, needed);
    return GRAPHOPT_OK;
}

/* Of a table only the pages that a run reads should take memory: without this, the system reads
 * their neighbours from storage too. Whether it listens makes no other difference. */
static void advise_tables(void) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (uint32_t i = 0; i < graphopt_model.table_count; i++) {
        const uintptr_t data = (uintptr_t)graphopt_model.tables[i].data;
        const uintptr_t begin = (data + page - 1) / page * page;
        const uintptr_t end = (data + graphopt_model.tables[i].bytes) / page * page;
        if (begin < end) (void)posix_madvise((void *)begin, end - begin, POSIX_MADV_RANDOM);
    }
}

graphopt_status graphopt_create(graphopt_context **context, const graphopt_options *options) {
    static const graphopt_options defaults = {0, NULL, 0};
    char missing[ERROR_BYTES - 80];
    if (!context)
        return fail(NULL, GRAPHOPT_ERROR_ARGUMENT, "%s: context is NULL: nowhere to put it",
                    info->name);
    *context = NULL;
    if (graphopt_cpu_missing(missing, sizeof missing))
        return fail(NULL, GRAPHOPT_ERROR_CPU, "%s: built for %s, but this CPU lacks %s",
                    info->name, info->target, missing);
    if (!options) options = &defaults;
    const graphopt_status status = check_options(options);
    if (status != GRAPHOPT_OK) return status;

    const unsigned threads = options->threads ? options->threads : info->threads;
    const size_t own_bytes = GRAPHOPT_ALIGN(sizeof(graphopt_context));
    const size_t list_bytes = threads * sizeof(graphopt_share);
    graphopt_context *const made = aligned_alloc(GRAPHOPT_CACHE_LINE, own_bytes + list_bytes);
    if (!made)
        return fail(NULL, GRAPHOPT_ERROR_MEMORY, "%s: no memory for a context", info->name);
    memset(made, 0, own_bytes + list_bytes);

    const size_t bytes = graphopt_arena_size(threads);
    if (!options->arena) {
        made->own_arena = aligned_alloc(GRAPHOPT_CACHE_LINE, bytes);
        if (!made->own_arena) {
            free(made);
            return fail(NULL, GRAPHOPT_ERROR_MEMORY, "%s: no memory for an arena of %zu bytes",
                        info->name, bytes);
        }
    }
    made->frame.arena = options->arena ? options->arena : made->own_arena;
    /* Touch every page now: what is short fails here, and the first run is as fast as the rest. */
    memset(made->frame.arena, 0, bytes);
    made->pool.threads = threads;
    made->pool.scratch = made->frame.arena + arena_bytes();
    made->pool.scratch_bytes = scratch_bytes();
    made->pool.shares = (graphopt_share *)((unsigned char *)made + own_bytes);
    advise_tables();
    const int error = graphopt_pool_start(&made->pool);
    if (error) {
        free(made->own_arena);
        free(made);
        return fail(NULL, GRAPHOPT_ERROR_THREAD, "%s: cannot start %u threads (error %d)",
                    info->name, threads - 1, error);
    }
    *context = made;
    return GRAPHOPT_OK;
}

static graphopt_status check_tensor(graphopt_context *context, const char *kind,
                                    const graphopt_tensor_info *tensor, const void *data,
                                    size_t bytes) {
    if (!data)
        return fail(context, GRAPHOPT_ERROR_ARGUMENT, "%s: %s %s is NULL", info->name, kind,
                    tensor->name);
    if (bytes != tensor->bytes)
        return fail(context, GRAPHOPT_ERROR_SIZE, "%s: %s %s has %zu bytes; the model's has %zu",
                    info->name, kind, tensor->name, bytes, tensor->bytes);
    if ((uintptr_t)data % tensor->item_bytes)
        return fail(context, GRAPHOPT_ERROR_ARGUMENT,
                    "%s: %s %s must be aligned to its element type, %u bytes", info->name, kind,
                    tensor->name, tensor->item_bytes);
    return GRAPHOPT_OK;
}

static int overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes) {
    return (uintptr_t)a < (uintptr_t)b + b_bytes && (uintptr_t)b < (uintptr_t)a + a_bytes;
}

/* The kernels may write an output before they have read the last of another tensor. */
static graphopt_status check_overlap(graphopt_context *context, const graphopt_input *inputs,
                                     const graphopt_output *outputs, uint32_t index) {
    const graphopt_output *const output = &outputs[index];
    const char *other = NULL;
    for (uint32_t i = 0; i < info->input_count; i++) {
        if (overlap(output->data, output->bytes, inputs[i].data, inputs[i].bytes))
            other = info->inputs[i].name;
    }
    for (uint32_t i = 0; i < index; i++) {
        if (overlap(output->data, output->bytes, outputs[i].data, outputs[i].bytes))
            other = info->outputs[i].name;
    }
    if (!other) return GRAPHOPT_OK;
    return fail(context, GRAPHOPT_ERROR_ARGUMENT, "%s: output %s overlaps %s in memory",
                info->name, info->outputs[index].name, other);
}

static graphopt_status check_tensors(graphopt_context *context, const graphopt_input *inputs,
                                     size_t input_count, const graphopt_output *outputs,
                                     size_t output_count) {
    graphopt_status status = GRAPHOPT_OK;
    if (input_count != info->input_count || output_count != info->output_count)
        return fail(context, GRAPHOPT_ERROR_ARGUMENT,
                    "%s: %zu inputs and %zu outputs given; the model has %u and %u", info->name,
                    input_count, output_count, info->input_count, info->output_count);
    if ((input_count && !inputs) || (output_count && !outputs))
        return fail(context, GRAPHOPT_ERROR_ARGUMENT, "%s: inputs or outputs is NULL",
                    info->name);
    for (uint32_t i = 0; i < input_count && status == GRAPHOPT_OK; i++)
        status = check_tensor(context, "input", &info->inputs[i], inputs[i].data, inputs[i].bytes);
    for (uint32_t i = 0; i < output_count && status == GRAPHOPT_OK; i++) {
        status =
            check_tensor(context, "output", &info->outputs[i], outputs[i].data, outputs[i].bytes);
        if (status == GRAPHOPT_OK) status = check_overlap(context, inputs, outputs, i);
    }
    return status;
}

graphopt_status graphopt_run(graphopt_context *context, const graphopt_input *inputs,
                             size_t input_count, const graphopt_output *outputs,
                             size_t output_count) {
    if (!context)
        return fail(NULL, GRAPHOPT_ERROR_ARGUMENT, "%s: run without a context", info->name);
    if (atomic_exchange(&context->busy, 1)) return GRAPHOPT_ERROR_BUSY;
    const graphopt_status status =
        check_tensors(context, inputs, input_count, outputs, output_count);
    if (status == GRAPHOPT_OK) {
        uint64_t *const times = context->step_times;
        context->frame.inputs = inputs;
        context->frame.outputs = outputs;
        for (uint32_t i = 0; i < info->step_count; i++) {
            const uint64_t begin = times ? graphopt_now() : 0;
            graphopt_pool_run(&context->pool, &graphopt_model.steps[i], &context->frame);
            if (times) times[i] = graphopt_now() - begin;
        }
    }
    atomic_store(&context->busy, 0);
    return status;
}

graphopt_status graphopt_profile(graphopt_context *context, uint64_t *nanoseconds, size_t count) {
    graphopt_status status = GRAPHOPT_OK;
    if (!context)
        return fail(NULL, GRAPHOPT_ERROR_ARGUMENT, "%s: profile without a context", info->name);
    if (atomic_exchange(&context->busy, 1)) return GRAPHOPT_ERROR_BUSY;
    if (count != (nanoseconds ? info->step_count : 0))
        status = fail(context, GRAPHOPT_ERROR_SIZE, "%s: %zu step times given; it has %u steps",
                      info->name, count, info->step_count);
    else
        context->step_times = nanoseconds;
    atomic_store(&context->busy, 0);
    return status;
}

void graphopt_destroy(graphopt_context *context) {
    if (!context) return;
    graphopt_pool_stop(&context->pool);
    free(context->own_arena);
    free(context);
}

const char *graphopt_last_error(const graphopt_context *context) {
    if (context) return context->error;
    const char *const text = failed_slot(0);
    return text ? text : "";
}

const char *graphopt_status_text(graphopt_status status) {
    switch (status) {
        case GRAPHOPT_OK: return "ok";
        case GRAPHOPT_ERROR_ARGUMENT: return "wrong argument";
        case GRAPHOPT_ERROR_SIZE: return "wrong size";
        case GRAPHOPT_ERROR_MEMORY: return "out of memory";
        case GRAPHOPT_ERROR_THREAD: return "cannot start threads";
        case GRAPHOPT_ERROR_CPU: return "the CPU lacks an instruction";
        case GRAPHOPT_ERROR_BUSY: return "the context is in use by another thread";
    }
    return "unknown status";
}
