/* Uses a model as programs do: `check_use MODE THREADS REPEATS`.
 *
 * cycle: create, run and destroy again and again, in turn with an own and a foreign arena.
 * quiet: count what `run` allocates (link with --wrap=malloc and so on).
 * pair:  two contexts on two threads at the same time. */
#define _POSIX_C_SOURCE 200809L
#include "rows.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float x[ROWS_INPUT_X_ELEMENTS];
static const int64_t ids[] = {3, 0, 12, 3};
static const rows_input in[ROWS_INPUTS] = {{x, sizeof x}, {ids, sizeof ids}};

typedef struct {
    float picked[ROWS_OUTPUT_PICKED_ELEMENTS];
    double total[1];
} result;

static void check(rows_status status, const rows_context *context) {
    if (!status) return;
    printf("status %d: %s\n", status, rows_last_error(context));
    exit(1);
}

static result run(rows_context *context) {
    result r;
    memset(&r, 0, sizeof r);
    const rows_output out[ROWS_OUTPUTS] = {{r.picked, sizeof r.picked}, {r.total, sizeof r.total}};
    check(rows_run(context, in, ROWS_INPUTS, out, ROWS_OUTPUTS), context);
    return r;
}

static result expected;
static unsigned threads;
static long repeats;

static void compare(const result *r) {
    if (!memcmp(r, &expected, sizeof expected)) return;
    puts("another result");
    exit(1);
}

static rows_context *create(void *arena) {
    rows_context *context;
    const rows_options options = {threads, arena, arena ? rows_arena_size(threads) : 0};
    check(rows_create(&context, &options), NULL);
    return context;
}

static void cycle(void) {
    void *const arena = aligned_alloc(ROWS_ARENA_ALIGNMENT, rows_arena_size(threads));
    for (long i = 0; i < repeats; i++) {
        rows_context *const context = create(i % 2 ? arena : NULL);
        const result r = run(context);
        compare(&r);
        rows_destroy(context);
    }
    free(arena);
}

static void *repeat(void *context) {
    for (long i = 0; i < repeats; i++) {
        const result r = run(context);
        compare(&r);
    }
    return NULL;
}

static void pair(void) {
    rows_context *const contexts[2] = {create(NULL), create(NULL)};
    pthread_t other;
    if (pthread_create(&other, NULL, repeat, contexts[1])) exit(1);
    repeat(contexts[0]);
    pthread_join(other, NULL);
    rows_destroy(contexts[0]);
    rows_destroy(contexts[1]);
}

#ifdef COUNT_ALLOCATIONS
static _Atomic long allocations;
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__wrap_malloc(size_t size) { allocations++; return __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) { allocations++; return __real_calloc(count, size); }
void *__wrap_realloc(void *old, size_t size) { allocations++; return __real_realloc(old, size); }
void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    allocations++;
    return __real_aligned_alloc(alignment, size);
}

static void quiet(void) {
    rows_context *const context = create(NULL);
    const long created = allocations;
    repeat(context);
    printf("create allocated %ld times, run %ld times\n", created, allocations - created);
    rows_destroy(context);
}
#endif

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    for (int i = 0; i < ROWS_INPUT_X_ELEMENTS; i++) x[i] = (float)(i % 17 - 8);
    threads = 1;
    rows_context *const context = create(NULL);
    expected = run(context);
    rows_destroy(context);
    threads = (unsigned)atoi(argv[2]);
    repeats = atol(argv[3]);
    if (!strcmp(argv[1], "cycle")) cycle();
    if (!strcmp(argv[1], "pair")) pair();
#ifdef COUNT_ALLOCATIONS
    if (!strcmp(argv[1], "quiet")) quiet();
#endif
    puts("use ok");
    return 0;
}
