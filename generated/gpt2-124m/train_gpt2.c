/* train_gpt2.c: trains GPT-2 (12 layers, 12 heads, 768 channels, 50257 tokens) on a CPU, in float32.
 *
 * Written by llmgen from the configuration gpt2-124m (hash 72536e43):
 *
 *   family = "gpt2"
 *
 *   [model]
 *   num_layers = 12
 *   num_heads = 12
 *   channels = 768
 *   vocab_size = 50257
 *   max_seq_len = 1024
 *
 *   [program]
 *   batch_size = 4
 *   seq_len = 64
 *   precision = "fp32"
 *
 * It is yours, free of any condition. It needs a C compiler and the C library, nothing else.
 * Compile:  gcc -O3 -std=gnu11 -march=x86-64-v3 -fopenmp train_gpt2.c -lm -o train_gpt2
 * Options:  ./train_gpt2 --help
 *
 * Memory in bytes, for a micro-batch of 4 x 64 tokens:
 *       497,903,616  parameters
 *       497,903,616  gradients
 *       995,807,232  AdamW's moments
 *       151,977,984  activations that the backward needs
 *        53,087,232  arena for all that lives shorter (at least 53,087,232 are alive at once)
 *         1,050,240  scratch for each thread
 *     2,197,729,920  in all, with one thread
 *
 * Contents: sizes, tensors, basics, vectors, matrix products, layers (forward beside backward), the model, AdamW,
 * files, data, sampling, logging, arguments, main.
 */
#define _XOPEN_SOURCE 700 /* POSIX 2008, and realpath() */
#define _DEFAULT_SOURCE   /* madvise(), where there is one */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- what is asked of the compiler ------------------------------------------------------------------------------- */

#ifdef _OPENMP
#include <omp.h>
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas" /* without OpenMP its pragmas are skipped: one thread does it all */
#endif
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors never cross a real call: whatever takes one is inlined */
#define INLINE static inline __attribute__((always_inline))

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

enum {
    B = 4,                    /* sequences in a micro-batch */
    T = 64,                   /* tokens in a sequence */
    BT = 256,                 /* B * T */
    L = 12,                   /* layers */
    NH = 12,                  /* attention heads */
    HS = 64,                  /* channels of a head */
    C = 768,                  /* channels: NH * HS */
    V = 50257,                /* tokens in the vocabulary */
    VP = 50304,               /* V rounded up to a multiple of 128; the rows past V stay zero */
    MAXT = 1024,              /* longest sequence the position embeddings reach */
    EVAL_TOKENS = 1024,       /* tokens that evaluate takes at most */
    W = 8,                    /* floats in a vector register */
    MR = 6,                   /* rows of the register tile */
    NV = 2,                   /* vectors in a row of it */
    NR = 16,                  /* columns of it: NV * W */
    KC = 512,                 /* summed at a time: MR rows of the left operand take 12 KiB of L1 */
    NC = 192,                 /* columns packed at a time: KC x NC takes 384 KiB of L2 */
    MC = 252,                 /* rows of a block of out */
    KC_BOTH = 256,            /* the same as KC where both operands are packed */
    NC_BOTH = 768,            /* the same as NC there */
    A_PANEL = 1552,           /* floats from one packed panel of MR rows to the next */
    PACKED_A = 65184,         /* floats of the packed left operand; those of the right one follow */
    SHORT_PANEL = 8192,       /* floats of a panel that stays in L1 while the rows go by */
    PACKING = 32,             /* packing one value takes as long as so many multiply-adds */
    FEW_ROWS = 16,            /* up to so many rows, a product reads its weight where it lies */
    TEAM_PRODUCTS = 262144,   /* multiply-adds that are worth waking the other threads for */
    TEAM_VALUES = 8192,       /* the same for values that are computed one by one */
    BQ = 72,                  /* queries in a block of attention */
    BK = 64,                  /* keys in it */
    THREAD_SCRATCH = 262560,  /* floats of a thread: packed operands, or attention's */
    CHUNK = 256,              /* rows of logits that exist at a time */
};
static const float NORM_EPSILON = 1e-05f; /* added to the variance in a norm */

/* ---- tensors: one allocation for each kind of memory; all offsets are computed by llmgen ------------------------- */

/* One pointer for each tensor, to its first layer. Gradients and moments have the shapes of the parameters. */
typedef struct {
    float *wte;       /* (VP, C) */
    float *wpe;       /* (MAXT, C) */
    float *ln1w;      /* (L, C) */
    float *ln1b;      /* (L, C) */
    float *qkvw;      /* (L, 3*C, C) */
    float *qkvb;      /* (L, 3*C) */
    float *attprojw;  /* (L, C, C) */
    float *attprojb;  /* (L, C) */
    float *ln2w;      /* (L, C) */
    float *ln2b;      /* (L, C) */
    float *fcw;       /* (L, 4*C, C) */
    float *fcb;       /* (L, 4*C) */
    float *fcprojw;   /* (L, C, 4*C) */
    float *fcprojb;   /* (L, C) */
    float *lnfw;      /* (C) */
    float *lnfb;      /* (C) */
} Parameters;

static Parameters params, grads, moment1, moment2;
static float *params_memory, *grads_memory, *moment1_memory, *moment2_memory; /* (PARAMETER_VALUES) each */

/* What forward_backward computes on the way; a dimension L: kept for the backward, a slot for each layer. */
static struct {
    float *residual;       /* (L + 1, B, T, C) */
    float *ln1;            /* (L, B, T, C) */
    float *ln1_mean;       /* (L, B, T) */
    float *ln1_rstd;       /* (L, B, T) */
    float *qkv;            /* (L, B, T, 3*C) */
    float *attention;      /* (L, B, T, C) */
    float *attention_lse;  /* (L, B, NH, T) */
    float *residual2;      /* (L, B, T, C) */
    float *ln2;            /* (L, B, T, C) */
    float *ln2_mean;       /* (L, B, T) */
    float *ln2_rstd;       /* (L, B, T) */
    float *gelu;           /* (L, B, T, 4*C) */
    float *fc;             /* (L, B, T, 4*C) */
    float *lnf;            /* (B, T, C) */
    float *lnf_mean;       /* (B, T) */
    float *lnf_rstd;       /* (B, T) */
    float *losses;         /* (B, T) */
    float *dlnf;           /* (B, T, C) */
    float *logits;         /* (CHUNK, VP) */
    float *dresidual;      /* (B, T, C) */
    float *dfc;            /* (B, T, 4*C) */
    float *dln2;           /* (B, T, C) */
    float *dattention;     /* (B, T, C) */
    float *dqkv;           /* (B, T, 3*C) */
    float *dln1;           /* (B, T, C) */
} acts;

/* What evaluate computes, for b rows of t tokens. It lies where acts lies: the two never run at once. */
static struct {
    float *residual;       /* (b, t, C) */
    float *ln1;            /* (b, t, C) */
    float *ln1_mean;       /* (b, t) */
    float *ln1_rstd;       /* (b, t) */
    float *qkv;            /* (b, t, 3*C) */
    float *attention;      /* (b, t, C) */
    float *attention_lse;  /* (b, NH, t) */
    float *ln2;            /* (b, t, C) */
    float *ln2_mean;       /* (b, t) */
    float *ln2_rstd;       /* (b, t) */
    float *gelu;           /* (b, t, 4*C) */
    float *lnf;            /* (b, t, C) */
    float *lnf_mean;       /* (b, t) */
    float *lnf_rstd;       /* (b, t) */
    float *losses;         /* (b*t - first) */
    float *logits;         /* (CHUNK, VP) */
} eval;

/* The parameters in the order of the files. A file holds them back to back; in memory every layer of every tensor starts
 * at a multiple of 64 bytes, and what lies between stays zero. */
typedef struct {
    const char *name;
    size_t offset, stride;     /* of the first layer, and from one layer to the next, in floats */
    size_t count, valid;       /* floats of a layer; those that are initialised: vocabulary padding stays zero */
    int layers, decays;        /* layers; whether weight decay applies: to what is a matrix in each layer */
    float mean, std;           /* of the initial values: normal, or all the mean where the deviation is 0 */
} TensorRow;

static const TensorRow parameter_table[] = {
    { "wte", 0, 38633472, 38633472, 38597376, 1, 1, 0.0f, 0.02f },
    { "wpe", 38633472, 786432, 786432, 786432, 1, 1, 0.0f, 0.02f },
    { "ln1w", 39419904, 768, 768, 768, 12, 0, 1.0f, 0.0f },
    { "ln1b", 39429120, 768, 768, 768, 12, 0, 0.0f, 0.0f },
    { "qkvw", 39438336, 1769472, 1769472, 1769472, 12, 1, 0.0f, 0.02f },
    { "qkvb", 60672000, 2304, 2304, 2304, 12, 0, 0.0f, 0.0f },
    { "attprojw", 60699648, 589824, 589824, 589824, 12, 1, 0.0f, 0.0040824829f },
    { "attprojb", 67777536, 768, 768, 768, 12, 0, 0.0f, 0.0f },
    { "ln2w", 67786752, 768, 768, 768, 12, 0, 1.0f, 0.0f },
    { "ln2b", 67795968, 768, 768, 768, 12, 0, 0.0f, 0.0f },
    { "fcw", 67805184, 2359296, 2359296, 2359296, 12, 1, 0.0f, 0.02f },
    { "fcb", 96116736, 3072, 3072, 3072, 12, 0, 0.0f, 0.0f },
    { "fcprojw", 96153600, 2359296, 2359296, 2359296, 12, 1, 0.0f, 0.0040824829f },
    { "fcprojb", 124465152, 768, 768, 768, 12, 0, 0.0f, 0.0f },
    { "lnfw", 124474368, 768, 768, 768, 1, 0, 1.0f, 0.0f },
    { "lnfb", 124475136, 768, 768, 768, 1, 0, 0.0f, 0.0f },
};
enum { NUM_TENSORS = sizeof parameter_table / sizeof parameter_table[0] };
static const size_t PARAMETER_VALUES = 124475904;

static int num_threads;
static float *thread_scratch; /* (num_threads, THREAD_SCRATCH) */

/* ---- basics: errors, output, memory, time, random numbers, signals ----------------------------------------------- */

/* The file being written, if any, and one that is worthless without it: removed when the program fails. */
static char *volatile temporary_path, *volatile companion_path;

static void remove_unfinished(void) {
    if (temporary_path) unlink(temporary_path);
    if (companion_path) unlink(companion_path);
}

/* Ends the program with one line on stderr: what is wrong, where, what to do. */
__attribute__((noreturn, format(printf, 2, 3))) static void die(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "train_gpt2: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    remove_unfinished();
    exit(status);
}

/* Prints on stdout at once, so that a log in a pipe is never behind; a full disk there is an error like any other. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int written = vprintf(format, arguments);
    va_end(arguments);
    if (written < 0 || fflush(stdout) != 0) die(1, "stdout: cannot be written: %s", strerror(errno));
}

/* Memory for file names, tables and batches of tokens. */
static void *allocate(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) die(1, "out of memory: %zu bytes were refused", bytes);
    return memory;
}

static size_t model_bytes; /* allocated for the model, so that the program can say what it uses */

/* Memory for the model: zeroed, on a cache line, in large pages where the system has them. It is touched here, so that a
 * machine too small is noticed now. */
static void *allocate_tensors(size_t bytes) {
    const size_t page = (size_t)2 << 20, alignment = bytes < page ? 64 : page;
    void *memory = NULL;
    if (posix_memalign(&memory, alignment, bytes ? bytes : 64) != 0) {
        die(1, "out of memory: %zu bytes were refused after %zu; build with a smaller --batch-size or --seq-len",
            bytes, model_bytes);
    }
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes / page * page, MADV_HUGEPAGE);
#endif
    memset(memory, 0, bytes);
    model_bytes += bytes;
    return memory;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Looks at the bits: under -Ofast the compiler takes isfinite(x) for true. */
static int is_finite(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000u) != 0x7f800000u;
}

/* Random numbers by counter (the finaliser of SplitMix64): number `counter` of stream `stream` is computed from these
 * two alone. So any thread may compute any of them, and there is no state to keep. */
static uint64_t mix_bits(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t counter) {
    return mix_bits(mix_bits(mix_bits(seed) ^ stream) ^ counter);
}

enum { INIT_STREAM, SAMPLE_STREAM, SHUFFLE_STREAM };  /* sampling never disturbs training, nor the other way about */

/* The first Ctrl-C or SIGTERM lets the step finish and the model be saved; the second ends the program at once. */
static volatile sig_atomic_t stop_signal;

static void handle_stop(int signal_number) {
    if (stop_signal) {
        remove_unfinished();
        _exit(128 + signal_number);
    }
    stop_signal = signal_number;
}

static void handle_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handle_stop;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);  /* these two are then errors of write(), which say what happened */
    signal(SIGXFSZ, SIG_IGN);
}

/* ---- settings: what the flags say -------------------------------------------------------------------------------- */

typedef struct {
    const char *load, *save, *save_dtype, *train_data, *val_data, *eval_data, *tokenizer, *log_dir, *lr_schedule,
        *prompt_tokens, *debug_state;
    int steps, total_batch_size, batch_size, seq_len, warmup_steps, val_every, val_steps, sample_every, sample_length,
        seed, checkpoint_every, checkpoint_keep, checkpoint_major;
    int shuffle, overfit_batch, resume;
    double learning_rate, final_lr_fraction, weight_decay, beta1, beta2, epsilon, grad_clip, temperature, skip_loss_z,
        skip_norm_z;
} Settings;

/* ---- files ------------------------------------------------------------------------------------------------------- */

/* A file is written as .NAME.tmp beside it, synced, and renamed: at no moment is there half a file under its name. What
 * exists and is no regular file (a device, a pipe) is written in place, as renaming would replace it. */
static const char *output_path;  /* the file being written, for messages */
static char *output_target;      /* the same, links resolved */

static char *hidden_name(const char *path) {
    const char *slash = strrchr(path, '/');
    const int folder = slash ? (int)(slash - path) + 1 : 0;
    const size_t size = strlen(path) + sizeof "..tmp";
    char *name = (char *)allocate(size);
    snprintf(name, size, "%.*s.%s.tmp", folder, path, path + folder);
    return name;
}

__attribute__((noreturn)) static void die_writing(const char *path) {
    const char *advice = "";
    if (errno == ENOENT) advice = "; make its folder first";
    if (errno == ENOTDIR) advice = "; a file stands where a folder is needed";
    if (errno == EISDIR) advice = "; name a file, not a folder";
    if (errno == ENOSPC || errno == EFBIG) advice = "; free some space, raise the limit, or write elsewhere";
    die(1, "%s: cannot be written: %s%s", path, strerror(errno), advice);
}

static int is_device(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && !S_ISREG(status.st_mode);
}

static FILE *open_output(const char *path) {
    char *resolved = realpath(path, NULL);
    output_path = path;
    output_target = resolved ? resolved : strdup(path);
    if (!output_target) die(1, "out of memory");
    const int in_place = is_device(path);
    if (!in_place) temporary_path = hidden_name(output_target);
    FILE *file = fopen(in_place ? path : temporary_path, "wb");
    if (!file) die_writing(path);
    return file;
}

static void write_output(FILE *file, const void *values, size_t bytes) {
    if (fwrite(values, 1, bytes, file) != bytes) die_writing(output_path);
}

static void forget_output(void) {
    char *name = temporary_path;
    temporary_path = NULL;  /* first: a second Ctrl-C may come at any moment */
    free(name);
    free(output_target);
}

/* Only then is what was renamed sure to outlast a power cut. Some file systems cannot, and need not. */
static void sync_folder(char *path) {
    const int folder = open(dirname(path), O_RDONLY);
    if (folder < 0) return;
    fsync(folder);
    close(folder);
}

static void close_output(FILE *file) {
    if (fflush(file) != 0) die_writing(output_path);
    if (temporary_path && fsync(fileno(file)) != 0) die_writing(output_path);
    if (fclose(file) != 0) die_writing(output_path);
    if (temporary_path && rename(temporary_path, output_target) != 0) die_writing(output_path);
    if (temporary_path) sync_folder(output_target);
    forget_output();
}

/* Fails now if open_output() would fail after hours of training. */
static void prove_writable(const char *path) {
    struct stat status;
    if (stat(path, &status) == 0 && S_ISDIR(status.st_mode)) {
        errno = EISDIR;
        die_writing(path);
    }
    if (is_device(path)) {
        if (access(path, W_OK) != 0) die_writing(path);
        return;
    }
    fclose(open_output(path));
    unlink(temporary_path);
    forget_output();
}

/* Makes a folder and its parents. */
static void make_folder(const char *path) {
    struct stat status;
    char *part = strdup(path);
    if (!part) die(1, "out of memory");
    for (size_t i = 1, length = strlen(path); i <= length; i++) {
        if (part[i] != '/' && part[i] != '\0') continue;
        part[i] = '\0';
        if (mkdir(part, 0777) != 0 && errno != EEXIST) die(1, "%s: cannot be made: %s", part, strerror(errno));
        part[i] = path[i];
    }
    free(part);
    if (stat(path, &status) != 0) die(1, "%s: cannot be made: %s", path, strerror(errno));
    if (!S_ISDIR(status.st_mode)) die(1, "%s: is a file, not a folder", path);
}

static void read_input(FILE *file, void *values, size_t bytes, const char *path) {
    if (fread(values, 1, bytes, file) == bytes) return;
    if (ferror(file)) die(1, "%s: cannot be read: %s", path, strerror(errno));
    die(1, "%s: the file ends too early; it is damaged or half copied", path);
}

/* Every file begins with 256 numbers: a magic one, a version, sizes, zeros. */
enum { HEADER_INTS = 256, HEADER_BYTES = 1024 };

/* Opens a file, reads its header and returns it with what stands behind: so many bytes. */
static FILE *open_input(const char *path, int32_t header[HEADER_INTS], int64_t *bytes) {
    struct stat status;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &status) != 0) die(1, "%s: cannot be read: %s", path, strerror(errno));
    if (S_ISDIR(status.st_mode)) die(1, "%s: is a folder, not a file", path);
    if (status.st_size < HEADER_BYTES) die(1, "%s: too short for its header; it is damaged or half copied", path);
    read_input(file, header, HEADER_BYTES, path);
    *bytes = (int64_t)status.st_size - HEADER_BYTES;
    return file;
}

static void check_bytes(int64_t found, int64_t expected, const char *path) {
    if (found == expected) return;
    die(1, "%s: %lld bytes, but its header asks for %lld; it is damaged or half copied", path,
        (long long)found + HEADER_BYTES, (long long)expected + HEADER_BYTES);
}

static FILE *logits_file;  /* set while a debug state is written: the classifier hands its logits to write_logits() */

static void write_logits(const float *logits, int rows) {  /* (rows, VP), of which V are written */
    for (int i = 0; i < rows; i++) write_output(logits_file, logits + (size_t)i * VP, V * sizeof(float));
}

/* ---- vectors --------------------------------------------------------------------------------------------------------
 * W floats in one register, by the vector extensions of gcc (9 or later) and clang: arithmetic on a vec works on every
 * element, and no header of any processor is needed. Comparisons give a veci of masks: -1 is true, 0 is false. */

typedef float vec __attribute__((vector_size(4 * W)));
typedef int veci __attribute__((vector_size(4 * W)));
typedef float vec_any __attribute__((vector_size(4 * W), aligned(4), may_alias)); /* at the address of any float */
typedef float quad __attribute__((vector_size(16))); /* four floats, whatever W is */
typedef float quad_any __attribute__((vector_size(16), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_any *)p; }
INLINE void store(float *p, vec v) { *(vec_any *)p = v; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec blend(veci mask, vec a, vec b) { return (vec)((mask & (veci)a) | (~mask & (veci)b)); }

/* At the end of a row there may be n < W elements: no more are read, and the others count as 0. */
INLINE vec load_upto(const float *p, int n) {
    if (n >= W) return load(p);
    float part[W] = {0};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return load(part);
}

INLINE void store_upto(float *p, vec v, int n) {
    if (n >= W) {
        store(p, v);
        return;
    }
    float part[W];
    store(part, v);
    for (int i = 0; i < n; i++) p[i] = part[i];
}

INLINE vec keep_upto(vec v, int n) {
    float part[W];
    store(part, v);
    return load_upto(part, n);
}

/* Across the elements of one register: once in a row, never in an inner loop. */
INLINE float reduce_add(vec v) {
    float part[W];
    store(part, v);
    quad sum = *(const quad_any *)part;
    for (int i = 4; i < W; i += 4) sum += *(const quad_any *)(part + i);
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

INLINE float reduce_max(vec v) {
    float part[W], most[4];
    store(part, v);
    for (int i = 0; i < 4; i++) {
        most[i] = part[i];
        for (int j = i + 4; j < W; j += 4) most[i] = most[i] > part[j] ? most[i] : part[j];
    }
    most[0] = most[0] > most[1] ? most[0] : most[1];
    most[2] = most[2] > most[3] ? most[2] : most[3];
    return most[0] > most[2] ? most[0] : most[2];
}

/* exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where exp(r) = 1 + r + r^2 * polynomial(r).
 * Overflow gives inf, underflow passes through the subnormals to 0, NaN stays NaN. Within 1.1 ulp. What is surely 0, as a
 * masked score, does not come from an underflowing product: that takes the processor more than a hundred cycles. */
INLINE vec vexp(vec x) {
    x = blend(x > 89.0f, splat(89.0f), x);
    const veci zero = x < -104.0f;
    x = blend(zero, (vec){0}, x);
    veci n = __builtin_convertvector(x * 0x1.715476p0f + 192.5f, veci) - 192; /* positive, so truncating rounds down */
    vec nf = __builtin_convertvector(n, vec);
    vec r = x - nf * 0x1.62e4p-1f; /* ln 2 in two parts: the product with the first is exact */
    r = r - nf * 0x1.7f7d1cp-20f;
    vec q = r * 0x1.6a2256p-10f + 0x1.123b04p-7f;
    q = q * r + 0x1.5558f8p-5f;
    q = q * r + 0x1.55549p-3f;
    q = q * r + 0x1.fffffcp-2f;
    vec p = r * r * q + r + 1.0f;
    veci half = n >> 1; /* 2^n in two factors, since n may lie outside the range of one exponent field */
    return blend(zero, (vec){0}, p * (vec)((half + 127) << 23) * (vec)((n - half + 127) << 23));
}

/* log(x) = e * ln 2 + log(m) with x = 2^e * m and sqrt(1/2) <= m < sqrt(2), for normal x > 0. */
INLINE vec vlog(vec x) {
    veci bits = (veci)x - 0x3f3504f3; /* sqrt(1/2): what is above it counts from the next power of two */
    vec e = __builtin_convertvector(bits >> 23, vec);
    vec f = (vec)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    vec q = f * 0x1.146be4p-4f - 0x1.de5eaep-4f;
    q = q * f + 0x1.e6fa56p-4f;
    q = q * f - 0x1.fc1d68p-4f;
    q = q * f + 0x1.23367cp-3f;
    q = q * f - 0x1.555c64p-3f;
    q = q * f + 0x1.99a4c0p-3f;
    q = q * f - 0x1.000006p-2f;
    q = q * f + 0x1.555548p-2f;
    vec square = f * f;
    vec small = square * f * q + e * 0x1.7f7d1cp-20f - square * 0.5f;
    return e * 0x1.62e4p-1f + (f + small);
}

/* sqrt(x) for x >= 0 (1e-18 below 1e-36): 1 / sqrt(x) guessed by halving the exponent, three Newton steps, and a last one
 * for the root itself. (The compiler has no vector sqrtf unless it is told that nobody reads errno.) */
INLINE vec vsqrt(vec x) {
    x = blend(x < 1e-36f, splat(1e-36f), x);
    vec y = (vec)(0x5f375a86 - ((veci)x >> 1));
    for (int step = 0; step < 3; step++) y = y * (1.5f - 0.5f * x * y * y);
    vec root = x * y;
    return root + 0.5f * y * (x - root * root);
}

/* ---- GELU: x/2 * (1 + tanh(u)) with u = sqrt(2/pi) * (x + 0.044715 x^3), which equals x / (1 + exp(-2u)) --------- */

/* exp(-2u), kept finite. */
INLINE vec gelu_exp(vec x) {
    const vec minus_2u = x * (-1.5957691216f - 0.0713548162726f * x * x);
    return vexp(blend(minus_2u > 80.0f, splat(80.0f), minus_2u));
}

INLINE vec vgelu(vec x) { return x / (1.0f + gelu_exp(x)); }

static void gelu_row(float *out, const float *inp, int n) {
    for (int i = 0; i < n; i += W) store_upto(out + i, vgelu(load_upto(inp + i, n - i)), n - i);
}

/* With s = 1 / (1 + exp(-2u)):  gelu'(x) = s + x s (1 - s) 2u' */
INLINE vec vgelu_grad(vec x) {
    const vec s = 1.0f / (1.0f + gelu_exp(x));
    return s + x * s * (1.0f - s) * (1.5957691216f + 0.2140644488178f * x * x);
}

static void gelu_grad_row(float *out, const float *inp, int n) { /* out *= gelu'(inp) */
    for (int i = 0; i < n; i += W)
        store_upto(out + i, load_upto(out + i, n - i) * vgelu_grad(load_upto(inp + i, n - i)), n - i);
}

/* ---- matrix products ------------------------------------------------------------------------------------------------
 *
 *   forward           out (n, oc)      = inp (n, c) . weight (oc, c)^T     + bias, + addend, then gelu
 *   input gradient    dinp (n, c)      = dout (n, oc) . weight (oc, c)
 *   weight gradient   dweight (oc, c)  = dout (n, oc)^T . inp (n, c)
 *
 * One kernel serves all three. Each operand is a stack of lanes (rows of the left matrix, columns of the right one)
 * indexed by the summation index k; the three differ only in which of the two indices is contiguous in memory. The right
 * operand is packed: a strip of it is copied into panels of NR lanes with k running slowest, so that the innermost loop
 * reads it front to back. The left one is read where it lies, a row for each line of the tile, unless its lanes are
 * contiguous: then it is packed as well, in panels of MR. No whole matrix is ever transposed.
 *
 *   level      holds                                         constants
 *   registers  a tile of out: MR x NR sums                   MR, NR = NV * W
 *   L1         MR rows of the left operand: MR x KC          KC
 *   L2         a strip of the right operand: KC x NC         NC
 *   L3         a block of out and of the left: MC rows       MC
 *
 * Tiles follow one another along the rows of out, so that out is written front to back: where it is large (the gradient of
 * the token embedding) that counts for more than anything else.
 * Only where a panel is short enough to stay in L1 do they follow one another down its columns.
 *
 * Each thread computes its own rectangle of out from what it packs itself: there is nothing to wait for but the end. Each
 * element is summed by one thread in one order of k, so results do not depend on the number of threads. */

typedef struct {
    const float *data;
    size_t lane, step; /* element (lane, k) is data[lane * .lane + k * .step]; one of the two is 1 */
} Operand;

INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int parts_of(int total, int most) { return (total + most - 1) / most; }

/* Where part p begins when 0..total is cut in nearly equal parts, at multiples of step only. */
static int cut(int total, int step, int parts, int p) {
    const size_t steps = (size_t)parts_of(total, step);
    return least(total, (int)(steps * (size_t)p / (size_t)parts) * step);
}

/* The sums of one tile:  out (rows, nv * W) = a . panel (+ addend) (+ bias), over k steps.  rows <= MR. out and addend,
 * which may be the same, have rows of ld floats. A tile of fewer than MR rows computes its last row several times. */
INLINE void sum_tile(float *out, size_t ld, int rows, const int nv, Operand a, const float *restrict panel, int k,
                     const float *addend, const float *bias) {
    vec sum[MR][NV] = {0};
    const float *row[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        row[i] = a.data + (size_t)least(i, rows - 1) * a.lane;
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) __builtin_prefetch(out + (size_t)least(i, rows - 1) * ld + j * W, 1);
    }
    for (size_t at = 0, end = (size_t)k * a.step; at < end; at += a.step) {
        vec b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) b[j] = load(panel + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) sum[i][j] += row[i][at] * b[j];
        panel += NR;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        if (i >= rows) break;
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) {
            vec v = sum[i][j];
            if (bias) v += load(bias + j * W);
            if (addend) v += load(addend + (size_t)i * ld + j * W);
            store(out + (size_t)i * ld + j * W, v);
        }
    }
}

/* Neither inlined nor unrolled over k: either way gcc spends registers on addresses, folds the loads of the panel into
 * the multiplications and so reads each of them MR times. */
static __attribute__((noinline)) void tile(float *out, size_t ld, int rows, Operand a, const float *panel, int k,
                                           const float *addend, const float *bias) {
    sum_tile(out, ld, rows, NV, a, panel, k, addend, bias);
}

/* The first one or two vectors of its columns alone, as narrow matrices need them. */
static __attribute__((noinline)) void narrow_tile(float *out, size_t ld, int rows, int nv, Operand a, const float *panel, int k,
                                                  const float *addend, const float *bias) {
    if (NV > 2 && nv == 2)
        sum_tile(out, ld, rows, 2, a, panel, k, addend, bias);
    else
        sum_tile(out, ld, rows, 1, a, panel, k, addend, bias);
}

/* A tile that hangs over the right edge is computed aside, and its first cols columns are copied. */
static void tile_part(float *out, size_t ld, int rows, int cols, Operand a, const float *panel, int k, const float *addend,
                      const float *bias) {
    float whole[MR * NR] = {0}, whole_bias[NR] = {0};
    const size_t bytes = (size_t)cols * sizeof(float);
    const int nv = parts_of(cols, W);
    if (bias) memcpy(whole_bias, bias, bytes);
    for (int i = 0; addend && i < rows; i++) memcpy(whole + i * NR, addend + (size_t)i * ld, bytes);
    if (nv < NV && nv <= 2)
        narrow_tile(whole, NR, rows, nv, a, panel, k, addend ? whole : NULL, whole_bias);
    else
        tile(whole, NR, rows, a, panel, k, addend ? whole : NULL, whole_bias);
    for (int i = 0; i < rows; i++) memcpy(out + (size_t)i * ld, whole + i * NR, bytes);
}

/* The first cols <= NR columns of a tile. */
INLINE void any_tile(float *out, size_t ld, int rows, int cols, Operand a, const float *panel, int k, const float *addend,
                     const float *bias) {
    const int nv = parts_of(cols, W);
    if (cols == NR)
        tile(out, ld, rows, a, panel, k, addend, bias);
    else if (nv < NV && nv <= 2 && cols % W == 0)
        narrow_tile(out, ld, rows, nv, a, panel, k, addend, bias);
    else
        tile_part(out, ld, rows, cols, a, panel, k, addend, bias);
}

/* ---- packing ----------------------------------------------------------------------------------------------------- */

/* Elements of a (0 to 3) and b (4 to 7). Written as {a[0], b[0], ...}, gcc would load them one by one. */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int quad_index __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (quad_index){__VA_ARGS__})
#endif

/* panel[k * NR + lane] = inp[lane * ld + k]: blocks of 4 x 4 are transposed in registers. A run of k at a time, so that the
 * lines of the panel stay in L1 until all their lanes are there. */
static void pack_transposed(float *restrict panel, const float *restrict inp, size_t ld, int lanes, int k) {
    enum { RUN = 32 };
    if (lanes < NR) memset(panel, 0, (size_t)k * NR * sizeof(float));
    for (int begin = 0; begin < k; begin += RUN) {
        const int end = least(begin + RUN, k);
        for (int lane = 0; lane < lanes; lane += 4) {
            const float *p = inp + (size_t)lane * ld;
            float *out = panel + begin * NR + lane;
            int at = begin;
            if (lane + 4 <= lanes)
                for (; at + 4 <= end; at += 4, out += 4 * NR) {
                    const quad a = *(const quad_any *)(p + at), b = *(const quad_any *)(p + ld + at);
                    const quad c = *(const quad_any *)(p + 2 * ld + at), d = *(const quad_any *)(p + 3 * ld + at);
                    const quad ab0 = SHUFFLE(a, b, 0, 4, 1, 5), ab2 = SHUFFLE(a, b, 2, 6, 3, 7);
                    const quad cd0 = SHUFFLE(c, d, 0, 4, 1, 5), cd2 = SHUFFLE(c, d, 2, 6, 3, 7);
                    *(quad_any *)out = SHUFFLE(ab0, cd0, 0, 1, 4, 5);
                    *(quad_any *)(out + NR) = SHUFFLE(ab0, cd0, 2, 3, 6, 7);
                    *(quad_any *)(out + 2 * NR) = SHUFFLE(ab2, cd2, 0, 1, 4, 5);
                    *(quad_any *)(out + 3 * NR) = SHUFFLE(ab2, cd2, 2, 3, 6, 7);
                }
            for (; at < end; at++, out += NR)
                for (int i = 0; i < least(4, lanes - lane); i++) out[i] = p[(size_t)i * ld + (size_t)at];
        }
    }
}

/* Copies one row of lanes into panels of the given width, a constant after inlining. Vector by vector: gcc turns a small
 * memcpy into a string instruction, several times slower. Of a width like 6, whole quads are written: what is beyond it
 * is overwritten by the next row, or lies in the gap between panels. */
INLINE void pack_row(float *panel, size_t stride, const float *inp, int lanes, const int width) {
    for (; lanes >= (width + 3) / 4 * 4; lanes -= width, inp += width, panel += stride) {
        int i = 0;
#pragma GCC unroll 4
        for (; i + W <= width; i += W) store(panel + i, load(inp + i));
#pragma GCC unroll 4
        for (; i < width; i += 4) *(quad_any *)(panel + i) = *(const quad_any *)(inp + i);
    }
    for (; lanes > 0; lanes -= width, inp += width, panel += stride)
        for (int i = 0; i < width; i++) panel[i] = i < lanes ? inp[i] : 0.0f;
}

/* Fills the panels of the right operand, from the one that begins at lane first: panels[lane / NR][k][lane % NR]. A panel
 * takes stride floats: a bit more than it holds, since panels a power of two apart would share sets of the cache. */
static void pack_right(float *panels, size_t stride, Operand b, int lanes, int k) {
    if (b.step == 1)
        for (int lane = 0; lane < lanes; lane += NR, panels += stride)
            pack_transposed(panels, b.data + (size_t)lane * b.lane, b.lane, least(NR, lanes - lane), k);
    else /* across all the panels at once: one panel alone would read 64 bytes from each page */
        for (int at = 0; at < k; at++) pack_row(panels + at * NR, stride, b.data + (size_t)at * b.step, lanes, NR);
}

typedef struct { /* what is done to out while it is at hand; NULL is none */
    const float *bias;   /* (n)     added to every row */
    const float *addend; /* (m, n)  added to every element; may be out */
    float *gelu;         /* (m, n)  receives gelu(out) */
    const float *pre;    /* (m, n)  out becomes out * gelu'(pre) */
} Epilogue;

/* How out (m, n) is cut for the threads: in a grid of rectangles such that the largest is the least work. For each k that
 * is one multiply-add for each element, and the packing of a value for each row and column. */
static void cut_for_threads(int *parts_m, int *parts_n, int m, int n) {
    double least_work = INFINITY;
    for (int across = 1; across <= num_threads; across++) {
        if (num_threads % across) continue;
        const double rows = MR * parts_of(parts_of(m, MR), num_threads / across);
        const double columns = NR * parts_of(parts_of(n, NR), across);
        const double work = rows * columns + PACKING * (rows + columns);
        if (work < least_work) {
            least_work = work;
            *parts_m = num_threads / across;
            *parts_n = across;
        }
    }
}

/* out (m, n) = a . b and then the epilogue: m lanes of a, n of b, k terms in each sum. */
static void matmul(float *out, Operand a, Operand b, Epilogue then, int m, int n, int k) {
    const size_t ld = (size_t)n;
    int parts_m = 1, parts_n = 1;
    if ((double)m * n * k > TEAM_PRODUCTS) cut_for_threads(&parts_m, &parts_n, m, n);
#pragma omp parallel for schedule(static, 1) if (parts_m * parts_n > 1)
    for (int part = 0; part < parts_m * parts_n; part++) {
        float *packed_a = thread_scratch + (size_t)thread_number() * THREAD_SCRATCH, *packed_b = packed_a + PACKED_A;
        const int top = cut(m, MR, parts_m, part % parts_m), bottom = cut(m, MR, parts_m, part % parts_m + 1);
        const int first = cut(n, NR, parts_n, part / parts_m), last = cut(n, NR, parts_n, part / parts_m + 1);
        const int depths = parts_of(k, a.step == 1 ? KC : KC_BOTH), deepest = parts_of(parts_of(k, 8), depths) * 8;
        const size_t panel_b = (size_t)deepest * NR + 16;
        const int strips = parts_of(last - first, a.step == 1 ? NC : NC_BOTH), blocks = parts_of(bottom - top, MC);
        for (int strip = 0; strip < strips; strip++) {
            const int left = first + cut(last - first, NR, strips, strip);
            const int right = first + cut(last - first, NR, strips, strip + 1);
            for (int depth = 0; depth < depths; depth++) {
                const int k0 = cut(k, 8, depths, depth), kc = cut(k, 8, depths, depth + 1) - k0;
                const Operand lanes = {b.data + (size_t)left * b.lane + (size_t)k0 * b.step, b.lane, b.step};
                pack_right(packed_b, panel_b, lanes, right - left, kc);
                for (int block = 0; block < blocks; block++) {
                    const int begin = top + cut(bottom - top, MR, blocks, block);
                    const int end = top + cut(bottom - top, MR, blocks, block + 1);
                    Operand rows = {a.data + (size_t)begin * a.lane + (size_t)k0 * a.step, a.lane, a.step};
                    size_t panel = MR * a.lane;
                    if (a.step != 1) {
                        for (int at = 0; at < kc; at++)
                            pack_row(packed_a + at * MR, A_PANEL, rows.data + (size_t)at * a.step, end - begin, MR);
                        rows = (Operand){packed_a, 1, MR};
                        panel = A_PANEL;
                    }
                    const int down = parts_of(end - begin, MR), across = parts_of(right - left, NR);
                    for (int t = 0; t < down * across; t++) {
                        const int row = kc * NR <= SHORT_PANEL ? t % down : t / across;
                        const int column = kc * NR <= SHORT_PANEL ? t / down : t % across;
                        const int i = begin + row * MR, j = left + column * NR;
                        const size_t at = (size_t)i * ld + (size_t)j;
                        const Operand these = {rows.data + (size_t)row * panel, rows.lane, rows.step};
                        const float *addend = depth > 0 ? out + at : then.addend ? then.addend + at : NULL;
                        any_tile(out + at, ld, least(MR, end - i), least(NR, right - j), these,
                                 packed_b + (size_t)column * panel_b, kc, addend,
                                 then.bias && depth == 0 ? then.bias + j : NULL);
                    }
                    for (int i = begin; then.gelu && depth == depths - 1 && i < end; i++)
                        gelu_row(then.gelu + (size_t)i * ld + left, out + (size_t)i * ld + left, right - left);
                    for (int i = begin; then.pre && depth == depths - 1 && i < end; i++)
                        gelu_grad_row(out + (size_t)i * ld + left, then.pre + (size_t)i * ld + left, right - left);
                }
            }
        }
    }
}

/* ---- token embedding: out[i] = wte[tokens[i]] -------------------------------------------------------------------- */

static void token_embedding_forward(float *out,                           /* (n, c) */
                                    const int *tokens, const float *wte, /* (n), (V, c) */
                                    int n, int c) {
#pragma omp parallel for if ((size_t)n * (size_t)c > TEAM_VALUES)
    for (int i = 0; i < n; i++)
        memcpy(out + (size_t)i * (size_t)c, wte + (size_t)tokens[i] * (size_t)c, (size_t)c * sizeof(float));
}

/* dwte[tokens[i]] += dout[i]. A token may occur many times: each thread takes some of the channels, of all tokens. */
static void token_embedding_backward(float *dwte,                           /* (rows, c) */
                                     const float *dout, const int *tokens, /* (n, c), (n) */
                                     int rows, int n, int c, int accumulate) {
    if (!accumulate) {
#pragma omp parallel for if ((size_t)rows * (size_t)c > TEAM_VALUES)
        for (int row = 0; row < rows; row++) memset(dwte + (size_t)row * (size_t)c, 0, (size_t)c * sizeof(float));
    }
#pragma omp parallel for if ((size_t)n * (size_t)c > TEAM_VALUES)
    for (int part = 0; part < num_threads; part++) {
        const int begin = cut(c, W, num_threads, part), end = cut(c, W, num_threads, part + 1);
        for (int i = 0; i < n; i++) {
            float *d = dwte + (size_t)tokens[i] * (size_t)c;
            const float *g = dout + (size_t)i * (size_t)c;
            for (int j = begin; j < end; j++) d[j] += g[j];
        }
    }
}

/* ---- position embedding: out[b][t] = inp[b][t] + wpe[t] ---------------------------------------------------------- */

static void position_embedding_forward(float *out,                          /* (b, t, c); may be inp */
                                       const float *inp, const float *wpe, /* (b, t, c), (MAXT, c) */
                                       int b, int t, int c) {
#pragma omp parallel for if ((size_t)b * (size_t)t * (size_t)c > TEAM_VALUES)
    for (int row = 0; row < b * t; row++) {
        float *o = out + (size_t)row * (size_t)c;
        const float *x = inp + (size_t)row * (size_t)c, *p = wpe + (size_t)(row % t) * (size_t)c;
        for (int i = 0; i < c; i += W) store_upto(o + i, load_upto(x + i, c - i) + load_upto(p + i, c - i), c - i);
    }
}

/* dwpe[t] += the sum of dout[b][t] over b; positions that no token has get 0. */
static void position_embedding_backward(float *dwpe,       /* (rows, c) */
                                        const float *dout, /* (b, t, c) */
                                        int rows, int b, int t, int c, int accumulate) {
#pragma omp parallel for if ((size_t)b * (size_t)t * (size_t)c > TEAM_VALUES)
    for (int row = 0; row < rows; row++) {
        float *d = dwpe + (size_t)row * (size_t)c;
        for (int i = 0; i < c; i += W) {
            vec sum = accumulate ? load_upto(d + i, c - i) : (vec){0};
            for (int s = 0; s < b && row < t; s++)
                sum += load_upto(dout + ((size_t)s * (size_t)t + (size_t)row) * (size_t)c + i, c - i);
            store_upto(d + i, sum, c - i);
        }
    }
}

/* ---- layer norm: out = xhat * weight + bias with xhat = (inp - mean) * rstd, over each row of c channels --------- */

static void layernorm_forward(float *out, float *mean, float *rstd,                              /* (n, c), (n), (n) */
                              const float *inp, const float *weight, const float *bias, /* (n, c), (c), (c) */
                              int n, int c) {
#pragma omp parallel for if ((size_t)n * (size_t)c > TEAM_VALUES)
    for (int row = 0; row < n; row++) {
        const float *x = inp + (size_t)row * (size_t)c;
        float *y = out + (size_t)row * (size_t)c;
        vec sum = {0}, squares = {0};
        for (int i = 0; i < c; i += W) sum += load_upto(x + i, c - i);
        const float m = reduce_add(sum) / (float)c;
        for (int i = 0; i < c; i += W) {
            const vec centered = keep_upto(load_upto(x + i, c - i) - m, c - i);
            squares += centered * centered;
        }
        const float s = 1.0f / sqrtf(reduce_add(squares) / (float)c + NORM_EPSILON);
        for (int i = 0; i < c; i += W) {
            const vec xhat = (load_upto(x + i, c - i) - m) * s;
            store_upto(y + i, xhat * load_upto(weight + i, c - i) + load_upto(bias + i, c - i), c - i);
        }
        mean[row] = m;
        rstd[row] = s;
    }
}

/* With g = dout * weight:  dinp = addend + rstd * (g - mean(g) - xhat * mean(g * xhat));
 * dweight += dout * xhat and dbias += dout, summed over the rows: there each thread takes some of the channels. */
static void layernorm_backward(float *dinp, float *dweight, float *dbias, /* (n, c), (c), (c) */
                               const float *dout, const float *inp,            /* (n, c), (n, c) */
                               const float *mean, const float *rstd,           /* (n), (n) */
                               const float *weight, const float *addend, /* (c), (n, c) or NULL; may be dinp */
                               int n, int c, int accumulate) {
#pragma omp parallel if ((size_t)n * (size_t)c > TEAM_VALUES)
    {
#pragma omp for nowait
        for (int column = 0; column < c; column += W) {
            const int width = c - column;
            vec dw = accumulate ? load_upto(dweight + column, width) : (vec){0};
            vec db = accumulate ? load_upto(dbias + column, width) : (vec){0};
            for (int row = 0; row < n; row++) {
                const size_t at = (size_t)row * (size_t)c + (size_t)column;
                const vec g = load_upto(dout + at, width);
                dw += g * (load_upto(inp + at, width) - mean[row]) * rstd[row];
                db += g;
            }
            store_upto(dweight + column, dw, width);
            store_upto(dbias + column, db, width);
        }
#pragma omp for
        for (int row = 0; row < n; row++) {
            const size_t at = (size_t)row * (size_t)c;
            const float m = mean[row], s = rstd[row];
            vec sum = {0}, dot = {0};
            for (int i = 0; i < c; i += W) {
                const vec g = load_upto(dout + at + i, c - i) * load_upto(weight + i, c - i);
                sum += g;
                dot += g * ((load_upto(inp + at + i, c - i) - m) * s);
            }
            const float mean_g = reduce_add(sum) / (float)c, mean_dot = reduce_add(dot) / (float)c;
            for (int i = 0; i < c; i += W) {
                const vec g = load_upto(dout + at + i, c - i) * load_upto(weight + i, c - i);
                vec d = s * (g - mean_g - (load_upto(inp + at + i, c - i) - m) * s * mean_dot);
                if (addend) d += load_upto(addend + at + i, c - i);
                store_upto(dinp + at + i, d, c - i);
            }
        }
    }
}

/* ---- linear: out = inp . weight^T + bias ------------------------------------------------------------------------- */

/* A few rows, as in sampling: packing would cost more than the product. The weight is read once, where it lies, four of its
 * rows at a time. */
static void few_rows(float *out, const float *inp, const float *weight, const float *bias, const float *addend, int n, int c,
                     int oc) {
#pragma omp parallel for if ((double)n * c * oc > TEAM_PRODUCTS)
    for (int o = 0; o < oc; o += 4) {
        const float *w[4];
        for (int j = 0; j < 4; j++) w[j] = weight + (size_t)least(o + j, oc - 1) * (size_t)c;
        for (int row = 0; row < n; row++) {
            const float *x = inp + (size_t)row * (size_t)c;
            vec sum[4] = {0};
            for (int i = 0; i < c; i += W) {
                const vec v = load_upto(x + i, c - i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) sum[j] += v * load_upto(w[j] + i, c - i);
            }
            for (int j = 0; j < 4 && o + j < oc; j++) {
                const size_t at = (size_t)row * (size_t)oc + (size_t)(o + j);
                out[at] = reduce_add(sum[j]) + (bias ? bias[o + j] : 0.0f) + (addend ? addend[at] : 0.0f);
            }
        }
    }
}

static void linear_forward(float *out,                                                 /* (n, oc) */
                           const float *inp, const float *weight,                      /* (n, c), (oc, c) */
                           const float *bias, const float *addend, /* (oc) or NULL, (n, oc) or NULL; may be out */
                           int n, int c, int oc) {
    const Operand a = {inp, (size_t)c, 1}, b = {weight, (size_t)c, 1};
    if (n <= FEW_ROWS)
        few_rows(out, inp, weight, bias, addend, n, c, oc);
    else
        matmul(out, a, b, (Epilogue){.bias = bias, .addend = addend}, n, oc, c);
}

/* pre = inp . weight^T + bias, and out = gelu(pre) while pre is still in the cache. Without pre it is made in out. */
static void linear_gelu_forward(float *out, float *pre,                   /* (n, oc), (n, oc) or NULL */
                                const float *inp, const float *weight, /* (n, c), (oc, c) */
                                const float *bias,                     /* (oc) or NULL */
                                int n, int c, int oc) {
if (!pre) pre = out;
    const Operand a = {inp, (size_t)c, 1}, b = {weight, (size_t)c, 1};
    if (n <= FEW_ROWS) {
        few_rows(pre, inp, weight, bias, NULL, n, c, oc);
        for (int row = 0; row < n; row++) gelu_row(out + (size_t)row * (size_t)oc, pre + (size_t)row * (size_t)oc, oc);
    } else
        matmul(pre, a, b, (Epilogue){.bias = bias, .gelu = out}, n, oc, c);
}

/* dinp = dout . weight */
static void linear_backward_input(float *dinp,                             /* (n, c) */
                                  const float *dout, const float *weight, /* (n, oc), (oc, c) */
                                  int n, int c, int oc) {
    matmul(dinp, (Operand){dout, (size_t)oc, 1}, (Operand){weight, 1, (size_t)c}, (Epilogue){0}, n, c, oc);
}

/* dinp = dout . weight * gelu'(pre), while it is still in the cache. */
static void linear_backward_input_gelu(float *dinp,                             /* (n, c) */
                                       const float *dout, const float *weight, /* (n, oc), (oc, c) */
                                       const float *pre,                       /* (n, c) */
                                       int n, int c, int oc) {
    matmul(dinp, (Operand){dout, (size_t)oc, 1}, (Operand){weight, 1, (size_t)c}, (Epilogue){.pre = pre}, n, c, oc);
}

/* dweight += dout^T . inp; dbias += the sum of dout over the rows. */
static void linear_backward_weight(float *dweight, float *dbias,         /* (oc, c), (oc) or NULL */
                                   const float *dout, const float *inp, /* (n, oc), (n, c) */
                                   int n, int c, int oc, int accumulate) {
    matmul(dweight, (Operand){dout, 1, (size_t)oc}, (Operand){inp, 1, (size_t)c},
           (Epilogue){.addend = accumulate ? dweight : NULL}, oc, c, n);
    if (!dbias) return;
#pragma omp parallel for if ((size_t)n * (size_t)oc > TEAM_VALUES)
    for (int o = 0; o < oc; o += W) {
        vec sum = accumulate ? load_upto(dbias + o, oc - o) : (vec){0};
        for (int row = 0; row < n; row++) sum += load_upto(dout + (size_t)row * (size_t)oc + o, oc - o);
        store_upto(dbias + o, sum, oc - o);
    }
}

/* ---- causal self-attention: out = softmax(q . k^T / sqrt(HS)) . v, each query seeing the keys up to its own ---------
 *
 * No T x T matrix ever exists: BQ queries meet BK keys at a time. The softmax runs along these blocks: the largest score and
 * the sum are kept for each query, and what has been accumulated is rescaled when the largest moves. The forward leaves
 * lse = max + log(sum), from which the backward computes any block of probabilities again. One head is the work of one
 * thread. Heads lie side by side: a row of qkv holds all of q, then k, then v.
 */

enum {
    KEY_PANEL = HS * NR + 16,    /* NR keys, ready for q . k^T */
    HEAD_PANEL = MAXT * NR + 16, /* NR channels of all keys, ready for p . v */
    BLOCK_PANEL = BQ * NR + 16,  /* NR channels of a block of queries */
};

typedef struct { /* a thread's own */
    float scores[BQ * BK], dscores[BQ * BK];
    float max[BQ], sum[BQ];
    float keys[(MAXT + NR - 1) / NR * KEY_PANEL], values[(MAXT + NR - 1) / NR * KEY_PANEL]; /* lanes are keys */
    float channels[(HS + NR - 1) / NR * HEAD_PANEL];                                         /* lanes are channels */
    float queries[(HS + NR - 1) / NR * BLOCK_PANEL], douts[(HS + NR - 1) / NR * BLOCK_PANEL];
} AttentionScratch;

_Static_assert(sizeof(AttentionScratch) <= THREAD_SCRATCH * sizeof(float), "THREAD_SCRATCH is too small");

static const float MASKED = -1e30f; /* finite, so that no fast-math flag can spoil it */

/* Query i of the block sees the keys up to i + ahead of the block. So in a tile of products with MR queries at i ... */
typedef enum {
    SCORES, /* out (queries, keys)      = a (queries, HS) . b:      ... no more columns than seen are needed */
    MIX,    /* out (queries, HS)       += scores (queries, keys) . b: ... no more terms than seen are other than 0 */
    SPREAD, /* out (keys, HS)          += scores^T (keys, queries) . b: the same for the first terms of MR keys at i */
} Triangle;

static void block_product(Triangle triangle, int ahead, float *out, size_t ld, Operand a, const float *panels, size_t stride,
                          int m, int n, int k, int add) {
    for (int i = 0; i < m; i += MR) {
        const int seen = i + MR + ahead;
        const int columns = triangle == SCORES ? least(n, parts_of(seen, W) * W) : n;
        const int begin = triangle == SPREAD && i > ahead ? i - ahead : 0;
        const int end = triangle == MIX ? least(k, seen) : k;
        if (begin >= end) continue;
        const Operand rows = {a.data + (size_t)i * a.lane + (size_t)begin * a.step, a.lane, a.step};
        for (int j = 0; j < columns; j += NR) {
            float *at = out + (size_t)i * ld + j;
            any_tile(at, ld, least(MR, m - i), least(NR, columns - j), rows, panels + (size_t)(j / NR) * stride + begin * NR,
                     end - begin, add ? at : NULL, NULL);
        }
    }
}

/* scores become exp(score * scale - shift) where they are seen, 0 elsewhere up to n. Returns their sum. */
static float exp_scores(float *scores, float scale, float shift, int seen, int n) {
    vec sum = {0};
    int i = 0;
    for (; i < seen; i += W) {
        const vec e = vexp(load(scores + i) * scale - shift);
        store(scores + i, e);
        sum += e;
    }
    for (; i < n; i += W) store(scores + i, (vec){0});
    return reduce_add(sum);
}

/* The register in which the seen keys end is completed. */
static void mask_scores(float *scores, int seen) {
    for (; seen % W; seen++) scores[seen] = MASKED;
}

static void head_forward(AttentionScratch *s, float *out, float *lse, const float *q, const float *k, const float *v, int t) {
    const float scale = 1.0f / sqrtf(HS);
    pack_right(s->keys, KEY_PANEL, (Operand){k, 3 * C, 1}, t, HS);
    pack_right(s->channels, HEAD_PANEL, (Operand){v, 1, 3 * C}, HS, t);
    for (int q0 = 0; q0 < t; q0 += BQ) {
        const int nq = least(BQ, t - q0);
        for (int i = 0; i < BQ; i++) {
            s->max[i] = MASKED;
            s->sum[i] = 1.0f;
        }
        for (int k0 = 0; k0 < q0 + nq; k0 += BK) {
            const int nk = least(BK, t - k0), ahead = q0 - k0;
            block_product(SCORES, ahead, s->scores, BK, (Operand){q + (size_t)q0 * 3 * C, 3 * C, 1},
                          s->keys + (size_t)(k0 / NR) * KEY_PANEL, KEY_PANEL, nq, parts_of(nk, NR) * NR, HS, 0);
            for (int i = 0; i < nq; i++) {
                float *scores = s->scores + (size_t)i * BK;
                const int seen = least(nk, i + ahead + 1);
                float top = s->max[i];
                if (seen > 0) {
                    mask_scores(scores, seen);
                    vec most = load(scores);
                    for (int j = W; j < seen; j += W) most = blend(load(scores + j) > most, load(scores + j), most);
                    top = reduce_max(most) * scale;
                }
                if (k0 == 0) {
                    s->max[i] = top;
                    s->sum[i] = 0.0f;
                } else if (top > s->max[i]) {
                    const float shrink = expf(s->max[i] - top);
                    float *o = out + (size_t)(q0 + i) * C;
                    for (int c = 0; c < HS; c++) o[c] *= shrink;
                    s->max[i] = top;
                    s->sum[i] *= shrink;
                }
                s->sum[i] += exp_scores(scores, scale, s->max[i], seen, nk);
            }
            block_product(MIX, ahead, out + (size_t)q0 * C, C, (Operand){s->scores, BK, 1}, s->channels + (size_t)k0 * NR,
                          HEAD_PANEL, nq, HS, nk, k0 > 0);
        }
        for (int i = 0; i < nq; i += W)
            store_upto(lse + q0 + i, load(s->max + i) + vlog(load(s->sum + i)), nq - i);
        for (int i = 0; i < nq; i++) {
            float *o = out + (size_t)(q0 + i) * C;
            for (int c = 0; c < HS; c++) o[c] /= s->sum[i];
        }
    }
}

static void attention_forward(float *out, float *lse, /* (b, t, C), (b, NH, t) */
                              const float *qkv,       /* (b, t, 3*C) */
                              int b, int t) {
#pragma omp parallel for schedule(dynamic) if ((double)b * t * t * C > TEAM_PRODUCTS)
    for (int head = 0; head < b * NH; head++) {
        const size_t row = (size_t)(head / NH) * (size_t)t, h = (size_t)(head % NH) * HS;
        const float *q = qkv + row * 3 * C + h, *k = q + C, *v = k + C;
        head_forward((AttentionScratch *)(thread_scratch + (size_t)thread_number() * THREAD_SCRATCH),
                     out + row * C + h, lse + (size_t)head * (size_t)t, q, k, v, t);
    }
}

/* With p = exp(q . k^T * scale - lse) and d = the sum of dout * out over a row:
 *   dv += p^T . dout,  ds = p * (dout . v^T - d) * scale,  dq += ds . k,  dk += ds^T . q */
static void head_backward(AttentionScratch *s, float *dq, float *dk, float *dv, const float *dout, const float *out,
                          const float *lse, const float *q, const float *k, const float *v, int t) {
    const float scale = 1.0f / sqrtf(HS);
    pack_right(s->keys, KEY_PANEL, (Operand){k, 3 * C, 1}, t, HS);
    pack_right(s->values, KEY_PANEL, (Operand){v, 3 * C, 1}, t, HS);
    pack_right(s->channels, HEAD_PANEL, (Operand){k, 1, 3 * C}, HS, t);
    for (int q0 = 0; q0 < t; q0 += BQ) {
        const int nq = least(BQ, t - q0);
        const Operand queries = {q + (size_t)q0 * 3 * C, 3 * C, 1}, douts = {dout + (size_t)q0 * C, C, 1};
        pack_right(s->queries, BLOCK_PANEL, (Operand){queries.data, 1, 3 * C}, HS, nq);
        pack_right(s->douts, BLOCK_PANEL, (Operand){douts.data, 1, C}, HS, nq);
        for (int i = 0; i < nq; i++) {
            const float *o = out + (size_t)(q0 + i) * C, *g = dout + (size_t)(q0 + i) * C;
            vec sum = {0};
            for (int c = 0; c < HS; c += W) sum += load_upto(o + c, HS - c) * load_upto(g + c, HS - c);
            s->sum[i] = reduce_add(sum);
        }
        for (int k0 = 0; k0 < q0 + nq; k0 += BK) {
            const int nk = least(BK, t - k0), ahead = q0 - k0, columns = parts_of(nk, NR) * NR;
            const size_t panel = (size_t)(k0 / NR) * KEY_PANEL;
            block_product(SCORES, ahead, s->scores, BK, queries, s->keys + panel, KEY_PANEL, nq, columns, HS, 0);
            block_product(SCORES, ahead, s->dscores, BK, douts, s->values + panel, KEY_PANEL, nq, columns, HS, 0);
            for (int i = 0; i < nq; i++) {
                float *p = s->scores + (size_t)i * BK, *ds = s->dscores + (size_t)i * BK;
                const int seen = least(nk, i + ahead + 1);
                if (seen > 0) mask_scores(p, seen);
                exp_scores(p, scale, lse[q0 + i], seen, nk);
                int j = 0;
                for (; j < seen; j += W) store(ds + j, load(p + j) * (load(ds + j) - s->sum[i]) * scale);
                for (; j < nk; j += W) store(ds + j, (vec){0});
            }
            block_product(SPREAD, ahead, dv + (size_t)k0 * 3 * C, 3 * C, (Operand){s->scores, 1, BK}, s->douts, BLOCK_PANEL,
                          nk, HS, nq, 1);
            block_product(SPREAD, ahead, dk + (size_t)k0 * 3 * C, 3 * C, (Operand){s->dscores, 1, BK}, s->queries,
                          BLOCK_PANEL, nk, HS, nq, 1);
            block_product(MIX, ahead, dq + (size_t)q0 * 3 * C, 3 * C, (Operand){s->dscores, BK, 1},
                          s->channels + (size_t)k0 * NR, HEAD_PANEL, nq, HS, nk, k0 > 0);
        }
    }
}

static void attention_backward(float *dqkv,                         /* (b, t, 3*C) */
                               const float *dout, const float *out, /* (b, t, C) each */
                               const float *lse, const float *qkv,  /* (b, NH, t), (b, t, 3*C) */
                               int b, int t) {
#pragma omp parallel for schedule(dynamic) if ((double)b * t * t * C > TEAM_PRODUCTS)
    for (int head = 0; head < b * NH; head++) {
        const size_t row = (size_t)(head / NH) * (size_t)t, h = (size_t)(head % NH) * HS;
        const float *q = qkv + row * 3 * C + h, *k = q + C, *v = k + C;
        float *dq = dqkv + row * 3 * C + h, *dk = dq + C, *dv = dk + C;
        AttentionScratch *s = (AttentionScratch *)(thread_scratch + (size_t)thread_number() * THREAD_SCRATCH);
        for (int i = 0; i < t; i++) {
            memset(dk + (size_t)i * 3 * C, 0, HS * sizeof(float));
            memset(dv + (size_t)i * 3 * C, 0, HS * sizeof(float));
        }
        head_backward(s, dq, dk, dv, dout + row * C + h, out + row * C + h,
                      lse + (size_t)head * (size_t)t, q, k, v, t);
    }
}

/* ---- classifier: logits = inp . weight^T, loss = log(sum(exp(logits))) - logits[target] -----------------------------
 * CHUNK rows at a time: the logits of all tokens never exist. The weight is padded from V to VP rows; the logits of the
 * padding are computed and then left out. */

INLINE float largest(const float *x, int n) {
    vec most = splat(x[0]);
    for (int i = 0; i + W <= n; i += W) most = blend(load(x + i) > most, load(x + i), most);
    float max = reduce_max(most);
    for (int i = n / W * W; i < n; i++) max = x[i] > max ? x[i] : max;
    return max;
}

static void classifier_forward(float *losses, float *logits,                             /* (n), (CHUNK, VP) */
                               const float *inp, const float *weight, const int *targets, /* (n, C), (VP, C), (n) */
                               int n) {
    for (int first = 0; first < n; first += CHUNK) {
        const int rows = least(CHUNK, n - first);
        linear_forward(logits, inp + (size_t)first * C, weight, NULL, NULL, rows, C, VP);
        if (logits_file) write_logits(logits, rows);
#pragma omp parallel for if ((size_t)rows * V > TEAM_VALUES)
        for (int row = 0; row < rows; row++) {
            const float *x = logits + (size_t)row * VP;
            const float max = largest(x, V);
            vec sum = {0};
            for (int i = 0; i < V; i += W) sum += keep_upto(vexp(load(x + i) - max), V - i);
            losses[first + row] = logf(reduce_add(sum)) + max - x[targets[first + row]];
        }
    }
}

/* The logits become their own gradient, dlogits = (softmax(logits) - onehot(target)) * loss_scale, 0 in the padding;
 * dinp = dlogits . weight, dweight += dlogits^T . inp. */
static void classifier_forward_backward(float *losses, float *dinp, float *dweight,     /* (n), (n, C), (VP, C) */
                                        float *logits,                                   /* (CHUNK, VP) */
                                        const float *inp, const float *weight, /* (n, C), (VP, C) */
                                        const int *targets, float loss_scale, int n, int accumulate) {
    for (int first = 0; first < n; first += CHUNK) {
        const int rows = least(CHUNK, n - first);
        const float *x = inp + (size_t)first * C;
        linear_forward(logits, x, weight, NULL, NULL, rows, C, VP);
        if (logits_file) write_logits(logits, rows);
#pragma omp parallel for if ((size_t)rows * V > TEAM_VALUES)
        for (int row = 0; row < rows; row++) {
            float *d = logits + (size_t)row * VP;
            const int target = targets[first + row];
            const float max = largest(d, V), correct = d[target];
            vec sum = {0};
            for (int i = 0; i < V; i += W) {
                const vec e = keep_upto(vexp(load(d + i) - max), V - i);
                store(d + i, e);
                sum += e;
            }
            const float total = reduce_add(sum), scale = loss_scale / total;
            for (int i = 0; i < V; i += W) store(d + i, load(d + i) * scale);
            for (int i = V; i < VP; i++) d[i] = 0.0f;
            d[target] -= loss_scale;
            losses[first + row] = logf(total) + max - correct;
        }
        linear_backward_input(dinp + (size_t)first * C, logits, weight, rows, C, VP);
        linear_backward_weight(dweight, NULL, logits, x, rows, C, VP, accumulate || first > 0);
    }
}

/* ---- the sum of squares of all gradients, for the global norm ---------------------------------------------------- */

/* Cut in the same parts whatever the number of threads, which are then added in order. */
static double sum_of_squares(const float *x, size_t n) { /* (n) */
    enum { PARTS = 256, RUN = 1024 };
    double sums[PARTS], total = 0.0;
#pragma omp parallel for if (n > TEAM_VALUES)
    for (size_t part = 0; part < PARTS; part++) {
        const size_t end = n * (part + 1) / PARTS;
        double sum = 0.0;
        for (size_t i = n * part / PARTS; i < end; i += RUN) {
            const int run = end - i < RUN ? (int)(end - i) : RUN; /* short enough for float sums */
            vec even = {0}, odd = {0};
            for (int j = 0; j < run; j += 2 * W) {
                const vec a = load_upto(x + i + j, run - j), b = load_upto(x + i + j + W, run - j - W);
                even += a * a;
                odd += b * b;
            }
            sum += (double)reduce_add(even + odd);
        }
        sums[part] = sum;
    }
    for (int part = 0; part < PARTS; part++) total += sums[part];
    return total;
}

/* ---- AdamW (Loshchilov and Hutter): with g = grad * grad_scale,
 *   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
 *   param -= learning_rate * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon) + weight_decay * param) ---- */

static void adamw_update(float *param, float *m, float *v, const float *grad, size_t n, float grad_scale, /* all (n) */
                         float learning_rate, float weight_decay, float beta1, float beta2, float epsilon, int step) {
    const float correct1 = (float)(1.0 / (1.0 - pow(beta1, step))), correct2 = (float)(1.0 / (1.0 - pow(beta2, step)));
#pragma omp parallel for if (n > TEAM_VALUES)
    for (size_t i = 0; i < n; i += W) {
        const int rest = n - i < W ? (int)(n - i) : W;
        const vec g = load_upto(grad + i, rest) * grad_scale, p = load_upto(param + i, rest);
        const vec m_now = beta1 * load_upto(m + i, rest) + (1.0f - beta1) * g;
        const vec v_now = beta2 * load_upto(v + i, rest) + (1.0f - beta2) * g * g;
        const vec direction = m_now * correct1 / (vsqrt(v_now * correct2) + epsilon);
        store_upto(m + i, m_now, rest);
        store_upto(v + i, v_now, rest);
        store_upto(param + i, p - learning_rate * (direction + weight_decay * p), rest);
    }
}

/* ---- memory of the model ----------------------------------------------------------------------------------------- */

_Static_assert(sizeof(Parameters) == NUM_TENSORS * sizeof(float *), "Parameters has a pointer for each row of the table");

static void point_parameters(Parameters *p, float *memory) {
    float **tensors = (float **)p;
    for (int i = 0; i < NUM_TENSORS; i++) tensors[i] = memory + parameter_table[i].offset;
}

/* All memory the model ever uses; 2,196,679,680 bytes and 1,050,240 for each thread. */
static void allocate_model(void) {
    params_memory = (float *)allocate_tensors(497903616);
    grads_memory = (float *)allocate_tensors(497903616);
    moment1_memory = (float *)allocate_tensors(497903616);
    moment2_memory = (float *)allocate_tensors(497903616);
    point_parameters(&params, params_memory);
    point_parameters(&grads, grads_memory);
    point_parameters(&moment1, moment1_memory);
    point_parameters(&moment2, moment2_memory);

    float *workspace = (float *)allocate_tensors(205065216);
    acts.residual = workspace;
    acts.ln1 = workspace + 2555904;
    acts.ln1_mean = workspace + 4915200;
    acts.ln1_rstd = workspace + 4918272;
    acts.qkv = workspace + 4921344;
    acts.attention = workspace + 11999232;
    acts.attention_lse = workspace + 14358528;
    acts.residual2 = workspace + 14395392;
    acts.ln2 = workspace + 16754688;
    acts.ln2_mean = workspace + 19113984;
    acts.ln2_rstd = workspace + 19117056;
    acts.gelu = workspace + 19120128;
    acts.fc = workspace + 28557312;
    acts.lnf = workspace + 50872320;
    acts.lnf_mean = workspace + 51265536;
    acts.lnf_rstd = workspace + 51265792;
    acts.losses = workspace + 51266048;
    acts.dlnf = workspace + 51068928;
    acts.logits = workspace + 37994496;
    acts.dresidual = workspace + 38780928;
    acts.dfc = workspace + 37994496;
    acts.dln2 = workspace + 38977536;
    acts.dattention = workspace + 38584320;
    acts.dqkv = workspace + 37994496;
    acts.dln1 = workspace + 38584320;
    eval.residual = workspace + 3145728;
    eval.ln1 = workspace + 2359296;
    eval.ln1_mean = workspace;
    eval.ln1_rstd = workspace + 1024;
    eval.qkv = workspace;
    eval.attention = workspace + 2359296;
    eval.attention_lse = workspace + 3932160;
    eval.ln2 = workspace + 3932160;
    eval.ln2_mean = workspace;
    eval.ln2_rstd = workspace + 1024;
    eval.gelu = workspace;
    eval.lnf = workspace + 12877824;
    eval.lnf_mean = workspace;
    eval.lnf_rstd = workspace + 1024;
    eval.losses = workspace + 13664256;
    eval.logits = workspace;
    thread_scratch = (float *)allocate_tensors((size_t)num_threads * 1050240);
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

/* One micro-batch: acts.losses of every token, and the gradients of loss_scale times their sum. The first micro-batch of a
 * step writes the gradients, later ones add to them. */
static void forward_backward(const int *tokens, const int *targets, float loss_scale, int micro_batch) {
    /* embedding */
    token_embedding_forward(acts.residual, tokens, params.wte, BT, C);
    position_embedding_forward(acts.residual, acts.residual, params.wpe, B, T, C);
    /* layers */
    for (size_t l = 0; l < L; l++) {
        layernorm_forward(acts.ln1 + l*BT*C, acts.ln1_mean + l*BT, acts.ln1_rstd + l*BT, acts.residual + l*BT*C,
                          params.ln1w + l*C, params.ln1b + l*C, BT, C);
        linear_forward(acts.qkv + l*BT*3*C, acts.ln1 + l*BT*C, params.qkvw + l*3*C*C, params.qkvb + l*3*C, NULL, BT, C,
                       3*C);
        attention_forward(acts.attention + l*BT*C, acts.attention_lse + l*B*NH*T, acts.qkv + l*BT*3*C, B, T);
        linear_forward(acts.residual2 + l*BT*C, acts.attention + l*BT*C, params.attprojw + l*C*C, params.attprojb + l*C,
                       acts.residual + l*BT*C, BT, C, C);
        layernorm_forward(acts.ln2 + l*BT*C, acts.ln2_mean + l*BT, acts.ln2_rstd + l*BT, acts.residual2 + l*BT*C,
                          params.ln2w + l*C, params.ln2b + l*C, BT, C);
        linear_gelu_forward(acts.gelu + l*BT*4*C, acts.fc + l*BT*4*C, acts.ln2 + l*BT*C, params.fcw + l*4*C*C,
                            params.fcb + l*4*C, BT, C, 4*C);
        linear_forward(acts.residual + (l + 1)*BT*C, acts.gelu + l*BT*4*C, params.fcprojw + l*C*4*C,
                       params.fcprojb + l*C, acts.residual2 + l*BT*C, BT, 4*C, C);
    }
    /* head, forward and backward */
    layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, acts.residual + L*BT*C, params.lnfw, params.lnfb, BT, C);
    classifier_forward_backward(acts.losses, acts.dlnf, grads.wte, acts.logits, acts.lnf, params.wte, targets,
                                loss_scale, BT, micro_batch > 0);
    layernorm_backward(acts.dresidual, grads.lnfw, grads.lnfb, acts.dlnf, acts.residual + L*BT*C, acts.lnf_mean,
                       acts.lnf_rstd, params.lnfw, NULL, BT, C, micro_batch > 0);
    /* layers, backward */
    for (size_t l = L; l-- > 0;) {
        linear_backward_weight(grads.fcprojw + l*C*4*C, grads.fcprojb + l*C, acts.dresidual, acts.gelu + l*BT*4*C, BT,
                               4*C, C, micro_batch > 0);
        linear_backward_input_gelu(acts.dfc, acts.dresidual, params.fcprojw + l*C*4*C, acts.fc + l*BT*4*C, BT, 4*C, C);
        linear_backward_weight(grads.fcw + l*4*C*C, grads.fcb + l*4*C, acts.dfc, acts.ln2 + l*BT*C, BT, C, 4*C,
                               micro_batch > 0);
        linear_backward_input(acts.dln2, acts.dfc, params.fcw + l*4*C*C, BT, C, 4*C);
        layernorm_backward(acts.dresidual, grads.ln2w + l*C, grads.ln2b + l*C, acts.dln2, acts.residual2 + l*BT*C,
                           acts.ln2_mean + l*BT, acts.ln2_rstd + l*BT, params.ln2w + l*C, acts.dresidual, BT, C,
                           micro_batch > 0);
        linear_backward_weight(grads.attprojw + l*C*C, grads.attprojb + l*C, acts.dresidual, acts.attention + l*BT*C,
                               BT, C, C, micro_batch > 0);
        linear_backward_input(acts.dattention, acts.dresidual, params.attprojw + l*C*C, BT, C, C);
        attention_backward(acts.dqkv, acts.dattention, acts.attention + l*BT*C, acts.attention_lse + l*B*NH*T,
                           acts.qkv + l*BT*3*C, B, T);
        linear_backward_weight(grads.qkvw + l*3*C*C, grads.qkvb + l*3*C, acts.dqkv, acts.ln1 + l*BT*C, BT, C, 3*C,
                               micro_batch > 0);
        linear_backward_input(acts.dln1, acts.dqkv, params.qkvw + l*3*C*C, BT, C, 3*C);
        layernorm_backward(acts.dresidual, grads.ln1w + l*C, grads.ln1b + l*C, acts.dln1, acts.residual + l*BT*C,
                           acts.ln1_mean + l*BT, acts.ln1_rstd + l*BT, params.ln1w + l*C, acts.dresidual, BT, C,
                           micro_batch > 0);
    }
    /* embedding, backward */
    position_embedding_backward(grads.wpe, acts.dresidual, MAXT, B, T, C, micro_batch > 0);
    token_embedding_backward(grads.wte, acts.dresidual, tokens, VP, BT, C, 1);
}

/* Forward only, of b rows of t tokens: eval.losses of the tokens from `first` on, counted through all rows. The logits of
 * the last chunk of those stay in eval.logits. */
static void evaluate(const int *tokens, const int *targets, int b, int t, int first) {
    /* embedding */
    token_embedding_forward(eval.residual, tokens, params.wte, b*t, C);
    position_embedding_forward(eval.residual, eval.residual, params.wpe, b, t, C);
    /* layers */
    for (size_t l = 0; l < L; l++) {
        layernorm_forward(eval.ln1, eval.ln1_mean, eval.ln1_rstd, eval.residual, params.ln1w + l*C, params.ln1b + l*C,
                          b*t, C);
        linear_forward(eval.qkv, eval.ln1, params.qkvw + l*3*C*C, params.qkvb + l*3*C, NULL, b*t, C, 3*C);
        attention_forward(eval.attention, eval.attention_lse, eval.qkv, b, t);
        linear_forward(eval.residual, eval.attention, params.attprojw + l*C*C, params.attprojb + l*C, eval.residual,
                       b*t, C, C);
        layernorm_forward(eval.ln2, eval.ln2_mean, eval.ln2_rstd, eval.residual, params.ln2w + l*C, params.ln2b + l*C,
                          b*t, C);
        linear_gelu_forward(eval.gelu, NULL, eval.ln2, params.fcw + l*4*C*C, params.fcb + l*4*C, b*t, C, 4*C);
        linear_forward(eval.residual, eval.gelu, params.fcprojw + l*C*4*C, params.fcprojb + l*C, eval.residual, b*t,
                       4*C, C);
    }
    /* head */
    layernorm_forward(eval.lnf, eval.lnf_mean, eval.lnf_rstd, eval.residual, params.lnfw, params.lnfb, b*t, C);
    classifier_forward(eval.losses, eval.logits, eval.lnf + first*C, params.wte, targets + first, b*t - first);
}

static double gradient_norm(void) { return sqrt(sum_of_squares(grads_memory, PARAMETER_VALUES)); }

/* Clips the gradients, whose norm is given, to one of at most grad_clip and applies AdamW; step counts from 1. */
static void update(const Settings *s, double norm, float learning_rate, int step) {
    const float grad_scale = s->grad_clip > 0.0 && norm > s->grad_clip ? (float)(s->grad_clip / norm) : 1.0f;
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorRow *row = &parameter_table[i];
        const size_t at = row->offset, n = row->stride * (size_t)row->layers;
        adamw_update(params_memory + at, moment1_memory + at, moment2_memory + at, grads_memory + at, n, grad_scale,
                     learning_rate, row->decays ? (float)s->weight_decay : 0.0f, (float)s->beta1, (float)s->beta2,
                     (float)s->epsilon, step);
    }
}

/* ---- weights: initialise, load, save ----------------------------------------------------------------------------- */

/* Two independent N(0, 1) values from 64 random bits (Box and Muller 1958). */
static void normal_pair(uint64_t bits, float *a, float *b) {
    const float u = (float)((bits >> 40) + 1) * 0x1p-24f;                    /* (0, 1] */
    const float angle = (float)(bits & 0xffffff) * (6.28318531f * 0x1p-24f); /* [0, 2 pi) */
    const float radius = sqrtf(-2.0f * logf(u));
    *a = radius * cosf(angle);
    *b = radius * sinf(angle);
}

/* The same seed gives the same weights, however many threads compute them. Vocabulary rows past V stay zero. */
static void initialise_weights(uint64_t seed) {
    uint64_t first = 0;  /* values before this layer of this tensor */
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorRow *row = &parameter_table[i];
        for (int l = 0; l < row->layers; l++) {
            float *values = params_memory + row->offset + (size_t)l * row->stride;
            const int64_t n = (int64_t)row->valid;
#pragma omp parallel for
            for (int64_t j = 0; j < n; j += 2) {
                float a, b;
                normal_pair(random_bits(seed, INIT_STREAM, first + (uint64_t)j), &a, &b);
                values[j] = row->mean + row->std * a;
                if (j + 1 < n) values[j + 1] = row->mean + row->std * b;
            }
            first += row->count;
        }
    }
}

enum {
    WEIGHTS_MAGIC = 20240326,
    WEIGHTS_FP32 = 3,  /* versions of the layout: by the type of the values */
    WEIGHTS_BF16 = 5,
};

/* What follows magic and version in a header of weights that fit this program. */
static const struct { const char *name; int value; } weights_header[] = {
    { "max_seq_len", MAXT }, { "vocab_size", V }, { "num_layers", L }, { "num_heads", NH }, { "channels", C },
    { "padded_vocab_size", VP },
};
enum { WEIGHTS_HEADER = sizeof weights_header / sizeof weights_header[0] };

static int64_t count_parameters(void) {
    int64_t count = 0;
    for (int i = 0; i < NUM_TENSORS; i++) count += (int64_t)(parameter_table[i].layers * parameter_table[i].count);
    return count;
}

/* bfloat16 is the upper half of a float32. */
static void read_bf16(FILE *file, float *values, size_t count, const char *path) {
    uint16_t halves[4096];
    for (size_t done = 0; done < count;) {
        const size_t n = count - done < 4096 ? count - done : 4096;
        read_input(file, halves, n * sizeof halves[0], path);
        for (size_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t)halves[i] << 16;
            memcpy(&values[done + i], &bits, sizeof bits);
        }
        done += n;
    }
}

static void write_bf16(FILE *file, const float *values, size_t count) {
    uint16_t halves[4096];
    for (size_t done = 0; done < count;) {
        const size_t n = count - done < 4096 ? count - done : 4096;
        for (size_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, &values[done + i], sizeof bits);
            halves[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  /* to nearest, ties to even */
        }
        write_output(file, halves, n * sizeof halves[0]);
        done += n;
    }
}

/* The tensors of parameter_table back to back, each stacked over the layers: weights, moments or gradients. */
static void read_tensors(FILE *file, float *memory, int is_bf16, const char *path) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorRow *row = &parameter_table[i];
        for (int l = 0; l < row->layers; l++) {
            float *values = memory + row->offset + (size_t)l * row->stride;
            if (is_bf16) read_bf16(file, values, row->count, path);
            else read_input(file, values, row->count * sizeof(float), path);
        }
    }
}

static void write_tensors(FILE *file, const float *memory, int as_bf16) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorRow *row = &parameter_table[i];
        for (int l = 0; l < row->layers; l++) {
            const float *values = memory + row->offset + (size_t)l * row->stride;
            if (as_bf16) write_bf16(file, values, row->count);
            else write_output(file, values, row->count * sizeof(float));
        }
    }
}

/* Header, tensors. */
static void load_weights(const char *path) {
    int32_t header[HEADER_INTS];
    int64_t bytes;
    FILE *file = open_input(path, header, &bytes);
    if (header[0] != WEIGHTS_MAGIC) {
        die(1, "%s: not weights: its magic number is %d, not %d; name another file", path, header[0], WEIGHTS_MAGIC);
    }
    if (header[1] != WEIGHTS_FP32 && header[1] != WEIGHTS_BF16) {
        die(1, "%s: weights of version %d, but %d (fp32) or %d (bf16) is expected; export them again", path, header[1],
            WEIGHTS_FP32, WEIGHTS_BF16);
    }
    for (int i = 0; i < WEIGHTS_HEADER; i++) {
        if (header[2 + i] == weights_header[i].value) continue;
        die(1, "%s: %s is %d, but this program is built for %d; build one for it with llmgen build --config %s", path,
            weights_header[i].name, header[2 + i], weights_header[i].value, path);
    }
    const int is_bf16 = header[1] == WEIGHTS_BF16;
    check_bytes(bytes, count_parameters() * (is_bf16 ? 2 : 4), path);
    if (is_bf16) say("%s: bf16, converted to fp32\n", path);
    read_tensors(file, params_memory, is_bf16, path);
    fclose(file);
}

static void save_weights(const char *path, int as_bf16) {
    int32_t header[HEADER_INTS] = { WEIGHTS_MAGIC };
    header[1] = as_bf16 ? WEIGHTS_BF16 : WEIGHTS_FP32;
    for (int i = 0; i < WEIGHTS_HEADER; i++) header[2 + i] = weights_header[i].value;
    FILE *file = open_output(path);
    write_output(file, header, HEADER_BYTES);
    write_tensors(file, params_memory, as_bf16);
    close_output(file);
}

/* ---- data: shards of tokens -------------------------------------------------------------------------------------- */

enum {
    TOKENS16_MAGIC = 20240520,  /* a token is a uint16 */
    TOKENS16_VERSION = 1,
    TOKENS32_MAGIC = 20240801,  /* a token is a uint32 */
    TOKENS32_VERSION = 7,
};

typedef struct {
    char *path;
    int token_bytes;               /* 2 or 4 */
    int64_t num_tokens, num_samples;
} Shard;

typedef struct {
    Shard *shards;                 /* in byte order of their paths */
    int num_shards;
    int64_t num_samples;
    FILE *file;                    /* the one that is open, of shard `open_shard` */
    int open_shard;
    unsigned char *bytes;          /* a sample as it stands in the file */
    int *tokens;                   /* (BT+1): the inputs are the first BT, the targets the last BT */
} Loader;

static Shard inspect_shard(const char *path) {
    int32_t header[HEADER_INTS];
    Shard shard;
    int64_t bytes;
    fclose(open_input(path, header, &bytes));
    if (header[0] != TOKENS16_MAGIC && header[0] != TOKENS32_MAGIC) {
        die(1, "%s: not tokens: its magic number is %d, not %d or %d; name other files", path, header[0],
            TOKENS16_MAGIC, TOKENS32_MAGIC);
    }
    shard.token_bytes = header[0] == TOKENS16_MAGIC ? 2 : 4;
    if (header[1] != (header[0] == TOKENS16_MAGIC ? TOKENS16_VERSION : TOKENS32_VERSION)) {
        die(1, "%s: tokens of version %d, which this program does not know; export them again", path, header[1]);
    }
    if (header[2] < 0) die(1, "%s: its header says %d tokens; export them again", path, header[2]);
    check_bytes(bytes, (int64_t)header[2] * shard.token_bytes, path);
    shard.path = strdup(path);
    if (!shard.path) die(1, "out of memory");
    shard.num_tokens = header[2];
    shard.num_samples = header[2] == 0 ? 0 : (header[2] - 1) / BT;
    return shard;
}

static Loader open_data(const char *flag, const char *pattern) {
    Loader data;
    glob_t paths;
    long long num_tokens = 0;
    memset(&data, 0, sizeof data);
    const int failed = glob(pattern, 0, NULL, &paths);  /* sorted by bytes: this program never leaves the C locale */
    data.num_shards = failed ? 1 : (int)paths.gl_pathc;
    data.shards = (Shard *)allocate((size_t)data.num_shards * sizeof(Shard));
    if (failed && access(pattern, F_OK) != 0) die(1, "%s '%s': no such file; llmgen export-tokens makes some", flag, pattern);
    for (int i = 0; i < data.num_shards; i++) {
        data.shards[i] = inspect_shard(failed ? pattern : paths.gl_pathv[i]);
        num_tokens += data.shards[i].num_tokens;
        data.num_samples += data.shards[i].num_samples;
    }
    if (!failed) globfree(&paths);
    if (data.num_samples == 0) {
        die(1, "%s '%s': %lld tokens, but a batch of %d x %d takes %d of one file; build with a smaller --batch-size",
            flag, pattern, num_tokens, B, T, BT + 1);
    }
    say("%s: %d %s, %lld tokens, %lld samples of %d x %d; %lld tokens at the ends of files are left out\n", flag + 2,
        data.num_shards, data.num_shards == 1 ? "file" : "files", num_tokens, (long long)data.num_samples,
        B, T, num_tokens - (long long)data.num_samples * BT);
    data.bytes = (unsigned char *)allocate(4 * ((size_t)BT + 1));
    data.tokens = (int *)allocate(sizeof(int) * ((size_t)BT + 1));
    return data;
}

/* Opens the shard of sample k, counted through all shards and, after the last, from the first again. `first` is the token
 * of the shard that the sample begins with. */
static const Shard *open_shard(Loader *data, int64_t k, int64_t *first) {
    int s = 0;
    for (k %= data->num_samples; k >= data->shards[s].num_samples; s++) k -= data->shards[s].num_samples;
    const Shard *shard = &data->shards[s];
    if (!data->file || data->open_shard != s) {
        if (data->file) fclose(data->file);
        data->file = fopen(shard->path, "rb");
        data->open_shard = s;
    }
    if (!data->file) die(1, "%s: cannot be read: %s", shard->path, strerror(errno));
    *first = k * BT;
    return shard;
}

/* (BT+1) tokens. */
static const int *load_sample(Loader *data, int64_t k) {
    int64_t first;
    const Shard *shard = open_shard(data, k, &first);
    if (fseeko(data->file, (off_t)(HEADER_BYTES + first * shard->token_bytes), SEEK_SET) != 0) {
        die(1, "%s: cannot be read: %s", shard->path, strerror(errno));
    }
    read_input(data->file, data->bytes, (size_t)shard->token_bytes * (BT + 1), shard->path);
    for (int i = 0; i <= BT; i++) {
        uint16_t narrow;
        uint32_t token;
        if (shard->token_bytes == 2) {
            memcpy(&narrow, data->bytes + 2 * (size_t)i, 2);
            token = narrow;
        } else {
            memcpy(&token, data->bytes + 4 * (size_t)i, 4);
        }
        if (token >= V) {
            die(1, "%s: token %u at position %lld is not below vocab_size %d; was it made with another tokenizer?",
                shard->path, token, (long long)(first + i), V);
        }
        data->tokens[i] = (int)token;
    }
    return data->tokens;
}

/* Where k goes in a shuffle of 0..n-1, without a table: a Feistel network permutes the numbers of the fewest even bits that
 * hold n, and what falls outside goes through again. */
static int64_t shuffled(int64_t k, int64_t n, uint64_t seed) {
    int half = 1;
    while (((int64_t)1 << 2 * half) < n) half++;
    const uint64_t mask = ((uint64_t)1 << half) - 1;
    uint64_t x = (uint64_t)k;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 4; round++) {
            const uint64_t next = left ^ (random_bits(seed, SHUFFLE_STREAM + round, right) & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

/* The sample that training takes as its k-th: with --shuffle each epoch has an order of its own, in which every sample comes
 * once; with --overfit-batch those of the first step come again and again. */
static int64_t training_sample(const Settings *s, const Loader *data, int64_t k) {
    const int64_t n = data->num_samples;
    if (s->overfit_batch) k %= s->total_batch_size / BT;
    return s->shuffle ? shuffled(k % n, n, mix_bits((uint64_t)s->seed) + (uint64_t)(k / n)) : k;
}

/* Has the system read a sample while the model computes, where it can be told to. */
static void prefetch_sample(Loader *data, int64_t k) {
    int64_t first;
    const Shard *shard = open_shard(data, k, &first);
#ifdef POSIX_FADV_WILLNEED
    posix_fadvise(fileno(data->file), (off_t)(HEADER_BYTES + first * shard->token_bytes),
                  (off_t)shard->token_bytes * (BT + 1), POSIX_FADV_WILLNEED);
#else
    (void)shard;
#endif
}

/* ---- tokenizer --------------------------------------------------------------------------------------------------- */

enum { TOKENIZER_MAGIC = 20240328 };

/* Token i is the bytes text[start[i]] to text[start[i + 1]]. Without a table, tokens print as numbers. */
static struct {
    int size, end_of_text;
    char *text;
    int *start;
} tokenizer = { 0, V - 1, NULL, NULL };

static void load_tokenizer(const char *path) {
    int32_t header[HEADER_INTS];
    int64_t bytes;
    FILE *file = open_input(path, header, &bytes);
    if (header[0] != TOKENIZER_MAGIC) {
        die(1, "%s: not a tokenizer: its magic number is %d, not %d; name another file", path, header[0],
            TOKENIZER_MAGIC);
    }
    if (header[1] != 1 && header[1] != 2) {
        die(1, "%s: a tokenizer of version %d, but 1 or 2 is expected; export it again", path, header[1]);
    }
    if (header[2] < 0 || header[2] > V) {
        die(1, "%s: %d tokens, but vocab_size is %d; it belongs to another model", path, header[2], V);
    }
    tokenizer.size = header[2];
    tokenizer.end_of_text = header[1] == 1 ? 50256 : header[3];
    if (tokenizer.end_of_text < 0 || tokenizer.end_of_text >= V) {
        die(1, "%s: its end-of-text token %d is not below vocab_size %d", path, tokenizer.end_of_text, V);
    }
    if (bytes > 256 * (int64_t)tokenizer.size) die(1, "%s: longer than its header allows", path);
    tokenizer.text = (char *)allocate((size_t)bytes);
    tokenizer.start = (int *)allocate(((size_t)tokenizer.size + 1) * sizeof(int));
    tokenizer.start[0] = 0;
    for (int i = 0; i < tokenizer.size; i++) {
        unsigned char length;
        read_input(file, &length, 1, path);
        read_input(file, tokenizer.text + tokenizer.start[i], length, path);
        tokenizer.start[i + 1] = tokenizer.start[i] + length;
    }
    if (fgetc(file) != EOF) die(1, "%s: longer than its header allows", path);
    fclose(file);
    if (tokenizer.size < V) say("%s: names %d of %d tokens; the others print as numbers\n", path, tokenizer.size, V);
}

/* Control characters stay out of the terminal; a part of a UTF-8 character may pass, its rest comes with the next. */
static void print_text(const char *text, int length) {
    char shown[256];
    int n = 0;
    for (int i = 0; i < length; i++) {
        const unsigned char c = (unsigned char)text[i];
        if (c == '\n' || c == '\t' || (c >= 32 && c != 127)) shown[n++] = text[i];
    }
    say("%.*s", n, shown);
}

static void print_token(int token) {
    if (token < tokenizer.size) {
        print_text(tokenizer.text + tokenizer.start[token], tokenizer.start[token + 1] - tokenizer.start[token]);
        return;
    }
    say("%d ", token);
}

/* ---- sampler ----------------------------------------------------------------------------------------------------- */

enum { WINDOW = EVAL_TOKENS < MAXT ? EVAL_TOKENS : MAXT };

/* What samples go on from: (prompt_length) tokens, an end-of-text unless --prompt-tokens names others. */
static int prompt[WINDOW], prompt_length;

static void load_prompt(const char *path) {
    char word[16], *end;
    FILE *file = fopen(path, "r");
    if (!file) die(1, "%s: cannot be read: %s", path, strerror(errno));
    while (fscanf(file, "%15s", word) == 1) {
        const long long token = strtoll(word, &end, 10);
        if (*end || token < 0 || token >= V) die(1, "%s: '%s' is not a token id below %d", path, word, V);
        if (prompt_length == WINDOW) die(1, "%s: more than %d tokens; make it shorter", path, WINDOW);
        prompt[prompt_length++] = (int)token;
    }
    if (ferror(file)) die(1, "%s: cannot be read: %s", path, strerror(errno));
    if (prompt_length == 0) die(1, "%s: no token ids; write some, with spaces between", path);
    fclose(file);
}

/* Draws a token from softmax(logits / temperature), or takes the first largest; coin is uniform in [0, 1). */
static int draw_token(const float *logits, double temperature, double coin) {
    double sum = 0.0;
    int token = 0, best = 0;
    for (int i = 1; i < V; i++) best = logits[i] > logits[best] ? i : best;
    if (temperature == 0.0) return best;
    const float highest = logits[best];
    for (int i = 0; i < V; i++) sum += exp((double)(logits[i] - highest) / temperature);
    coin *= sum;
    while (token < V - 1 && (coin -= exp((double)(logits[token] - highest) / temperature)) >= 0.0) token++;
    return token;
}

/* Prints tokens drawn one by one after the prompt. The window grows, then slides: without a prompt at T, the farthest that
 * this training looks back, with one at what evaluate() can hold. */
static void print_sample(const Settings *s, int step) {
    static int tokens[WINDOW];
    if (prompt_length == 0) prompt[prompt_length++] = tokenizer.end_of_text;
    int window = T;
    if (s->prompt_tokens) window = WINDOW;
    int t = prompt_length;
    memcpy(tokens, prompt, (size_t)t * sizeof(int));
    say("sample at step %d:\n", step);
    for (int i = 0; i < s->sample_length && !stop_signal; i++) {
        const uint64_t counter = (uint64_t)step << 32 | (uint64_t)i;
        const double coin = (double)(random_bits((uint64_t)s->seed, SAMPLE_STREAM, counter) >> 11) * 0x1p-53;
        evaluate(tokens, tokens, 1, t, t - 1);  /* only the logits matter: any targets will do */
        const int token = draw_token(eval.logits, s->temperature, coin);
        print_token(token);
        if (t == window) memmove(tokens, tokens + 1, (size_t)(window - 1) * sizeof(int));
        else t++;
        tokens[t - 1] = token;
    }
    say("\n");
}

/* ---- checkpoints ------------------------------------------------------------------------------------------------- */

/* What changes from step to step beside the tensors. Random numbers have no state: they follow from --seed and counters. */
enum { RECENT = 128 };

typedef struct {
    double values[RECENT]; /* the last ones, in a ring */
    int64_t count;         /* of all there were */
} Recent;

typedef struct {
    int step;              /* optimizer steps taken */
    int64_t samples;       /* training samples taken */
    Recent losses, norms;
} Progress;

/* A checkpoint of step 40 in --log-dir is model_00000040.bin, the weights; state_00000040_00000.bin, all else that a run
 * needs to go on to the same bits; and, written last, DONE_00000040, the checksums of both. Names and state are llm.c's; of
 * the state's header the entries from 40 on are ours, and so are the recent losses and norms behind the moments. */
enum {
    STATE_MAGIC = 20240527,
    STATE_VERSION = 2,
    STATE_PROCESSES = 2,
    STATE_MASTER_WEIGHTS = 4,
    STATE_SHUFFLE = 5,
    STATE_STEP = 10,
    STATE_SEED = 20,
    STATE_SHARD = 30,
    STATE_SAMPLE = 32,
    STATE_SAMPLES = 40,
    STATE_LOSSES = 42,
    STATE_NORMS = 44,
    STATE_BATCH_SIZE = 46,
    STATE_SEQ_LEN = 48,
    STATE_TOTAL_BATCH_SIZE = 50,
    STATE_DATA_TOKENS = 52,
};
enum { MODEL, STATE, DONE, CHECKPOINT_FILES };

static char *checkpoint[CHECKPOINT_FILES];  /* the paths of the checkpoint in hand */

static void name_checkpoint(const char *folder, int step) {
    static const char *const before[] = { "model", "state", "DONE" }, *const behind[] = { ".bin", "_00000.bin", "" };
    for (int i = 0; i < CHECKPOINT_FILES; i++) {
        const size_t size = strlen(folder) + 40;
        free(checkpoint[i]);
        checkpoint[i] = (char *)allocate(size);
        snprintf(checkpoint[i], size, "%s/%s_%08d%s", folder, before[i], step, behind[i]);
    }
}

/* The latest step before another that has a checkpoint, whole or not; 0 if none has. */
static int latest_checkpoint(const char *folder, int before) {
    int latest = 0, step, end;
    DIR *entries = opendir(folder);
    if (!entries) die(1, "%s: cannot be read: %s", folder, strerror(errno));
    for (struct dirent *entry; (entry = readdir(entries)) != NULL;) {
        if (sscanf(entry->d_name, "DONE_%d%n", &step, &end) != 1 || entry->d_name[end]) continue;
        if (step > latest && step < before) latest = step;
    }
    closedir(entries);
    return latest;
}

/* The sum over a file's 64-bit words of their mixed bits, each with its place: no change of one word goes unseen.
 * A file that cannot be read has none: 0. */
static uint64_t checksum(const char *path) {
    static uint64_t words[1 << 13];
    uint64_t sum = 0, bytes = 0;
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    for (size_t got = sizeof words; got == sizeof words; bytes += got) {
        got = fread(words, 1, sizeof words, file);
        memset((char *)words + got, 0, sizeof words - got);
        for (size_t i = 0; i < (got + 7) / 8; i++) sum += mix_bits(words[i] ^ mix_bits(bytes / 8 + i));
    }
    const int failed = ferror(file);
    fclose(file);
    return failed ? 0 : sum + mix_bits(bytes);
}

/* Fills in the header's entries of 64 bits; or, of a header that was read, names the settings that have changed since. */
static void state_entries(int32_t header[HEADER_INTS], const Settings *s, Loader *data, const Progress *run, int was_read) {
    int64_t first, before;
    const Shard *shard = open_shard(data, training_sample(s, data, run->samples), &first);
    const struct { int at; int64_t value; const char *setting; } entries[] = {
        { STATE_SHARD, shard - data->shards, NULL },
        { STATE_SAMPLE, first / BT, NULL },
        { STATE_SAMPLES, run->samples, NULL },
        { STATE_LOSSES, run->losses.count, NULL },
        { STATE_NORMS, run->norms.count, NULL },
        { STATE_BATCH_SIZE, B, "--batch-size" },
        { STATE_SEQ_LEN, T, "--seq-len" },
        { STATE_TOTAL_BATCH_SIZE, s->total_batch_size, "--total-batch-size" },
        { STATE_SHUFFLE, s->shuffle, "--shuffle" },
        { STATE_SEED, s->seed, "--seed" },
        { STATE_DATA_TOKENS, data->num_samples * BT, "--train-data, in tokens," },
    };
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
        memcpy(&before, header + entries[i].at, sizeof before);
        if (!was_read) memcpy(header + entries[i].at, &entries[i].value, sizeof before);
        else if (entries[i].setting && before != entries[i].value) {
            say("%s was %lld and is %lld now\n", entries[i].setting, (long long)before, (long long)entries[i].value);
        }
    }
}

static void write_state(const char *path, const Settings *s, Loader *data, const Progress *run) {
    int32_t header[HEADER_INTS] = { STATE_MAGIC, STATE_VERSION };
    header[STATE_PROCESSES] = 1;
    header[STATE_STEP] = run->step;
    state_entries(header, s, data, run, 0);
    FILE *file = open_output(path);
    write_output(file, header, HEADER_BYTES);
    write_tensors(file, moment1_memory, 0);
    write_tensors(file, moment2_memory, 0);
    write_output(file, run->losses.values, sizeof run->losses.values);
    write_output(file, run->norms.values, sizeof run->norms.values);
    close_output(file);
}

static int64_t state_entry(const int32_t header[HEADER_INTS], int at) {
    int64_t value;
    memcpy(&value, header + at, sizeof value);
    return value;
}

static void read_state(const char *path, const Settings *s, Loader *data, Progress *run) {
    int32_t header[HEADER_INTS];
    int64_t bytes;
    FILE *file = open_input(path, header, &bytes);
    if (header[0] != STATE_MAGIC || header[1] != STATE_VERSION) {
        die(1, "%s: magic number %d and version %d, not %d and %d; another trainer wrote it", path, header[0], header[1],
            STATE_MAGIC, STATE_VERSION);
    }
    const int masters = header[STATE_MASTER_WEIGHTS];
    check_bytes(bytes, (masters ? 3 : 2) * 4 * count_parameters() + 2 * (int64_t)sizeof run->losses.values, path);
    read_tensors(file, moment1_memory, 0, path);
    read_tensors(file, moment2_memory, 0, path);
    if (masters) read_tensors(file, params_memory, 0, path);  /* what a model in bf16 was rounded from */
    read_input(file, run->losses.values, sizeof run->losses.values, path);
    read_input(file, run->norms.values, sizeof run->norms.values, path);
    fclose(file);
    run->step = header[STATE_STEP];
    run->losses.count = state_entry(header, STATE_LOSSES);
    run->norms.count = state_entry(header, STATE_NORMS);
    const int64_t tokens = state_entry(header, STATE_BATCH_SIZE) * state_entry(header, STATE_SEQ_LEN);
    run->samples = state_entry(header, STATE_SAMPLES) * tokens / BT;  /* another micro-batch begins at the same token */
    state_entries(header, s, data, run, 1);
}

/* All but the latest few and the major ones go. DONE goes last: a removal that was cut short is taken up again. */
static void remove_old_checkpoints(const Settings *s) {
    int kept = 0;
    for (int step = INT_MAX; (step = latest_checkpoint(s->log_dir, step)) > 0;) {
        if (kept++ < s->checkpoint_keep || (s->checkpoint_major > 0 && step % s->checkpoint_major == 0)) continue;
        name_checkpoint(s->log_dir, step);
        for (int i = 0; i < CHECKPOINT_FILES; i++) unlink(checkpoint[i]);
    }
}

static void save_checkpoint(const Settings *s, Loader *data, const Progress *run) {
    name_checkpoint(s->log_dir, run->step);
    save_weights(checkpoint[MODEL], 0);
    companion_path = checkpoint[MODEL];
    write_state(checkpoint[STATE], s, data, run);
    FILE *file = open_output(checkpoint[DONE]);
    for (int i = MODEL; i <= STATE; i++) {
        if (fprintf(file, "%016" PRIx64 "\n", checksum(checkpoint[i])) < 0) die_writing(checkpoint[DONE]);
    }
    close_output(file);
    companion_path = NULL;
    say("saved checkpoint %d in %s\n", run->step, s->log_dir);
    if (s->checkpoint_keep > 0) remove_old_checkpoints(s);
}

/* Which file of the checkpoint in hand is not as it was written; NULL if none is. */
static const char *damaged_file(void) {
    uint64_t sums[2];
    FILE *file = fopen(checkpoint[DONE], "r");
    const int known = file && fscanf(file, "%" SCNx64 "%" SCNx64, &sums[MODEL], &sums[STATE]) == 2;
    if (file) fclose(file);
    if (!known) return checkpoint[DONE];
    if (checksum(checkpoint[MODEL]) != sums[MODEL]) return checkpoint[MODEL];
    return checksum(checkpoint[STATE]) != sums[STATE] ? checkpoint[STATE] : NULL;
}

/* Takes up the latest checkpoint that is whole; returns whether there is any. */
static int load_checkpoint(const Settings *s, Loader *data, Progress *run) {
    for (int step = latest_checkpoint(s->log_dir, INT_MAX); step > 0;) {
        name_checkpoint(s->log_dir, step);
        const char *damaged = damaged_file();
        if (!damaged) {
            load_weights(checkpoint[MODEL]);
            read_state(checkpoint[STATE], s, data, run);
            say("resumed after step %d from %s\n", run->step, checkpoint[STATE]);
            return 1;
        }
        step = latest_checkpoint(s->log_dir, step);
        if (step == 0) die(1, "%s is damaged or missing, and no other checkpoint is there; use another --log-dir", damaged);
        say("%s is damaged or missing: the checkpoint of step %d is used\n", damaged, step);
    }
    say("no checkpoint in %s: the run begins at its first step\n", s->log_dir);
    return 0;
}

/* ---- multiple choice: which of several endings does the model find likeliest? ------------------------------------ */

enum {
    EXAMPLES_MAGIC = 20240522,
    EXAMPLES_VERSION = 1,
    EXAMPLE_BEGIN = 65535,  /* stands before each example */
    MOST_TOKENS = EVAL_TOKENS < MAXT ? EVAL_TOKENS : MAXT,  /* of a context and an ending that evaluate takes */
};

/* All of a file behind its header, as uint16. An example is EXAMPLE_BEGIN, its length in bytes, its index, the number of the
 * right ending, the number of endings; then the context and each ending, as a length and so many tokens. */
static struct {
    uint16_t *values;
    int count;  /* examples */
} examples;

__attribute__((noreturn)) static void die_example(int example, const char *path, const char *what) {
    die(1, "%s: example %d: %s; export it again with this model's tokenizer", path, example, what);
}

static void load_examples(const char *path) {
    int32_t header[HEADER_INTS];
    int64_t bytes;
    FILE *file = open_input(path, header, &bytes);
    if (header[0] != EXAMPLES_MAGIC || header[1] != EXAMPLES_VERSION) {
        die(1, "%s: not an evaluation file: it begins with %d, version %d, not %d, version %d; name another", path, header[0],
            header[1], EXAMPLES_MAGIC, EXAMPLES_VERSION);
    }
    examples.values = (uint16_t *)allocate((size_t)bytes);
    examples.count = header[2];
    read_input(file, examples.values, (size_t)bytes, path);
    fclose(file);
    const uint16_t *end = examples.values + bytes / 2, *at = examples.values;
    for (int i = 0; i < examples.count; i++) {
        if (end - at < 6 || at[0] != EXAMPLE_BEGIN || at[1] / 2 > end - at) die_example(i, path, "the file is damaged");
        const uint16_t *next = at + at[1] / 2, endings = at[4];
        if (at[3] >= endings) die_example(i, path, "none of its endings is the right one");
        at += 5;
        for (int part = 0; part <= endings; part++) {
            const int tokens = at < next ? *at : 0;
            if (tokens == 0 || tokens >= next - at) die_example(i, path, "it has an empty part, or is damaged");
            if (part > 0 && tokens >= MOST_TOKENS) die_example(i, path, "an ending is longer than the model's sequences");
            for (int t = 1; t <= tokens; t++) {
                if (at[t] >= V) die_example(i, path, "it has a token that is not below vocab_size");
            }
            at += 1 + tokens;
        }
        if (at != next) die_example(i, path, "the file is damaged");
    }
    if (examples.count < 1 || at != end) die(1, "%s: its length is not what its header says; it is damaged", path);
    say("%s: %d examples\n", path, examples.count);
}

/* The mean loss of the tokens of an ending behind a context, which is cut at its beginning if both are too long. */
static double ending_loss(const uint16_t *context, const uint16_t *ending) {
    static int tokens[MOST_TOKENS];
    const int kept = context[0] + ending[0] <= MOST_TOKENS ? context[0] : MOST_TOKENS - ending[0], n = kept + ending[0];
    for (int t = 0; t < kept; t++) tokens[t] = context[1 + context[0] - kept + t];
    for (int t = 0; t < ending[0]; t++) tokens[kept + t] = ending[1 + t];
    const int *inputs = tokens;
    evaluate(inputs, inputs + 1, 1, n - 1, kept - 1);
    const float *losses = eval.losses;
    double sum = 0.0;
    for (int t = 0; t < ending[0]; t++) sum += (double)losses[t];
    return sum / ending[0];
}

/* In how many examples the right ending has the least mean loss; -1 after a signal. */
static int count_right_answers(void) {
    const uint16_t *example = examples.values;
    int right = 0;
    for (int i = 0; i < examples.count; i++, example += example[1] / 2) {
        const uint16_t *context = example + 5, *ending = context + 1 + context[0];
        double least_loss = INFINITY;
        int answer = 0;
        for (int e = 0; e < example[4]; e++, ending += 1 + ending[0]) {
            if (stop_signal) return -1;
            const double loss = ending_loss(context, ending);
            if (loss >= least_loss) continue;
            least_loss = loss;
            answer = e;
        }
        right += answer == example[3];
    }
    return right;
}

/* ---- training ---------------------------------------------------------------------------------------------------- */

static const double FLOPS_PER_TOKEN = 746264064; /* forward and backward; a multiply-add is 2 */

static FILE *metrics;       /* metrics.jsonl in --log-dir: one object a line, complete at any moment */
static char *metrics_path;
static int last_validated = -1, last_evaluated = -1; /* the last steps of which it has the figures */

/* Its lock keeps a second run out of the folder. */
static void open_metrics(const char *folder) {
    const size_t size = strlen(folder) + sizeof "/metrics.jsonl";
    struct flock lock;
    metrics_path = (char *)allocate(size);
    snprintf(metrics_path, size, "%s/metrics.jsonl", folder);
    const int descriptor = open(metrics_path, O_RDWR | O_CREAT | O_APPEND, 0666);
    if (descriptor < 0 || (metrics = fdopen(descriptor, "a+")) == NULL) die_writing(metrics_path);
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    if (is_device(metrics_path) || fcntl(descriptor, F_SETLK, &lock) == 0 || (errno != EACCES && errno != EAGAIN)) return;
    fcntl(descriptor, F_GETLK, &lock);
    die(1, "%s: process %d trains into this folder; name another --log-dir", metrics_path, (int)lock.l_pid);
}

/* Leaves the lines up to a step, but for one that was cut short; a run's later lines are yet to come. */
static void keep_metrics(int last_step) {
    char line[1024];
    int step;
    off_t end = 0;
    rewind(metrics);
    while (fgets(line, sizeof line, metrics) && strchr(line, '\n') && sscanf(line, "{\"step\": %d", &step) == 1) {
        if (step > last_step) break;
        if (strstr(line, "\"val_loss\"")) last_validated = step;
        if (strstr(line, "\"accuracy\"")) last_evaluated = step;
        end = ftello(metrics);
    }
    if (!is_device(metrics_path) && ftruncate(fileno(metrics), end) != 0) die_writing(metrics_path);
    fseeko(metrics, 0, SEEK_END);
}

__attribute__((format(printf, 1, 2))) static void log_metrics(const char *format, ...) {
    if (!metrics) return;
    va_list arguments;
    va_start(arguments, format);
    const int written = vfprintf(metrics, format, arguments);
    va_end(arguments);
    if (written < 0 || fflush(metrics) != 0) die_writing(metrics_path);
}

static void check_finite(float value, const char *what, int step) {
    if (is_finite(value)) return;
    die(1, "step %d: the %s is not finite; nothing was saved; try a smaller --lr, or other weights", step, what);
}

/* Of the (B, T) losses of a micro-batch. */
static double mean_loss(const float *losses) {
    double sum = 0.0;
    for (int i = 0; i < BT; i++) sum += (double)losses[i];
    return sum / BT;
}

/* Always the same batches, the first ones, so that the figures compare. */
static void validate(const Settings *s, Loader *data, int step) {
    const int64_t batches = s->val_steps < data->num_samples ? s->val_steps : data->num_samples;
    double loss = 0.0;
    for (int64_t i = 0; i < batches; i++) {
        if (stop_signal) return;
        const int *tokens = load_sample(data, i);
        evaluate(tokens, tokens + 1, B, T, 0);
        loss += mean_loss(eval.losses) / (double)batches;
    }
    check_finite((float)loss, "validation loss", step);
    say("val loss %.6f\n", loss);
    log_metrics("{\"step\": %d, \"val_loss\": %.9g}\n", step, loss);
}

static void answer_examples(int step) {
    const int right = count_right_answers();
    if (right < 0) return;
    say("accuracy %.4f (%d of %d)\n", (double)right / examples.count, right, examples.count);
    log_metrics("{\"step\": %d, \"accuracy\": %.9g}\n", step, (double)right / examples.count);
}

/* The rate of one of so many steps, counted from 1: a linear warmup, then down to final_lr_fraction of --lr. */
static double scheduled_rate(const Settings *s, int step, int steps) {
    const double top = s->learning_rate, fall = top - top * s->final_lr_fraction;
    if (strcmp(s->lr_schedule, "constant") == 0) return top;
    if (step <= s->warmup_steps) return top * step / s->warmup_steps;
    const double part = (double)(step - 1 - s->warmup_steps) / (steps - s->warmup_steps);
    if (strcmp(s->lr_schedule, "linear") == 0) return top - fall * part;
    if (strcmp(s->lr_schedule, "cosine") == 0) return top - fall * 0.5 * (1.0 - cos(3.141592653589793 * part));
    const double steady = 0.8 * steps; /* wsd: then by the root of what has passed */
    return step - 1 < steady ? top : top - fall * sqrt((step - 1 - steady) / (steps - steady));
}

/* How far a value lies above the mean of the last ones, itself among them, in standard deviations; 0 while they are few. */
static double z_score(Recent *recent, double value) {
    double mean = 0.0, variance = 0.0;
    recent->values[recent->count++ % RECENT] = value;
    if (recent->count <= RECENT) return 0.0;
    for (int i = 0; i < RECENT; i++) mean += recent->values[i] / RECENT;
    for (int i = 0; i < RECENT; i++) variance += (recent->values[i] - mean) * (recent->values[i] - mean) / RECENT;
    return variance > 0.0 ? (value - mean) / sqrt(variance) : 0.0;
}

/* Whether a value stands out so far that the step shall not change the weights; limit 0 is never. */
static int is_outlier(Recent *recent, double value, double limit, const char *what, int step) {
    const double z = z_score(recent, value);
    if (limit == 0.0 || z <= limit) return 0;
    say("step %d: no update: the %s is %.1f standard deviations above those before\n", step, what, z);
    return 1;
}

/* One optimizer step over total_batch_size tokens. */
static void train_step(const Settings *s, Loader *data, Progress *run, int steps) {
    const int micro_batches = s->total_batch_size / BT, step = run->step + 1; /* counted from 1 */
    const double start = seconds(), learning_rate = scheduled_rate(s, step, steps);
    double loss = 0.0;
    for (int micro = 0; micro < micro_batches; micro++) {
        const int *tokens = load_sample(data, training_sample(s, data, run->samples++));
        prefetch_sample(data, training_sample(s, data, run->samples));
        forward_backward(tokens, tokens + 1, 1.0f / (float)s->total_batch_size, micro);
        loss += mean_loss(acts.losses) / micro_batches;
    }
    check_finite((float)loss, "loss", step);
    const double norm = gradient_norm();
    check_finite((float)norm, "norm of the gradients", step);
    const int outlier_loss = is_outlier(&run->losses, loss, s->skip_loss_z, "loss", step);
    const int outlier_norm = is_outlier(&run->norms, norm, s->skip_norm_z, "norm of the gradients", step);
    if (!outlier_loss && !outlier_norm) update(s, norm, (float)learning_rate, step);
    run->step = step;
    const double taken = seconds() - start, tokens_per_second = s->total_batch_size / taken;
    say("step %d/%d | loss %.6f | norm %.4f | lr %.2e | %.1f ms | %.0f tok/s\n", step, steps, loss, norm,
        learning_rate, 1e3 * taken, tokens_per_second);
    log_metrics("{\"step\": %d, \"loss\": %.9g, \"grad_norm\": %.9g, \"lr\": %.9g, \"ms\": %.9g, "
                "\"tokens_per_second\": %.9g, \"flops_per_second\": %.9g, \"memory\": %zu}\n", step, loss, norm,
                learning_rate, 1e3 * taken, tokens_per_second, tokens_per_second * FLOPS_PER_TOKEN, model_bytes);
}

/* Every n-th step and the last; n = 0 is never. */
static int is_due(int step, int n, int last) { return n > 0 && (step % n == 0 || step == last); }

/* Up to so many steps in all, or to a signal. A step that was resumed had its sample and its checkpoint. */
static void train(const Settings *s, Loader *train_data, Loader *val_data, Progress *run, int steps) {
    for (const int first = run->step;; train_step(s, train_data, run, steps)) {
        const int step = run->step, is_new = step == 0 || step > first;
        const int val_due = is_due(step, s->val_every, steps);
        if (val_due && val_data && s->val_steps > 0 && step > last_validated) validate(s, val_data, step);
        if (val_due && s->eval_data && step > last_evaluated) answer_examples(step);
        const int sample_due = steps == 0 || (step > 0 && is_due(step, s->sample_every, steps));
        if (is_new && sample_due && !stop_signal) print_sample(s, step);
        if (step > first && s->checkpoint_every > 0 && (is_due(step, s->checkpoint_every, steps) || stop_signal)) {
            fsync(fileno(metrics));
            save_checkpoint(s, train_data, run);
        }
        if (step >= steps || stop_signal) return;
    }
}

static int steps_of_an_epoch(const Settings *s, const Loader *data) {
    const int64_t steps = data->num_samples * BT / s->total_batch_size;
    if (steps == 0) {
        die(1, "--train-data: an epoch of %lld x %d tokens is shorter than a step of %d; lower --total-batch-size",
            (long long)data->num_samples, BT, s->total_batch_size);
    }
    return steps < INT_MAX ? (int)steps : INT_MAX;
}

/* ---- debug state: one forward and backward, for other programs to compare with ----------------------------------- */

enum { DEBUG_STATE_MAGIC = 20240327, DEBUG_STATE_VERSION = 2 };

/* Header, inputs, targets, logits (B, T, V) of sample 0; then loss and gradients of the whole first step. */
static void write_debug_state(const Settings *s, Loader *data) {
    const int32_t header[HEADER_INTS] = { DEBUG_STATE_MAGIC, DEBUG_STATE_VERSION, B, T };
    const int micro_batches = s->total_batch_size / BT;
    double loss = 0.0;
    FILE *file = open_output(s->debug_state);
    write_output(file, header, HEADER_BYTES);
    for (int micro = 0; micro < micro_batches; micro++) {
        const int *tokens = load_sample(data, micro);
        if (micro == 0) {
            write_output(file, tokens, BT * sizeof(int));
            write_output(file, tokens + 1, BT * sizeof(int));
            logits_file = file;
        }
        forward_backward(tokens, tokens + 1, 1.0f / (float)s->total_batch_size, micro);
        logits_file = NULL;
        loss += mean_loss(acts.losses) / micro_batches;
    }
    const float step_loss = (float)loss;
    write_output(file, &step_loss, sizeof step_loss);
    write_tensors(file, grads_memory, 0);
    close_output(file);
    say("loss %.6f\nsaved %s\n", loss, s->debug_state);
}

/* ---- arguments --------------------------------------------------------------------------------------------------- */

enum FlagKind { TEXT, INTEGER, SWITCH, REAL };

typedef struct {
    const char *name, *short_name, *metavar;
    enum FlagKind kind;
    size_t field;        /* where in Settings */
    double minimum;
    const char *help;
} Flag;

static const Settings default_settings = {
    .save_dtype = "fp32", .lr_schedule = "cosine", .steps = -1, .total_batch_size = 256, .batch_size = 4, .seq_len = 64,
    .warmup_steps = 0, .val_every = 20, .val_steps = 20, .sample_every = 0, .sample_length = 64, .seed = 1337,
    .checkpoint_every = 0, .checkpoint_keep = 0, .checkpoint_major = 0, .shuffle = 0, .overfit_batch = 0, .resume = 0,
    .learning_rate = 0.0003, .final_lr_fraction = 1.0, .weight_decay = 0.0, .beta1 = 0.9, .beta2 = 0.95,
    .epsilon = 1e-08, .grad_clip = 1.0, .temperature = 1.0, .skip_loss_z = 0.0, .skip_norm_z = 0.0,
};

static const Flag flags[] = {
    { "--load", "-e", "FILE", TEXT, offsetof(Settings, load), 0,
      "weights to begin with, fp32 or bf16; without it they come from --seed" },
    { "--save", "", "FILE", TEXT, offsetof(Settings, save), 0, "where the final model goes" },
    { "--save-dtype", "", "TYPE", TEXT, offsetof(Settings, save_dtype), 0, "fp32 or bf16, for --save" },
    { "--train-data", "-i", "GLOB", TEXT, offsetof(Settings, train_data), 0,
      "token shards to train on, taken in order" },
    { "--val-data", "-j", "GLOB", TEXT, offsetof(Settings, val_data), 0, "token shards to validate on" },
    { "--eval-data", "", "FILE", TEXT, offsetof(Settings, eval_data), 0,
      "multiple-choice examples to answer whenever it validates" },
    { "--tokenizer", "", "FILE", TEXT, offsetof(Settings, tokenizer), 0,
      "table of the tokens' texts, to print samples" },
    { "--log-dir", "-o", "DIR", TEXT, offsetof(Settings, log_dir), 0,
      "made if need be; gets metrics.jsonl and checkpoints" },
    { "--steps", "-x", "N", INTEGER, offsetof(Settings, steps), -1,
      "optimizer steps; -1 is one epoch, 0 trains nothing" },
    { "--total-batch-size", "-d", "N", INTEGER, offsetof(Settings, total_batch_size), 0,
      "tokens in an optimizer step: whole micro-batches" },
    { "--batch-size", "-b", "N", INTEGER, offsetof(Settings, batch_size), 1,
      "sequences in a micro-batch: fixed when the program is built" },
    { "--seq-len", "-t", "N", INTEGER, offsetof(Settings, seq_len), 1,
      "tokens in a sequence: fixed when the program is built" },
    { "--lr", "-l", "X", REAL, offsetof(Settings, learning_rate), 0, "learning rate" },
    { "--lr-schedule", "-k", "NAME", TEXT, offsetof(Settings, lr_schedule), 0,
      "constant, linear, cosine or wsd: how the rate falls" },
    { "--warmup-steps", "-u", "N", INTEGER, offsetof(Settings, warmup_steps), 0,
      "steps in which the rate rises from 0" },
    { "--final-lr-fraction", "-q", "X", REAL, offsetof(Settings, final_lr_fraction), 0,
      "the rate of the last step, as a part of --lr" },
    { "--weight-decay", "-c", "X", REAL, offsetof(Settings, weight_decay), 0,
      "decay of the tensors of rank 2 and more, embeddings included" },
    { "--beta1", "", "X", REAL, offsetof(Settings, beta1), 0, "AdamW: memory of the mean of the gradients" },
    { "--beta2", "", "X", REAL, offsetof(Settings, beta2), 0, "AdamW: memory of their squares" },
    { "--epsilon", "", "X", REAL, offsetof(Settings, epsilon), 0, "AdamW: added to the root of their squares" },
    { "--grad-clip", "", "X", REAL, offsetof(Settings, grad_clip), 0, "largest norm of the gradients; 0 is off" },
    { "--val-every", "-v", "N", INTEGER, offsetof(Settings, val_every), 0,
      "validate every N steps, at the first and the last; 0 is never" },
    { "--val-steps", "-m", "N", INTEGER, offsetof(Settings, val_steps), 0,
      "batches in a validation, always the same ones" },
    { "--sample-every", "-s", "N", INTEGER, offsetof(Settings, sample_every), 0,
      "print a sample every N steps and at the last; 0 is never" },
    { "--sample-length", "-g", "N", INTEGER, offsetof(Settings, sample_length), 0, "tokens in a sample" },
    { "--prompt-tokens", "", "FILE", TEXT, offsetof(Settings, prompt_tokens), 0,
      "token ids, as numbers with spaces between, that samples go on from" },
    { "--temperature", "", "X", REAL, offsetof(Settings, temperature), 0,
      "of samples; 0 takes the most probable token" },
    { "--shuffle", "", "0|1", SWITCH, offsetof(Settings, shuffle), 0,
      "take the training data in an order of its own each epoch, by --seed" },
    { "--seed", "", "N", INTEGER, offsetof(Settings, seed), 0, "of the first weights, the samples and the shuffling" },
    { "--overfit-batch", "-a", "0|1", SWITCH, offsetof(Settings, overfit_batch), 0,
      "train on the first batch again and again" },
    { "--checkpoint-every", "-n", "N", INTEGER, offsetof(Settings, checkpoint_every), 0,
      "write a checkpoint to --log-dir every N steps and at the end; 0 is never" },
    { "--checkpoint-keep", "-nk", "K", INTEGER, offsetof(Settings, checkpoint_keep), 0,
      "keep the latest K checkpoints; 0 keeps all" },
    { "--checkpoint-major", "-nm", "N", INTEGER, offsetof(Settings, checkpoint_major), 0,
      "keep those of every N-th step for good; 0 is none" },
    { "--resume", "-y", "0|1", SWITCH, offsetof(Settings, resume), 0,
      "go on from the latest checkpoint in --log-dir, if there is one" },
    { "--skip-loss-z", "-sl", "X", REAL, offsetof(Settings, skip_loss_z), 0,
      "no update where the loss is X deviations above the last 128; 0 is off" },
    { "--skip-norm-z", "-sg", "X", REAL, offsetof(Settings, skip_norm_z), 0, "the same for the norm of the gradients" },
    { "--debug-state", "", "FILE", TEXT, offsetof(Settings, debug_state), 0,
      "write logits, loss and gradients of the first step here; train nothing" },
};
enum { NUM_FLAGS = sizeof flags / sizeof flags[0] };

static const char version[] = "gpt2-124m, configuration 72536e43";

static void print_help(void) {
    say("usage: train_gpt2 [flags]\n\nBuilt for %s, in batches of %d x %d tokens.\n\n", version, B, T);
    for (int i = 0; i < NUM_FLAGS; i++) {
        const void *field = (const char *)&default_settings + flags[i].field;
        say("  %-3s %s %-*s %s", flags[i].short_name, flags[i].name, 22 - (int)strlen(flags[i].name), flags[i].metavar,
            flags[i].help);
        if (flags[i].kind == INTEGER || flags[i].kind == SWITCH) say(" (default %d)\n", *(const int *)field);
        else if (flags[i].kind == REAL) say(" (default %g)\n", *(const double *)field);
        else say(" (default %s)\n", *(const char *const *)field ? *(const char *const *)field : "none");
    }
    say("  -h  --help                  print this\n      --version               print what this is built for\n");
}

/* A value of another type is a wrong use of the flag, status 2; a value that cannot work is status 1. */
static void set_flag(Settings *s, const Flag *flag, const char *value) {
    void *field = (char *)s + flag->field;
    char *end;
    errno = 0;
    if (flag->kind == TEXT) {
        *(const char **)field = value;
    } else if (flag->kind == SWITCH) {
        if (strcmp(value, "0") != 0 && strcmp(value, "1") != 0) die(2, "%s '%s' is neither 0 nor 1", flag->name, value);
        *(int *)field = value[0] == '1';
    } else if (flag->kind == INTEGER) {
        const long long n = strtoll(value, &end, 10);
        if (end == value || *end) die(2, "%s '%s' is not a whole number", flag->name, value);
        if (errno == ERANGE || n > INT_MAX) die(1, "%s %s is too large; at most %d", flag->name, value, INT_MAX);
        if ((double)n < flag->minimum) die(1, "%s %s is too small; at least %g", flag->name, value, flag->minimum);
        *(int *)field = (int)n;
    } else {
        const double x = strtod(value, &end);
        if (end == value || *end) die(2, "%s '%s' is not a number", flag->name, value);
        if (!is_finite((float)x)) die(1, "%s %s is not finite", flag->name, value);
        if (x < flag->minimum) die(1, "%s %s is too small; at least %g", flag->name, value, flag->minimum);
        *(double *)field = x;
    }
}

/* What llm.c chooses at run time and this program was built with. */
static void refuse_fixed(const char *name) {
    static const char *const fixed[] = { "-f", "-w", "-ge", "-z", "-r" };
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++) {
        if (strcmp(name, fixed[i]) == 0) die(1, "%s is fixed when the program is built; leave it out", name);
    }
}

static void check_settings(const Settings *s) {
    if (s->batch_size != B || s->seq_len != T) {
        die(1, "-b %d -t %d: this program is built for -b %d -t %d; make another with llmgen build", s->batch_size,
            s->seq_len, B, T);
    }
    if ((float)s->beta1 >= 1.0f || (float)s->beta2 >= 1.0f) die(1, "--beta1 and --beta2 must be below 1");
    if ((float)s->epsilon <= 0.0f) die(1, "--epsilon must be above 0");
    if (s->total_batch_size == 0 || s->total_batch_size % BT != 0) {
        die(1, "--total-batch-size %d is not a multiple of the %d tokens of a micro-batch; %d would work",
            s->total_batch_size, BT, s->total_batch_size < BT ? BT : s->total_batch_size / BT * BT);
    }
    static const char *const schedules[] = { "constant", "linear", "cosine", "wsd" };
    int known = 0;
    for (int i = 0; i < 4; i++) known |= strcmp(s->lr_schedule, schedules[i]) == 0;
    if (!known) die(1, "--lr-schedule '%s' is not known; use constant, linear, cosine or wsd", s->lr_schedule);
    if (s->final_lr_fraction > 1.0) die(1, "--final-lr-fraction %g must be from 0 to 1", s->final_lr_fraction);
    if (strcmp(s->save_dtype, "fp32") != 0 && strcmp(s->save_dtype, "bf16") != 0) {
        die(1, "--save-dtype '%s' is neither fp32 nor bf16", s->save_dtype);
    }
    if ((s->resume || s->checkpoint_every > 0) && !s->log_dir) {
        die(2, "--log-dir is missing: checkpoints are written there, and read with --resume");
    }
    if (!s->train_data && (s->debug_state || s->resume || s->steps != 0)) {
        die(2, "--train-data is missing: name token shards, or give --steps 0 to train nothing");
    }
}

static Settings parse_arguments(int argc, char **argv) {
    Settings settings = default_settings;
    for (int i = 1; i < argc; i++) {
        const char *argument = argv[i], *equals = strncmp(argument, "--", 2) == 0 ? strchr(argument, '=') : NULL;
        const size_t length = equals ? (size_t)(equals - argument) : strlen(argument);
        const char *value = equals ? equals + 1 : i + 1 < argc ? argv[i + 1] : NULL;
        const Flag *flag = NULL;
        if (strcmp(argument, "-h") == 0 || strcmp(argument, "--help") == 0) {
            print_help();
            exit(0);
        }
        if (strcmp(argument, "--version") == 0) {
            say("train_gpt2: %s\n", version);
            exit(0);
        }
        if (argument[0] != '-') die(2, "'%s' is not expected here; --help lists the flags", argument);
        for (int f = 0; f < NUM_FLAGS && !flag; f++) {
            const int is_long = strlen(flags[f].name) == length && strncmp(argument, flags[f].name, length) == 0;
            if (is_long || strcmp(argument, flags[f].short_name) == 0) flag = &flags[f];
        }
        if (!flag) refuse_fixed(argument);
        if (!flag) die(2, "unknown flag '%s'; --help lists the flags", argument);
        const int is_number = value && (strcmp(value, "0") == 0 || strcmp(value, "1") == 0);
        if (flag->kind == SWITCH && !equals && !is_number) {
            set_flag(&settings, flag, "1");
            continue;
        }
        if (!value || !*value || (!equals && strncmp(value, "--", 2) == 0)) die(2, "%s needs a value", argument);
        set_flag(&settings, flag, value);
        if (!equals) i++;
    }
    check_settings(&settings);
    return settings;
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    handle_signals();
    const Settings settings = parse_arguments(argc, argv);
    const Settings *s = &settings;
    static Loader train_data, val_data;
    static Progress run;
#ifdef _OPENMP
    num_threads = omp_get_max_threads();
    say("threads: %d\n", num_threads);
#else
    num_threads = 1;
    say("threads: 1 (compiled without OpenMP: add -fopenmp to use every core)\n");
#endif

    /* Whatever can be wrong with files shows before the long work begins. */
    if (s->train_data) train_data = open_data("--train-data", s->train_data);
    if (s->val_data) val_data = open_data("--val-data", s->val_data);
    if (s->eval_data) load_examples(s->eval_data);
    if (s->tokenizer) load_tokenizer(s->tokenizer);
    if (s->prompt_tokens) load_prompt(s->prompt_tokens);
    if (s->log_dir) make_folder(s->log_dir);
    if (s->log_dir && !s->debug_state) open_metrics(s->log_dir);
    if (s->debug_state) prove_writable(s->debug_state);
    else if (s->save) prove_writable(s->save);
    if (metrics && !s->resume && latest_checkpoint(s->log_dir, INT_MAX) > 0) {
        die(1, "%s holds checkpoints of an earlier run; go on with --resume 1 or name another --log-dir", s->log_dir);
    }
    int steps = s->steps;
    if (steps < 0 && !s->debug_state) steps = steps_of_an_epoch(s, &train_data);

    allocate_model();
    say("memory: %zu bytes\n", model_bytes);
    if (s->resume && load_checkpoint(s, &train_data, &run)) {
        if (steps >= 0 && run.step > steps) die(1, "--steps %d: the run has taken %d already; ask for more", steps, run.step);
    } else if (s->load) {
        load_weights(s->load);
    } else {
        initialise_weights((uint64_t)s->seed);
    }
    if (s->debug_state) {
        write_debug_state(s, &train_data);
        return 0;
    }
    if (metrics) keep_metrics(run.step > 0 ? run.step : -1);
    train(s, &train_data, s->val_data ? &val_data : NULL, &run, steps);
    if (stop_signal) say("stopped after step %d\n", run.step);
    if (s->save && (run.step > 0 || steps == 0)) {
        save_weights(s->save, strcmp(s->save_dtype, "bf16") == 0);
        say("saved %s\n", s->save);
    }
    return stop_signal ? 128 + stop_signal : 0;
}
