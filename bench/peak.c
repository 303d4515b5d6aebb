/* Prints the multiply-add peak of one core in GFLOP/s (a multiply-add is two operations).
 *
 *     peak CORE
 *
 * Twelve independent chains of vector multiply-adds in registers: enough to fill two units whose
 * results take up to six cycles, and few enough for sixteen registers. The best of twenty stretches
 * of some milliseconds. Compile with -O2 -march=native. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { CHAINS = 12, LANES = BYTES / sizeof(float), TURNS = 1000000, STRETCHES = 20 };

typedef float vector __attribute__((vector_size(BYTES)));

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static vector chains(vector factor, vector term) {
    vector a = term, b = term + 1, c = term + 2, d = term + 3, e = term + 4, f = term + 5;
    vector g = term + 6, h = term + 7, i = term + 8, j = term + 9, k = term + 10, l = term + 11;
    for (int turn = 0; turn < TURNS; turn++) {
        a = a * factor + term, b = b * factor + term, c = c * factor + term;
        d = d * factor + term, e = e * factor + term, f = f * factor + term;
        g = g * factor + term, h = h * factor + term, i = i * factor + term;
        j = j * factor + term, k = k * factor + term, l = l * factor + term;
    }
    return a + b + c + d + e + f + g + h + i + j + k + l;
}

int main(int argc, char **argv) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(argc > 1 ? atoi(argv[1]) : 0, &cores);
    if (sched_setaffinity(0, sizeof cores, &cores)) return 1;

    /* Not known when compiling, and nothing overflows or becomes denormal. */
    volatile float half = 0.5f, one = 1.0f;
    const vector zero = {0};
    double best = 1e9;
    float sink = 0;
    for (int stretch = 0; stretch < STRETCHES; stretch++) {
        const double begin = now();
        const vector sum = chains(zero + half, zero + one);
        const double seconds = now() - begin;
        sink += sum[0];
        if (seconds < best) best = seconds;
    }
    printf("%.3f\n", 2.0 * CHAINS * LANES * TURNS / best / 1e9);
    return sink == 0;
}
