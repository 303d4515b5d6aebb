/* Every wrong call of the C interface gives its status and says what is wrong. */
#define _POSIX_C_SOURCE 200809L
#include "rows.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

static void expect(int line, rows_status got, rows_status wanted, const rows_context *context,
                   const char *words) {
    const char *const text = rows_last_error(context);
    if (got == wanted && strstr(text, words)) return;
    printf("line %d: status %d instead of %d, message \"%s\"\n", line, got, wanted, text);
    failures++;
}
#define EXPECT(call, status, context, words) expect(__LINE__, call, status, context, words)

static float x[ROWS_INPUT_X_ELEMENTS];
static int64_t ids[ROWS_INPUT_ROW_IDS_ELEMENTS] = {3, 0, 12, 3};
static float picked[ROWS_OUTPUT_PICKED_ELEMENTS];
static double total[ROWS_OUTPUT_TOTAL_ELEMENTS];
static const int64_t x_shape[ROWS_INPUT_X_RANK] = ROWS_INPUT_X_SHAPE;

static void check_create(void) {
    rows_context *context = (rows_context *)x;
    rows_options options = {0, NULL, 0};
    const size_t needed = rows_arena_size(2);
    unsigned char *arena = aligned_alloc(ROWS_ARENA_ALIGNMENT, needed + ROWS_ARENA_ALIGNMENT);
    if (!arena) abort();
    EXPECT(rows_create(NULL, NULL), ROWS_ERROR_ARGUMENT, NULL, "NULL");
    options.threads = ROWS_MAX_THREADS + 1;
    EXPECT(rows_create(&context, &options), ROWS_ERROR_ARGUMENT, NULL, "129 threads");
    if (context) failures++;
    options.threads = 2;
    options.arena_size = needed;
    EXPECT(rows_create(&context, &options), ROWS_ERROR_ARGUMENT, NULL, "arena is NULL");
    options.arena = arena;
    options.arena_size = needed - 1;
    EXPECT(rows_create(&context, &options), ROWS_ERROR_SIZE, NULL, "it needs 3584");
    options.arena = arena + 32;
    options.arena_size = needed;
    EXPECT(rows_create(&context, &options), ROWS_ERROR_ARGUMENT, NULL, "aligned to 64");
    options.arena = arena;
    EXPECT(rows_create(&context, &options), ROWS_OK, NULL, "");
    rows_destroy(context);
    free(arena);
    rows_destroy(NULL);
}

static void check_run(void) {
    rows_context *context;
    rows_input in[ROWS_INPUTS] = {{x, sizeof x}, {ids, sizeof ids}};
    rows_output out[ROWS_OUTPUTS] = {{picked, sizeof picked}, {total, sizeof total}};
    uint64_t times[4] = {0};
    if (rows_create(&context, NULL)) abort();
    EXPECT(rows_run(NULL, in, 2, out, 2), ROWS_ERROR_ARGUMENT, NULL, "without a context");
    EXPECT(rows_run(context, in, 1, out, 2), ROWS_ERROR_ARGUMENT, context, "1 inputs");
    EXPECT(rows_run(context, in, 2, out, 3), ROWS_ERROR_ARGUMENT, context, "3 outputs");
    EXPECT(rows_run(context, NULL, 2, out, 2), ROWS_ERROR_ARGUMENT, context, "is NULL");
    in[ROWS_INPUT_X].bytes -= 4;
    EXPECT(rows_run(context, in, 2, out, 2), ROWS_ERROR_SIZE, context, "input x has 1660 bytes");
    in[ROWS_INPUT_X].bytes += 4;
    in[ROWS_INPUT_ROW_IDS].data = NULL;
    EXPECT(rows_run(context, in, 2, out, 2), ROWS_ERROR_ARGUMENT, context, "row.ids is NULL");
    in[ROWS_INPUT_ROW_IDS].data = (char *)ids + 4;
    EXPECT(rows_run(context, in, 2, out, 2), ROWS_ERROR_ARGUMENT, context, "aligned");
    in[ROWS_INPUT_ROW_IDS].data = ids;
    out[ROWS_OUTPUT_TOTAL].bytes = 4;
    EXPECT(rows_run(context, in, 2, out, 2), ROWS_ERROR_SIZE, context, "output total has 4");
    out[ROWS_OUTPUT_TOTAL].bytes = 8;
    out[ROWS_OUTPUT_PICKED].data = x + 100;
    EXPECT(rows_run(context, in, 2, out, 2), ROWS_ERROR_ARGUMENT, context, "overlaps x");
    out[ROWS_OUTPUT_PICKED].data = picked;
    out[ROWS_OUTPUT_TOTAL].data = picked + 2;
    EXPECT(rows_run(context, in, 2, out, 2), ROWS_ERROR_ARGUMENT, context, "overlaps picked");
    out[ROWS_OUTPUT_TOTAL].data = total;
    EXPECT(rows_profile(context, times, 3), ROWS_ERROR_SIZE, context, "4 steps");
    EXPECT(rows_profile(context, times, 4), ROWS_OK, context, "");
    EXPECT(rows_run(context, in, 2, out, 2), ROWS_OK, context, "");
    EXPECT(rows_profile(context, NULL, 0), ROWS_OK, context, "");
    if (!times[0]) failures++;
    rows_destroy(context);
}

static void check_info(void) {
    const rows_info *const info = rows_get_info();
    if (strcmp(info->name, "rows") || info->abi != 1 || info->step_count != 4) failures++;
    if (info->input_count != ROWS_INPUTS || info->output_count != ROWS_OUTPUTS) failures++;
    if (strcmp(info->inputs[1].name, "row.ids") || strcmp(info->inputs[1].dtype, "int64"))
        failures++;
    if (info->inputs[0].shape[0] != x_shape[0] || info->inputs[0].bytes != sizeof x) failures++;
    if (info->outputs[1].rank != 0 || strcmp(info->step_names[2], "pick")) failures++;
    if (rows_arena_size(3) - rows_arena_size(2) != 128 || rows_arena_size(129)) failures++;
    if (strcmp(rows_status_text(ROWS_ERROR_BUSY), "the context is in use by another thread"))
        failures++;
}

int main(void) {
    check_create();
    check_run();
    check_info();
    if (!failures) puts("api ok");
    return failures != 0;
}
