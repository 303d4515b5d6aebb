/* ---------------------------------------------------------------------------------------------
 * The library's interface. Everything below is the same for every model but for the prefix.
 *
 *     graphopt_context *model;
 *     if (graphopt_create(&model, NULL) != GRAPHOPT_OK) puts(graphopt_last_error(NULL));
 *     graphopt_run(model, inputs, GRAPHOPT_INPUTS, outputs, GRAPHOPT_OUTPUTS);
 *     graphopt_destroy(model);
 *
 * Memory   `create` takes all memory there will ever be: the context, the worker threads and,
 *          unless the caller brings one, the arena. `run` allocates nothing.
 * Threads  Contexts are independent: any number of them may run at the same time, on any threads.
 *          One context runs one inference at a time; a second concurrent `run` on it returns
 *          GRAPHOPT_ERROR_BUSY and touches nothing. The result does not depend on the number of
 *          threads. A context is of no use in the child of a fork().
 * CPU      `create` refuses a CPU that lacks an instruction the code needs, and names it.
 * ------------------------------------------------------------------------------------------ */

/* What a call came to. The numbers are the same for every model and never change. */
typedef enum graphopt_status {
    GRAPHOPT_OK = 0,
    GRAPHOPT_ERROR_ARGUMENT = 1, /* NULL, misaligned or overlapping pointer, or a wrong count */
    GRAPHOPT_ERROR_SIZE = 2,     /* a buffer of another size than the model's, or too small an arena */
    GRAPHOPT_ERROR_MEMORY = 3,   /* no memory for the context or its arena */
    GRAPHOPT_ERROR_THREAD = 4,   /* the system gave no more threads */
    GRAPHOPT_ERROR_CPU = 5,      /* this CPU lacks an instruction that the code needs */
    GRAPHOPT_ERROR_BUSY = 6      /* another thread is in `run` on this context */
} graphopt_status;

/* All an inference needs that changes: the arena and the threads. Opaque. */
typedef struct graphopt_context graphopt_context;

/* How to make a context. Zero everywhere means the defaults, and so does NULL for the whole. */
typedef struct graphopt_options {
    unsigned threads;  /* threads that work, the caller's included: 1 starts none; 0: the default
                          of the build; at most GRAPHOPT_MAX_THREADS */
    void *arena;       /* memory to work in, aligned to GRAPHOPT_ARENA_ALIGNMENT, the context's
                          alone until it is destroyed; NULL: allocate it */
    size_t arena_size; /* bytes at `arena`, at least graphopt_arena_size(threads) */
} graphopt_options;

/* One input: the caller's memory, dense and row-major, aligned to its element type. */
typedef struct graphopt_input {
    const void *data;
    size_t bytes; /* exactly the size of the tensor; checked */
} graphopt_input;

/* One output: the caller's memory, which `run` fills; it may not overlap another tensor. */
typedef struct graphopt_output {
    void *data;
    size_t bytes; /* exactly the size of the tensor; checked */
} graphopt_output;

/* What a tensor looks like. */
typedef struct graphopt_tensor_info {
    const char *name;     /* its name in the model */
    const char *dtype;    /* numpy's name of the element type: "float32", "int64", "bool", ... */
    const int64_t *shape; /* `rank` dimensions, row-major */
    uint32_t rank;
    uint32_t item_bytes; /* bytes of one element */
    size_t bytes;        /* bytes of the whole tensor */
} graphopt_tensor_info;

/* What the library holds, for programs that work with any model. */
typedef struct graphopt_info {
    const char *name;       /* the model's name: the prefix of everything here */
    const char *version;    /* the graphopt that built it */
    const char *target;     /* the target it was built for */
    uint32_t abi;           /* version of this interface, now 1 */
    uint32_t threads;       /* default number of threads */
    uint32_t input_count;
    uint32_t output_count;
    const graphopt_tensor_info *inputs;
    const graphopt_tensor_info *outputs;
    size_t arena_bytes;     /* of a context's arena without the threads' scratch memory */
    size_t scratch_bytes;   /* of each thread's scratch memory */
    size_t weights_bytes;   /* of the model's constants, in read-only memory */
    uint32_t step_count;    /* kernel calls in one inference */
    const char *const *step_names;
} graphopt_info;

#define GRAPHOPT_MAX_THREADS 128
#define GRAPHOPT_ARENA_ALIGNMENT 64

/* The model's interface and needs. Never NULL, valid for ever, works on any CPU. */
const graphopt_info *graphopt_get_info(void);

/* Bytes of arena a context with so many threads needs (0: the default of the build). Returns 0 for
 * more than GRAPHOPT_MAX_THREADS; a model that needs no arena still asks for one cache line. */
size_t graphopt_arena_size(unsigned threads);

/* Makes a context in `*context`, with its threads and memory. `options` may be NULL.
 * On failure `*context` is NULL and graphopt_last_error(NULL) says why. */
graphopt_status graphopt_create(graphopt_context **context, const graphopt_options *options);

/* Runs the model once: reads every input, fills every output, returns when all is done.
 * `inputs` and `outputs` are in the model's order; the counts are those of the arrays, and are
 * checked. On failure no output was written and graphopt_last_error(context) says why. */
graphopt_status graphopt_run(graphopt_context *context, const graphopt_input *inputs,
                             size_t input_count, const graphopt_output *outputs,
                             size_t output_count);

/* From now on every run writes the nanoseconds of each step to `nanoseconds`, which holds
 * info->step_count numbers (`count`, checked) and must live until profiling is turned off with
 * NULL and 0. Costs two clock reads a step; costs nothing when off. */
graphopt_status graphopt_profile(graphopt_context *context, uint64_t *nanoseconds, size_t count);

/* Ends the threads and frees what `create` allocated (never the caller's arena). NULL is fine.
 * No `run` may be going on. */
void graphopt_destroy(graphopt_context *context);

/* What the last failed call on this context was about; "" if none failed. With NULL: what the last
 * failed `create` of the calling thread was about, or its last call that passed a NULL context.
 * The text lives until the next failure.
 * A call that returned GRAPHOPT_ERROR_BUSY leaves no text: the context is the other thread's. */
const char *graphopt_last_error(const graphopt_context *context);

/* One short constant phrase for a status code. */
const char *graphopt_status_text(graphopt_status status);
