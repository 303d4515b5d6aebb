/* Runs one compiled model from the command line, on any board: the static program that graphopt's
 * devices copy to the board or start under an emulator.
 *
 *     runner [--threads N] [--repeat N] [--warmup N] <inputs >outputs 2>times
 *     runner --info
 *
 * Standard input: the raw bytes of all inputs in the model's order, nothing between them. Standard
 * output: the outputs of the last run, likewise. Standard error: one line `time_ns <n>` per counted
 * run. Exit 0; 2 for a wrong command line; 3 for input of another size; 4 for no memory;
 * 10 + status when the library refuses, with its message on standard error.
 *
 * Compiled with -DGRAPHOPT_MODEL=<name> -DGRAPHOPT_HEADER="<name>.h" and linked with lib<name>.a. */
#define _POSIX_C_SOURCE 200809L
#include GRAPHOPT_HEADER

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define MODEL(name) JOIN(GRAPHOPT_MODEL, name)

enum { EXIT_USAGE = 2, EXIT_INPUT = 3, EXIT_MEMORY = 4, EXIT_LIBRARY = 10 };

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void print_tensors(const char *kind, const MODEL(tensor_info) * tensors, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        printf("%s %s %s", kind, tensors[i].name, tensors[i].dtype);
        for (uint32_t d = 0; d < tensors[i].rank; d++)
            printf("%c%lld", d ? 'x' : ' ', (long long)tensors[i].shape[d]);
        printf("\n");
    }
}

static void print_info(const MODEL(info) * info) {
    printf("name %s\nversion %s\ntarget %s\nthreads %u\narena %zu\nscratch %zu\nweights %zu\n",
           info->name, info->version, info->target, info->threads, info->arena_bytes,
           info->scratch_bytes, info->weights_bytes);
    print_tensors("input", info->inputs, info->input_count);
    print_tensors("output", info->outputs, info->output_count);
}

static int usage(const char *program) {
    fprintf(stderr, "usage: %s [--threads N] [--repeat N] [--warmup N] <inputs >outputs\n"
                    "       %s --info\n", program, program);
    return EXIT_USAGE;
}

/* A decimal number up to `most`, or -1. */
static long number(const char *text, long most) {
    char *end;
    if (!text || !*text) return -1;
    const long value = strtol(text, &end, 10);
    return *end || value < 0 || value > most ? -1 : value;
}

static void *allocate(size_t bytes) {
    void *const memory = malloc(bytes ? bytes : 1);
    if (!memory) {
        fprintf(stderr, "out of memory: %zu bytes\n", bytes);
        exit(EXIT_MEMORY);
    }
    return memory;
}

static int refused(MODEL(context) * context, MODEL(status) status) {
    const char *const text = MODEL(last_error)(context);
    fprintf(stderr, "%s\n", *text ? text : MODEL(status_text)(status));
    MODEL(destroy)(context);
    return EXIT_LIBRARY + (int)status;
}

int main(int argc, char **argv) {
    const MODEL(info) *const info = MODEL(get_info)();
    long threads = 0;
    long repeat = 1;
    long warmup = 0;
    for (int i = 1; i < argc; i += 2) {
        long *option = NULL;
        if (!strcmp(argv[i], "--info")) {
            print_info(info);
            return 0;
        }
        if (!strcmp(argv[i], "--threads")) option = &threads;
        if (!strcmp(argv[i], "--repeat")) option = &repeat;
        if (!strcmp(argv[i], "--warmup")) option = &warmup;
        if (!option || (*option = number(argv[i + 1], 1000000000)) < 0) return usage(argv[0]);
    }

    MODEL(options) options;
    memset(&options, 0, sizeof options);
    options.threads = (unsigned)threads;
    MODEL(context) *context = NULL;
    MODEL(status) status = MODEL(create)(&context, &options);
    if (status) return refused(NULL, status);

    MODEL(input) *const inputs = allocate(info->input_count * sizeof *inputs);
    MODEL(output) *const outputs = allocate(info->output_count * sizeof *outputs);
    for (uint32_t i = 0; i < info->input_count; i++) {
        void *const data = allocate(info->inputs[i].bytes);
        if (fread(data, 1, info->inputs[i].bytes, stdin) != info->inputs[i].bytes) {
            fprintf(stderr, "standard input ends inside input %s\n", info->inputs[i].name);
            return EXIT_INPUT;
        }
        inputs[i].data = data;
        inputs[i].bytes = info->inputs[i].bytes;
    }
    if (fgetc(stdin) != EOF) {
        fprintf(stderr, "standard input is longer than the inputs\n");
        return EXIT_INPUT;
    }
    for (uint32_t i = 0; i < info->output_count; i++) {
        outputs[i].data = allocate(info->outputs[i].bytes);
        outputs[i].bytes = info->outputs[i].bytes;
    }
    for (long i = 0; i < warmup + repeat; i++) {
        const uint64_t begin = now();
        status = MODEL(run)(context, inputs, info->input_count, outputs, info->output_count);
        if (status) return refused(context, status);
        if (i >= warmup) fprintf(stderr, "time_ns %llu\n", (unsigned long long)(now() - begin));
    }
    for (uint32_t i = 0; i < info->output_count; i++) {
        if (fwrite(outputs[i].data, 1, outputs[i].bytes, stdout) != outputs[i].bytes) return 1;
        free(outputs[i].data);
    }
    for (uint32_t i = 0; i < info->input_count; i++) free((void *)(uintptr_t)inputs[i].data);
    free(inputs);
    free(outputs);
    MODEL(destroy)(context);
    return fflush(stdout) ? 1 : 0;
}
