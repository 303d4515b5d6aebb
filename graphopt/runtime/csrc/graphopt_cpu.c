/* Asks the CPU and the system for the instruction set extensions a model was built with. */
#include "graphopt_runtime.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

#define OSXSAVE (1u << 27)

/* The register states the system saves on a task switch; 0 if it cannot be asked. */
static uint64_t saved_states(void) {
    uint32_t eax = 0;
    uint32_t ebx = 0;
    uint32_t ecx = 0;
    uint32_t edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & OSXSAVE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return ((uint64_t)edx << 32) | eax;
}

static int has(const graphopt_feature *feature) {
    uint32_t regs[4] = {0, 0, 0, 0};
    /* A subleaf above the highest answers zeros or rubbish: leaf 7 names its highest in eax. */
    if (feature->subleaf > 0) {
        if (!__get_cpuid_count(feature->leaf, 0, &regs[0], &regs[1], &regs[2], &regs[3])) return 0;
        if (regs[0] < feature->subleaf) return 0;
    }
    if (!__get_cpuid_count(feature->leaf, feature->subleaf, &regs[0], &regs[1], &regs[2],
                           &regs[3]))
        return 0;
    if ((regs[feature->reg & 3] & feature->mask) != feature->mask) return 0;
    return !feature->xcr0 || (saved_states() & feature->xcr0) == feature->xcr0;
}

#elif defined(__aarch64__)
#include <sys/auxv.h>

static int has(const graphopt_feature *feature) {
    return (getauxval(feature->leaf) & feature->mask) == feature->mask;
}

#else
#error "graphopt's runtime knows x86-64 and 64-bit Arm"
#endif

unsigned graphopt_cpu_missing(char *text, size_t size) {
    unsigned missing = 0;
    size_t used = 0;
    text[0] = '\0';
    for (uint32_t i = 0; i < graphopt_model.feature_count; i++) {
        const graphopt_feature *feature = &graphopt_model.features[i];
        if (has(feature)) continue;
        const char *comma = missing++ ? ", " : "";
        const size_t length = strlen(comma) + strlen(feature->name);
        if (used + length >= size) continue;
        strcpy(text + used, comma);
        strcat(text + used, feature->name);
        used += length;
    }
    return missing;
}
