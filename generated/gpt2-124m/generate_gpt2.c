/* generate_gpt2.c: generates text with GPT-2 (12 layers, 12 heads, 768 channels, 50257 tokens) on a CPU, in float32.
 *
 * Written by llmgen from the configuration gpt2-124m (hash 1f9aacff):
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
 * It is yours, free of any condition. It needs a C compiler and the C library, nothing else.
 * Compile:  gcc -O3 -std=gnu11 -march=x86-64-v3 -fopenmp generate_gpt2.c -lm -o generate_gpt2
 * Run:      ./generate_gpt2 --load model.bin --tokenizer tokenizer.bin --prompt "Once upon a time"
 * Options:  ./generate_gpt2 --help
 *
 * Memory in bytes:
 *       497,903,616  parameters
 *        75,497,472  keys and values of each sequence
 *         9,437,184  activations
 *           789,504  scratch for each thread
 *
 * Contents: sizes, tensors, basics, vectors, matrix products, layers, the model, weights, tokenizer, encoder, sampling,
 * generation, arguments, main.
 */
#define _XOPEN_SOURCE 700 /* POSIX 2008, and realpath() */
#define _DEFAULT_SOURCE   /* madvise(), where there is one */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
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
    L = 12,                   /* layers */
    NH = 12,                  /* attention heads */
    HS = 64,                  /* channels of a head */
    C = 768,                  /* channels: NH * HS */
    V = 50257,                /* tokens in the vocabulary */
    VP = 50304,               /* V rounded up to a multiple of 128; the rows past V stay zero */
    MAXT = 1024,              /* longest sequence the position embeddings reach */
    CONTEXT = 1024,           /* tokens of a sequence, prompt included */
    CACHE = 1024,             /* the same, in the cache: rounded up to whole registers */
    PIECE = 512,              /* tokens that decode takes at most: a longer prompt goes in several pieces */
    SEQUENCES = 16,           /* sequences that are generated side by side, at most */
    W = 8,                    /* floats in a vector register */
    MR = 6,                   /* rows of the register tile */
    NV = 2,                   /* vectors in a row of it */
    NR = 16,                  /* columns of it: NV * W */
    KC = 512,                 /* summed at a time: MR rows of the left operand take 12 KiB of L1 */
    NC = 192,                 /* columns packed at a time: KC x NC takes 384 KiB of L2 */
    MC = 252,                 /* rows of a block of out */
    SHORT_PANEL = 8192,       /* floats of a panel that stays in L1 while the rows go by */
    PACKING = 32,             /* packing one value takes as long as so many multiply-adds */
    FEW_ROWS = 16,            /* up to so many rows, a product reads its weight where it lies */
    TEAM_PRODUCTS = 262144,   /* multiply-adds that are worth waking the other threads for */
    TEAM_VALUES = 8192,       /* the same for values that are computed one by one */
    QUERIES = 4,              /* tokens that attention answers together */
    THREAD_SCRATCH = 197376,  /* floats of a thread: packed operands, or attention's scores */
};
static const size_t CACHED_VALUES = 18874368; /* floats of a sequence in the cache */
static const float NORM_EPSILON = 1e-05f; /* added to the variance in a norm */

/* ---- tensors: one allocation for each kind of memory; all offsets are computed by llmgen ------------------------- */

/* One pointer for each tensor, to its first layer. */
static struct {
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
} params;

/* Keys and values of the tokens that were decoded. A sequence has all of this; the next follows CACHED_VALUES further on. */
static struct {
    float *keys;    /* (L, NH, CACHE, HS) */
    float *values;  /* (L, NH, CACHE, HS) */
} cache;

/* What decode computes, for n tokens, and m rows of logits. */
static struct {
    float *residual;   /* (n, C) */
    float *ln1;        /* (n, C) */
    float *ln1_mean;   /* (n) */
    float *ln1_rstd;   /* (n) */
    float *qkv;        /* (n, 3*C) */
    float *attention;  /* (n, C) */
    float *ln2;        /* (n, C) */
    float *ln2_mean;   /* (n) */
    float *ln2_rstd;   /* (n) */
    float *gelu;       /* (n, 4*C) */
    float *lnf;        /* (n, C) */
    float *lnf_mean;   /* (n) */
    float *lnf_rstd;   /* (n) */
    float *selected;   /* (m, C) */
    float *logits;     /* (m, VP) */
} acts;

/* The parameters in the order of the files. A file holds them back to back; in memory every layer of every tensor starts
 * at a multiple of 64 bytes. */
typedef struct {
    float **tensor;
    size_t offset, stride; /* of the first layer, and from one layer to the next, in floats */
    size_t count;          /* floats of a layer */
    int layers;
} TensorRow;

static const TensorRow parameter_table[] = {
    { &params.wte, 0, 38633472, 38633472, 1 },
    { &params.wpe, 38633472, 786432, 786432, 1 },
    { &params.ln1w, 39419904, 768, 768, 12 },
    { &params.ln1b, 39429120, 768, 768, 12 },
    { &params.qkvw, 39438336, 1769472, 1769472, 12 },
    { &params.qkvb, 60672000, 2304, 2304, 12 },
    { &params.attprojw, 60699648, 589824, 589824, 12 },
    { &params.attprojb, 67777536, 768, 768, 12 },
    { &params.ln2w, 67786752, 768, 768, 12 },
    { &params.ln2b, 67795968, 768, 768, 12 },
    { &params.fcw, 67805184, 2359296, 2359296, 12 },
    { &params.fcb, 96116736, 3072, 3072, 12 },
    { &params.fcprojw, 96153600, 2359296, 2359296, 12 },
    { &params.fcprojb, 124465152, 768, 768, 12 },
    { &params.lnfw, 124474368, 768, 768, 1 },
    { &params.lnfb, 124475136, 768, 768, 1 },
};
enum { NUM_TENSORS = sizeof parameter_table / sizeof parameter_table[0] };

static float *params_memory;
static int num_threads;
static float *thread_scratch; /* (num_threads, THREAD_SCRATCH) */

/* ---- basics: errors, output, memory, time, random numbers, signals ----------------------------------------------- */

/* Ends the program with one line on stderr: what is wrong, where, what to do. */
__attribute__((noreturn, format(printf, 2, 3))) static void die(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "generate_gpt2: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
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
        die(1, "out of memory: %zu bytes were refused after %zu; give fewer prompts at a time",
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

enum { SAMPLE_STREAM = 1 };  /* as in the program that trains */

/* The first Ctrl-C or SIGTERM ends the texts where they are; the second ends the program at once. */
static volatile sig_atomic_t stop_signal;

static void handle_stop(int signal_number) {
    if (stop_signal) _exit(128 + signal_number);
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
    const char **items;
    int count;
} Texts;

typedef struct {
    const char *load, *tokenizer, *prompts, *prompt_tokens, *encode;
    Texts prompt;
    int tokens, top_k, seed, batch;
    int stop, quiet;
    double temperature, top_p;
} Settings;

/* ---- files ------------------------------------------------------------------------------------------------------- */

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

/* ---- matrix products ------------------------------------------------------------------------------------------------
 *
 *   out (n, oc) = inp (n, c) . weight (oc, c)^T   + bias, + addend, then gelu
 *
 * Each operand is a stack of lanes (rows of inp, rows of the weight) indexed by the summation index k. The right operand,
 * the weight, is packed: a strip of it is copied into panels of NR lanes with k running slowest, so that the innermost
 * loop reads it front to back. The left one is read where it lies, a row for each line of the tile.
 *
 *   level      holds                                         constants
 *   registers  a tile of out: MR x NR sums                   MR, NR = NV * W
 *   L1         MR rows of the left operand: MR x KC          KC
 *   L2         a strip of the right operand: KC x NC         NC
 *   L3         a block of out and of the left: MC rows       MC
 *
 * Tiles follow one another along the rows of out, so that out is written front to back.
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

/* Fills the panels of the right operand, from the one that begins at lane first: panels[lane / NR][k][lane % NR]. A panel
 * takes stride floats: a bit more than it holds, since panels a power of two apart would share sets of the cache. */
static void pack_right(float *panels, size_t stride, Operand b, int lanes, int k) {
    for (int lane = 0; lane < lanes; lane += NR, panels += stride)
        pack_transposed(panels, b.data + (size_t)lane * b.lane, b.lane, least(NR, lanes - lane), k);
}

typedef struct { /* what is done to out while it is at hand; NULL is none */
    const float *bias;   /* (n)     added to every row */
    const float *addend; /* (m, n)  added to every element; may be out */
    float *gelu;         /* (m, n)  receives gelu(out) */
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
        float *packed_b = thread_scratch + (size_t)thread_number() * THREAD_SCRATCH;
        const int top = cut(m, MR, parts_m, part % parts_m), bottom = cut(m, MR, parts_m, part % parts_m + 1);
        const int first = cut(n, NR, parts_n, part / parts_m), last = cut(n, NR, parts_n, part / parts_m + 1);
        const int depths = parts_of(k, KC), deepest = parts_of(parts_of(k, 8), depths) * 8;
        const size_t panel_b = (size_t)deepest * NR + 16;
        const int strips = parts_of(last - first, NC), blocks = parts_of(bottom - top, MC);
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
                    const Operand rows = {a.data + (size_t)begin * a.lane + (size_t)k0 * a.step, a.lane, a.step};
                    const size_t panel = MR * a.lane;
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

/* ---- position embedding: out[i] = inp[i] + wpe[positions[i]] ----------------------------------------------------- */

static void position_embedding_forward(float *out,                          /* (n, c); may be inp */
                                       const float *inp, const float *wpe, /* (n, c), (MAXT, c) */
                                       const int *positions, int n, int c) { /* (n) */
#pragma omp parallel for if ((size_t)n * (size_t)c > TEAM_VALUES)
    for (int row = 0; row < n; row++) {
        float *o = out + (size_t)row * (size_t)c;
        const float *x = inp + (size_t)row * (size_t)c, *p = wpe + (size_t)positions[row] * (size_t)c;
        for (int i = 0; i < c; i += W) store_upto(o + i, load_upto(x + i, c - i) + load_upto(p + i, c - i), c - i);
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

/* ---- attention with a cache: each token looks back at its sequence, whose keys and values are kept ------------------
 *
 * Of each sequence, layer and head: keys (CACHE / W, HS, W), so that a register holds one channel of W keys, and values
 * (CACHE, HS). From one sequence to the next are CACHED_VALUES floats. What no token has written yet is finite.
 */

/* Puts the keys and values of n tokens where they stand: token i at positions[i] of sequence sequences[i]. */
static void cache_append(float *keys, float *values, /* of this layer, in the first sequence */
                         const float *qkv,           /* (n, 3*C) */
                         const int *sequences, const int *positions, int n) { /* (n), (n) */
#pragma omp parallel for if ((size_t)n * 3 * C > TEAM_VALUES)
    for (int row = 0; row < n; row++) {
        const float *k = qkv + (size_t)row * 3 * C + C;
        const size_t position = (size_t)positions[row];
        for (int head = 0; head < NH; head++, k += HS) {
            const size_t at = (size_t)sequences[row] * CACHED_VALUES + (size_t)head * CACHE * HS;
            float *key = keys + at + position / W * W * HS + position % W;
            for (size_t c = 0; c < HS; c++) key[c * W] = k[c];
            memcpy(values + at + position * HS, k + NH * HS, HS * sizeof(float));
        }
    }
}

/* scores (rows, CACHE) = q . k for the keys from begin to end, multiples of 2 * W. Queries lie ld floats apart; where there
 * are fewer than QUERIES, the last one is computed several times. */
static void score_keys(float *scores, const float *q, size_t ld, int rows, const float *keys, int begin, int end) {
    const float *query[QUERIES];
    for (int i = 0; i < QUERIES; i++) query[i] = q + (size_t)least(i, rows - 1) * ld;
    for (int j = begin; j < end; j += 2 * W) {
        const float *k = keys + (size_t)j * HS;
        vec left[QUERIES] = {0}, right[QUERIES] = {0};
        for (int c = 0; c < HS; c++) {
            const vec a = load(k + c * W), b = load(k + (HS + c) * W);
#pragma GCC unroll 4
            for (int i = 0; i < QUERIES; i++) {
                left[i] += query[i][c] * a;
                right[i] += query[i][c] * b;
            }
        }
        for (int i = 0; i < rows; i++) {
            store(scores + (size_t)i * CACHE + j, left[i]);
            store(scores + (size_t)i * CACHE + j + W, right[i]);
        }
    }
}

/* The scores from begin to end become probabilities: 0 before `first` and behind `last`. */
static void softmax_scores(float *scores, float scale, int begin, int first, int last, int end) {
    for (int j = begin; j < end; j += W) store(scores + j, load(scores + j) * scale);
    for (int j = begin; j < first; j++) scores[j] = -1e30f; /* finite, so that no fast-math flag can spoil it */
    for (int j = last + 1; j < end; j++) scores[j] = -1e30f;
    vec most = load(scores + begin), sum = {0};
    for (int j = begin; j < end; j += W) most = blend(load(scores + j) > most, load(scores + j), most);
    const float max = reduce_max(most);
    for (int j = begin; j < end; j += W) {
        const vec e = vexp(load(scores + j) - max);
        store(scores + j, e);
        sum += e;
    }
    const float share = 1.0f / reduce_add(sum);
    for (int j = begin; j < end; j += W) store(scores + j, load(scores + j) * share);
}

/* out (rows, HS) = scores . values over the keys from begin to end. Rows of out lie C floats apart. */
static void mix_values(float *out, int rows, const float *scores, const float *values, int begin, int end) {
    for (int c = 0; c < HS; c += W) {
        vec even[QUERIES] = {0}, odd[QUERIES] = {0};
        for (int j = begin; j < end; j += 2) {
            const float *v = values + (size_t)j * HS + c, *p = scores + j;
            const vec a = load_upto(v, HS - c), b = load_upto(v + HS, HS - c);
#pragma GCC unroll 4
            for (size_t i = 0; i < QUERIES; i++) {
                even[i] += p[i * CACHE] * a;
                odd[i] += p[i * CACHE + 1] * b;
            }
        }
        for (int i = 0; i < rows; i++) store_upto(out + (size_t)i * C + c, even[i] + odd[i], HS - c);
    }
}

/* One head of n tokens, whose keys and values are in the cache already. QUERIES neighbours are answered together where they
 * follow one another in the same sequence. */
static void attend(float *out, const float *qkv, const float *keys, const float *values, const int *sequences,
                   const int *positions, int n) {
    const float scale = 1.0f / sqrtf(HS);
    float *scores = thread_scratch + (size_t)thread_number() * THREAD_SCRATCH;
    for (int row = 0, rows = 0; row < n; row += rows) {
        for (rows = 1; rows < QUERIES && row + rows < n; rows++)
            if (sequences[row + rows] != sequences[row] || positions[row + rows] != positions[row] + rows) break;
        const size_t sequence = (size_t)sequences[row] * CACHED_VALUES;
        const int end = parts_of(positions[row] + rows, 2 * W) * 2 * W;
        score_keys(scores, qkv + (size_t)row * 3 * C, 3 * C, rows, keys + sequence, 0, end);
        for (int i = 0; i < rows; i++) {
            const int position = positions[row] + i;
            softmax_scores(scores + (size_t)i * CACHE, scale, 0, 0, position, end);
        }
        mix_values(out + (size_t)row * C, rows, scores, values + sequence, 0, end);
    }
}

static void cached_attention(float *out, const float *qkv,           /* (n, C), (n, 3*C) */
                             const float *keys, const float *values, /* of this layer, in the first sequence */
                             const int *sequences, const int *positions, int n) { /* (n), (n) */
    enum { TOKENS = 8 * QUERIES }; /* the work of a thread: so many tokens, one head */
#pragma omp parallel for schedule(dynamic) if ((double)n * CACHE * C > TEAM_PRODUCTS)
    for (int part = 0; part < parts_of(n, TOKENS) * NH; part++) {
        const int head = part % NH, first = part / NH * TOKENS;
        const size_t kept = (size_t)head * CACHE * HS;
        attend(out + (size_t)first * C + (size_t)head * HS, qkv + (size_t)first * 3 * C + (size_t)head * HS, keys + kept,
               values + kept, sequences + first, positions + first, least(TOKENS, n - first));
    }
}

/* ---- select: out[i] = inp[rows[i]] ------------------------------------------------------------------------------- */

static void select_rows(float *out, const float *inp, const int *rows, int m, int c) { /* (m, c), (n, c), (m) */
    for (int i = 0; i < m; i++)
        memcpy(out + (size_t)i * (size_t)c, inp + (size_t)rows[i] * (size_t)c, (size_t)c * sizeof(float));
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

/* All memory the model ever uses, for so many sequences side by side. */
static void allocate_model(int sequences) {
    params_memory = (float *)allocate_tensors(497903616);
    for (int i = 0; i < NUM_TENSORS; i++) *parameter_table[i].tensor = params_memory + parameter_table[i].offset;

    float *kept = (float *)allocate_tensors((size_t)sequences * CACHED_VALUES * sizeof(float));
    cache.keys = kept;
    cache.values = kept + 9437184;

    float *workspace = (float *)allocate_tensors(9437184);
    acts.residual = workspace + 1572864;
    acts.ln1 = workspace + 1179648;
    acts.ln1_mean = workspace;
    acts.ln1_rstd = workspace + 512;
    acts.qkv = workspace;
    acts.attention = workspace + 1179648;
    acts.ln2 = workspace + 1966080;
    acts.ln2_mean = workspace;
    acts.ln2_rstd = workspace + 512;
    acts.gelu = workspace;
    acts.lnf = workspace;
    acts.lnf_mean = workspace + 393216;
    acts.lnf_rstd = workspace + 393728;
    acts.selected = workspace + 804864;
    acts.logits = workspace;
    thread_scratch = (float *)allocate_tensors((size_t)num_threads * THREAD_SCRATCH * sizeof(float));
}

/* n tokens, of any sequences: token i stands at positions[i] of sequence sequences[i], and what stands before it there was
 * decoded earlier, in this call or another. Leaves the logits of m of them, of token rows[i] in row i, in acts.logits. */
static void decode(const int *tokens, const int *sequences, const int *positions, int n, const int *rows, int m) {
    /* embedding */
    token_embedding_forward(acts.residual, tokens, params.wte, n, C);
    position_embedding_forward(acts.residual, acts.residual, params.wpe, positions, n, C);
    /* layers */
    for (size_t l = 0; l < L; l++) {
        layernorm_forward(acts.ln1, acts.ln1_mean, acts.ln1_rstd, acts.residual, params.ln1w + l*C, params.ln1b + l*C,
                          n, C);
        linear_forward(acts.qkv, acts.ln1, params.qkvw + l*3*C*C, params.qkvb + l*3*C, NULL, n, C, 3*C);
        cache_append(cache.keys + l*NH*CACHE*HS, cache.values + l*NH*CACHE*HS, acts.qkv, sequences, positions, n);
        cached_attention(acts.attention, acts.qkv, cache.keys + l*NH*CACHE*HS, cache.values + l*NH*CACHE*HS, sequences,
                         positions, n);
        linear_forward(acts.residual, acts.attention, params.attprojw + l*C*C, params.attprojb + l*C, acts.residual, n,
                       C, C);
        layernorm_forward(acts.ln2, acts.ln2_mean, acts.ln2_rstd, acts.residual, params.ln2w + l*C, params.ln2b + l*C,
                          n, C);
        linear_gelu_forward(acts.gelu, NULL, acts.ln2, params.fcw + l*4*C*C, params.fcb + l*4*C, n, C, 4*C);
        linear_forward(acts.residual, acts.gelu, params.fcprojw + l*C*4*C, params.fcprojb + l*C, acts.residual, n, 4*C,
                       C);
    }
    /* head */
    layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, acts.residual, params.lnfw, params.lnfb, n, C);
    select_rows(acts.selected, acts.lnf, rows, m, C);
    linear_forward(acts.logits, acts.selected, params.wte, NULL, NULL, m, C, VP);
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

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

/* The tensors of parameter_table back to back, each stacked over the layers. */
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
        die(1, "%s: %s is %d, but this program is built for %d; build one for it with llmgen generate --model %s", path,
            weights_header[i].name, header[2 + i], weights_header[i].value, path);
    }
    const int is_bf16 = header[1] == WEIGHTS_BF16;
    check_bytes(bytes, count_parameters() * (is_bf16 ? 2 : 4), path);
    read_tensors(file, params_memory, is_bf16, path);
    fclose(file);
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

/* ---- encoder: text to tokens ----------------------------------------------------------------------------------------
 *
 * Byte pair encoding as GPT-2 has it (Radford et al. 2019). A text is cut into pieces: words with the space before them,
 * numbers, signs, white space. A piece begins as bytes; of all neighbours that make a token together, those with the lowest
 * token are joined, the first ones if there are several, until there are none. */

/* Which characters are letters, numbers and white space: lengths of stretches outside the class, inside, outside, ... */
static const uint16_t letters[] = {
    65, 26, 6, 26, 47, 1, 10, 1, 4, 1, 5, 23, 1, 31, 1, 458, 4, 12, 14, 5, 7, 1, 1, 1, 129, 5, 1, 2, 2, 4, 1, 1, 6, 1,
    1, 3, 1, 1, 1, 20, 1, 83, 1, 139, 8, 166, 1, 38, 2, 1, 6, 41, 71, 27, 4, 4, 45, 43, 35, 2, 1, 99, 1, 1, 15, 2, 7, 2,
    10, 3, 2, 1, 16, 1, 1, 30, 29, 89, 11, 1, 24, 33, 9, 2, 4, 1, 5, 22, 4, 1, 9, 1, 3, 1, 23, 25, 7, 11, 5, 24, 1, 6,
    17, 42, 58, 54, 3, 1, 18, 1, 7, 10, 15, 16, 4, 8, 2, 2, 2, 22, 1, 7, 1, 1, 3, 4, 3, 1, 16, 1, 13, 2, 1, 3, 14, 2,
    10, 1, 8, 6, 4, 2, 2, 22, 1, 7, 1, 2, 1, 2, 1, 2, 31, 4, 1, 1, 19, 3, 16, 9, 1, 3, 1, 22, 1, 7, 1, 2, 1, 5, 3, 1,
    18, 1, 15, 2, 23, 1, 11, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 30, 2, 1, 3, 15, 1, 17, 1, 1, 6, 3, 3, 1, 4, 3, 2,
    1, 1, 1, 2, 3, 2, 3, 3, 3, 12, 22, 1, 52, 8, 1, 3, 1, 23, 1, 16, 3, 1, 26, 3, 2, 1, 2, 2, 30, 1, 4, 8, 1, 3, 1, 23,
    1, 10, 1, 5, 3, 1, 31, 2, 1, 2, 15, 2, 17, 9, 1, 3, 1, 41, 2, 1, 16, 1, 5, 3, 8, 3, 24, 6, 5, 18, 3, 24, 1, 9, 1, 1,
    2, 7, 58, 48, 1, 2, 12, 7, 58, 2, 1, 1, 1, 5, 1, 24, 1, 1, 1, 10, 1, 2, 9, 1, 2, 5, 1, 1, 21, 4, 32, 1, 63, 8, 1,
    36, 27, 5, 115, 43, 20, 1, 16, 6, 4, 4, 3, 1, 3, 2, 7, 3, 4, 13, 12, 1, 17, 38, 1, 1, 5, 1, 2, 43, 1, 333, 1, 4, 2,
    7, 1, 1, 1, 4, 2, 41, 1, 4, 2, 33, 1, 4, 2, 7, 1, 1, 1, 4, 2, 15, 1, 57, 1, 4, 2, 67, 37, 16, 16, 86, 2, 6, 3, 620,
    2, 17, 1, 26, 5, 75, 6, 8, 7, 18, 13, 19, 14, 18, 14, 13, 1, 3, 15, 52, 35, 1, 4, 1, 67, 89, 7, 5, 2, 34, 1, 1, 5,
    70, 10, 31, 49, 30, 2, 5, 11, 44, 4, 26, 54, 23, 9, 53, 82, 1, 93, 47, 17, 8, 54, 30, 13, 2, 10, 44, 26, 36, 41, 3,
    10, 36, 2, 11, 5, 43, 2, 3, 41, 4, 1, 6, 1, 2, 3, 1, 5, 192, 64, 278, 2, 6, 2, 38, 2, 6, 2, 8, 1, 1, 1, 1, 1, 1, 1,
    31, 2, 53, 1, 7, 1, 1, 3, 3, 1, 7, 3, 4, 2, 6, 4, 13, 5, 3, 1, 7, 116, 1, 13, 1, 16, 13, 101, 1, 4, 1, 2, 10, 1, 1,
    3, 5, 6, 1, 1, 1, 1, 1, 1, 4, 1, 11, 2, 4, 5, 5, 4, 1, 52, 2, 2683, 229, 6, 4, 3, 2, 12, 38, 1, 1, 5, 1, 2, 56, 7,
    1, 16, 23, 9, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 80, 1, 469, 2, 42, 5, 5, 2, 4, 86, 6, 3, 1, 90, 1, 4, 5,
    43, 1, 94, 17, 32, 48, 16, 512, 6592, 64, 22157, 67, 46, 2, 269, 3, 16, 10, 2, 20, 47, 16, 31, 2, 70, 49, 9, 2, 103,
    2, 67, 2, 2, 1, 1, 1, 8, 21, 16, 1, 3, 1, 4, 1, 23, 29, 52, 14, 50, 62, 6, 3, 1, 1, 2, 11, 28, 10, 23, 25, 29, 7,
    47, 28, 1, 16, 5, 1, 10, 10, 5, 1, 41, 23, 3, 1, 8, 20, 23, 3, 1, 3, 50, 1, 1, 3, 2, 2, 5, 2, 1, 1, 1, 24, 3, 2, 11,
    7, 3, 12, 6, 2, 6, 2, 6, 9, 7, 1, 7, 1, 43, 1, 14, 6, 115, 29, 11172, 12, 23, 4, 49, 8452, 366, 2, 106, 38, 7, 12,
    5, 5, 1, 1, 10, 1, 13, 1, 5, 1, 1, 1, 2, 1, 2, 1, 108, 33, 363, 18, 64, 2, 54, 40, 12, 116, 5, 1, 135, 36, 26, 6,
    26, 11, 89, 3, 6, 2, 6, 2, 6, 2, 3, 35, 12, 1, 26, 1, 19, 1, 2, 1, 15, 2, 14, 34, 123, 389, 29, 3, 49, 47, 32, 13,
    20, 1, 8, 6, 38, 10, 30, 2, 36, 4, 8, 48, 158, 18, 36, 4, 36, 4, 40, 8, 52, 12, 11, 1, 15, 1, 7, 1, 2, 1, 11, 1, 15,
    1, 7, 1, 2, 3, 52, 12, 311, 9, 22, 10, 8, 24, 6, 1, 42, 1, 9, 69, 6, 2, 1, 1, 44, 1, 2, 3, 1, 2, 23, 10, 23, 9, 31,
    65, 19, 1, 2, 10, 22, 10, 26, 70, 56, 6, 2, 64, 1, 15, 4, 1, 3, 1, 29, 42, 29, 3, 29, 35, 8, 1, 28, 27, 54, 10, 22,
    10, 19, 13, 18, 110, 73, 55, 51, 13, 51, 13, 36, 38, 28, 9, 23, 250, 42, 6, 2, 16, 3, 59, 29, 10, 1, 8, 22, 42, 18,
    46, 21, 27, 23, 12, 53, 57, 2, 2, 1, 13, 45, 32, 25, 26, 36, 29, 1, 2, 1, 8, 35, 3, 1, 12, 48, 14, 4, 21, 1, 1, 1,
    35, 18, 1, 25, 19, 2, 63, 7, 1, 1, 1, 4, 1, 15, 1, 10, 7, 47, 38, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 18, 1, 12,
    5, 30, 10, 1, 1, 2, 1, 1, 38, 1, 1, 25, 1, 1, 1, 44, 53, 18, 4, 20, 3, 30, 48, 20, 2, 1, 1, 184, 47, 41, 4, 36, 48,
    20, 1, 59, 43, 13, 1, 71, 27, 37, 7, 185, 44, 116, 64, 31, 8, 2, 1, 2, 8, 1, 2, 1, 24, 15, 1, 1, 1, 94, 8, 2, 39,
    16, 1, 1, 1, 28, 1, 10, 40, 7, 1, 21, 1, 11, 46, 19, 1, 18, 73, 199, 33, 31, 9, 1, 37, 17, 1, 49, 30, 112, 7, 1, 2,
    1, 38, 21, 1, 25, 6, 1, 2, 1, 32, 14, 1, 327, 19, 15, 1, 1, 13, 1, 34, 124, 1, 79, 922, 230, 196, 2636, 97, 15,
    1072, 17, 6, 25, 3995, 5, 583, 6841, 30, 1762, 569, 7, 31, 17, 79, 17, 30, 18, 48, 16, 4, 31, 21, 5, 19, 432, 45,
    211, 64, 128, 75, 5, 1, 66, 13, 64, 2, 1, 1, 28, 6136, 8, 1238, 41, 10, 8935, 4, 1, 7, 1, 2, 1, 291, 15, 1, 29, 3,
    2, 1, 14, 4, 8, 396, 2308, 107, 5, 13, 3, 9, 7, 10, 5990, 85, 1, 71, 1, 2, 2, 1, 2, 2, 2, 4, 1, 12, 1, 1, 1, 7, 1,
    65, 1, 4, 2, 8, 1, 7, 1, 28, 1, 4, 1, 5, 1, 1, 3, 7, 1, 340, 2, 25, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25,
    1, 31, 1, 25, 1, 8, 1844, 31, 6, 6, 261, 62, 146, 45, 10, 7, 16, 1, 321, 30, 18, 44, 484, 28, 228, 30, 2, 1, 495, 7,
    1, 4, 1, 2, 1, 15, 1, 197, 59, 68, 7, 1, 1204, 4, 1, 27, 1, 2, 1, 1, 2, 1, 1, 10, 1, 4, 1, 1, 1, 1, 6, 1, 4, 1, 1,
    1, 1, 1, 1, 3, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 4, 1, 7, 1, 4, 1, 4, 1, 1, 1, 10, 1, 17, 5,
    3, 1, 5, 1, 17, 4420, 42720, 32, 4154, 6, 222, 2, 5762, 14, 7473, 15, 622, 2466, 542, 1506, 4939, 5, 4192
};
static const uint16_t numbers[] = {
    48, 10, 120, 2, 5, 1, 2, 3, 1441, 10, 134, 10, 198, 10, 412, 10, 118, 10, 4, 6, 108, 10, 118, 10, 118, 10, 2, 6,
    110, 13, 115, 10, 8, 7, 103, 10, 104, 7, 7, 19, 109, 10, 96, 10, 118, 10, 70, 20, 268, 10, 70, 10, 719, 20, 881, 3,
    239, 10, 6, 10, 22, 10, 300, 10, 128, 11, 165, 10, 6, 10, 182, 10, 86, 10, 134, 10, 6, 10, 1046, 1, 3, 6, 6, 10,
    198, 51, 2, 5, 726, 60, 78, 22, 630, 30, 1385, 1, 777, 1, 25, 9, 14, 3, 343, 4, 138, 10, 30, 8, 1, 15, 32, 10, 39,
    15, 29536, 10, 188, 10, 320, 6, 154, 10, 38, 10, 198, 10, 22, 10, 86, 10, 406, 10, 21270, 10, 493, 45, 12, 57, 17,
    2, 341, 27, 36, 4, 29, 1, 8, 1, 134, 5, 202, 10, 942, 8, 25, 7, 39, 9, 75, 5, 22, 6, 160, 2, 2, 16, 2, 46, 64, 9,
    52, 2, 30, 3, 75, 5, 104, 8, 24, 8, 41, 7, 330, 6, 48, 10, 6, 10, 278, 31, 158, 10, 42, 4, 112, 7, 134, 30, 128, 10,
    60, 10, 144, 10, 7, 20, 251, 10, 342, 10, 118, 10, 374, 10, 102, 10, 6, 20, 76, 12, 420, 19, 93, 10, 662, 10, 86,
    29, 227, 10, 70, 10, 422, 10, 102, 21, 1067, 111, 15553, 10, 2342, 10, 86, 10, 134, 10, 1, 7, 526, 10, 262, 23,
    24153, 10, 1478, 20, 12, 20, 108, 25, 1109, 50, 2368, 10, 422, 10, 502, 10, 247, 10, 716, 9, 128, 10, 791, 59, 1, 3,
    1, 4, 76, 45, 1, 15, 962, 13, 2787, 10
};
static const uint16_t spaces[] = {
    9, 5, 18, 1, 100, 1, 26, 1, 5599, 1, 2431, 11, 29, 2, 5, 1, 47, 1, 4000, 1
};

typedef enum { LETTER, NUMBER, SPACE, OTHER } Class;

static int is_in(const uint16_t *stretches, int count, uint32_t character) {
    uint32_t end = 0;
    for (int i = 0; i < count; i++) {
        end += stretches[i];
        if (character < end) return i % 2;
    }
    return 0;
}

static Class class_of(uint32_t character) {
    if (is_in(letters, sizeof letters / sizeof letters[0], character)) return LETTER;
    if (is_in(numbers, sizeof numbers / sizeof numbers[0], character)) return NUMBER;
    if (is_in(spaces, sizeof spaces / sizeof spaces[0], character)) return SPACE;
    return OTHER;
}

/* The bytes of the UTF-8 character at the beginning of n, 0 if there is none. */
static int read_character(const char *text, int n, uint32_t *character) {
    static const uint32_t least_of[] = { 0, 0, 0x80, 0x800, 0x10000 };  /* shorter forms than needed are not allowed */
    const unsigned char first = (unsigned char)text[0];
    const int bytes = first < 0x80 ? 1 : first < 0xc0 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf8 ? 4 : 0;
    if (bytes == 0 || bytes > n) return 0;
    *character = bytes == 1 ? first : first & (0x7fu >> bytes);
    for (int i = 1; i < bytes; i++) {
        if (((unsigned char)text[i] & 0xc0) != 0x80) return 0;
        *character = *character << 6 | ((unsigned char)text[i] & 0x3f);
    }
    const int surrogate = *character >= 0xd800 && *character < 0xe000;
    return surrogate || *character > 0x10ffff || *character < least_of[bytes] ? 0 : bytes;
}

/* The bytes of the piece at the beginning of n bytes of UTF-8, as GPT-2's regular expression cuts it:
 *     's 't 'd 'm 'll 've 're | ?letters | ?numbers | ?others | white space before white space or the end | white space */
static int piece_length(const char *text, int n) {
    static const char *const endings[] = { "'s", "'t", "'d", "'m", "'ll", "'ve", "'re" };
    for (int i = 0; i < 7; i++) {
        const int length = (int)strlen(endings[i]);
        if (length <= n && memcmp(text, endings[i], (size_t)length) == 0) return length;
    }
    uint32_t character = 0;
    const int lead = text[0] == ' ' && n > 1;
    int at = lead, last = 0;
    read_character(text + at, n - at, &character);
    const Class sort = class_of(character);
    if (sort == SPACE) at = 0;
    while (at < n) {
        const int bytes = read_character(text + at, n - at, &character);
        if (class_of(character) != sort) break;
        last = at;
        at += bytes;
    }
    return sort == SPACE && at < n && last > 0 ? last : at;  /* the last white space goes with what follows */
}

/* Finds tokens by their bytes: a table of twice their number or more, a power of two, with open addressing. */
static struct {
    int *tokens;  /* -1: nothing */
    uint32_t mask;
} index_of_tokens;

static uint32_t hash_bytes(const char *text, int length) {  /* FNV-1a */
    uint32_t hash = 2166136261u;
    for (int i = 0; i < length; i++) hash = (hash ^ (unsigned char)text[i]) * 16777619u;
    return hash;
}

/* Where the token with these bytes is in the table, or would be. */
static int *find_place(const char *text, int length) {
    for (uint32_t at = hash_bytes(text, length);; at++) {
        int *place = &index_of_tokens.tokens[at & index_of_tokens.mask];
        if (*place < 0) return place;
        const int start = tokenizer.start[*place];
        if (tokenizer.start[*place + 1] - start == length && memcmp(tokenizer.text + start, text, (size_t)length) == 0) {
            return place;
        }
    }
}

static void index_tokens(void) {
    uint32_t size = 2;
    while (size < 2 * (uint32_t)tokenizer.size) size *= 2;
    index_of_tokens.mask = size - 1;
    index_of_tokens.tokens = (int *)allocate(size * sizeof(int));
    for (uint32_t i = 0; i < size; i++) index_of_tokens.tokens[i] = -1;
    for (int i = 0; i < tokenizer.size; i++) {
        const int start = tokenizer.start[i];
        int *place = find_place(tokenizer.text + start, tokenizer.start[i + 1] - start);
        if (*place < 0 && i != tokenizer.end_of_text) *place = i;  /* of several, the first; text never ends a text */
    }
}

/* The token with these bytes, -1 if there is none. */
static int find_token(const char *text, int length) { return length > 255 ? -1 : *find_place(text, length); }

/* A piece while it is encoded. Part i begins at byte i; only the beginnings of parts are looked at. */
static struct {
    int room;
    int *next, *previous;  /* parts: the number of bytes is the end */
    int *joined;           /* the token that a part and its next would make, or -1 */
    uint64_t *queue;       /* a heap of joined << 32 | part: the least first; those that have changed are passed over */
    int waiting;
} piece;

static void make_room(int n) {
    if (n <= piece.room) return;
    free(piece.next);
    free(piece.queue);
    piece.room = n;
    piece.next = (int *)allocate(3 * (size_t)n * sizeof(int));
    piece.previous = piece.next + n;
    piece.joined = piece.previous + n;
    piece.queue = (uint64_t *)allocate(3 * (size_t)n * sizeof(uint64_t));  /* a join offers two, and there are n at most */
}

static void push(uint64_t offer) {
    int at = piece.waiting++;
    for (; at > 0 && offer < piece.queue[(at - 1) / 2]; at = (at - 1) / 2) piece.queue[at] = piece.queue[(at - 1) / 2];
    piece.queue[at] = offer;
}

static uint64_t pop(void) {
    const uint64_t top = piece.queue[0], moved = piece.queue[--piece.waiting];
    int at = 0;
    for (int child = 1; child < piece.waiting; child = 2 * at + 1) {
        child += child + 1 < piece.waiting && piece.queue[child + 1] < piece.queue[child];
        if (moved <= piece.queue[child]) break;
        piece.queue[at] = piece.queue[child];
        at = child;
    }
    piece.queue[at] = moved;
    return top;
}

/* Looks what a part and its next would make. */
static void offer(const char *text, int n, int part) {
    const int second = piece.next[part];
    piece.joined[part] = second < n ? find_token(text + part, piece.next[second] - part) : -1;
    if (piece.joined[part] >= 0) push((uint64_t)piece.joined[part] << 32 | (uint64_t)part);
}

/* tokens (n) receives the tokens of a piece of n bytes; returns their number. */
static int encode_piece(const char *text, int n, int *tokens) {
    tokens[0] = find_token(text, n);
    if (tokens[0] >= 0) return 1;
    make_room(n);
    for (int i = 0; i < n; i++) {
        piece.next[i] = i + 1;
        piece.previous[i] = i - 1;
    }
    piece.waiting = 0;
    for (int i = 0; i < n; i++) offer(text, n, i);
    while (piece.waiting > 0) {
        const uint64_t best = pop();
        const int part = (int)(best & 0xffffffff), second = piece.next[part];
        if (piece.joined[part] != (int)(best >> 32)) continue;
        piece.next[part] = piece.next[second];
        if (piece.next[part] < n) piece.previous[piece.next[part]] = part;
        piece.joined[second] = -1;
        offer(text, n, part);
        if (part > 0) offer(text, n, piece.previous[part]);
    }
    int count = 0;
    for (int i = 0; i < n; i = piece.next[i]) {
        tokens[count] = find_token(text + i, piece.next[i] - i);
        if (tokens[count++] < 0) die(1, "byte %d of the text: the tokenizer has no token for it", (unsigned char)text[i]);
    }
    return count;
}

/* tokens (length) receives the tokens of a text; returns their number. */
static int encode(const char *text, int length, int *tokens) {
    uint32_t character;
    int count = 0;
    if (!tokenizer.text) die(2, "--tokenizer is missing: name the table that turns text into tokens");
    if (!index_of_tokens.tokens) index_tokens();
    for (int at = 0, bytes; at < length; at += bytes) {
        bytes = read_character(text + at, length - at, &character);
        if (bytes == 0) die(1, "byte %d of the text is not UTF-8; convert it", at);
    }
    for (int at = 0, bytes; at < length; at += bytes) {
        bytes = piece_length(text + at, length - at);
        count += encode_piece(text + at, bytes, tokens + count);
    }
    return count;
}

/* ---- sampling ---------------------------------------------------------------------------------------------------- */

static float chances[V];  /* of each token, as a part of the most probable one's; 0 for what is not drawn from */

/* Keeps the most probable tokens: as few as are `count`, and have `mass` in all. Positive floats are in the order of their
 * bits, so the threshold is found bit by bit, from the top. */
static void keep_most_probable(int count, double mass) {
    uint32_t bits = 0;
    float threshold;
    for (int bit = 29; bit >= 0; bit--) {  /* 1.0, the highest, has none above */
        const uint32_t higher = bits | (uint32_t)1 << bit;
        int above = 0;
        double sum = 0.0;
        memcpy(&threshold, &higher, sizeof threshold);
        for (int i = 0; i < V; i++) {
            if (chances[i] < threshold) continue;
            above++;
            sum += (double)chances[i];
        }
        if (above >= count && sum >= mass) bits = higher;
    }
    memcpy(&threshold, &bits, sizeof threshold);
    for (int i = 0; i < V; i++) chances[i] = chances[i] < threshold ? 0.0f : chances[i];
}

static double sum_of_chances(void) {
    double sum = 0.0;
    for (int i = 0; i < V; i++) sum += (double)chances[i];
    return sum;
}

/* Draws a token from (V) logits; coin is uniform in [0, 1). The first of the most probable ones at temperature 0. */
static int draw_token(const Settings *s, const float *logits, double coin) {
    int best = 0;
    for (int i = 1; i < V; i++) best = logits[i] > logits[best] ? i : best;
    if (!is_finite(logits[best])) die(1, "the logits are not finite; are the weights in order?");
    if (s->temperature == 0.0) return best;
    for (int i = 0; i < V; i++) chances[i] = (float)exp((double)(logits[i] - logits[best]) / s->temperature);
    if (s->top_k > 0 && s->top_k < V) keep_most_probable(s->top_k, 0.0);
    if (s->top_p < 1.0) keep_most_probable(1, s->top_p * sum_of_chances());
    coin *= sum_of_chances();
    for (int i = 0; i < V; i++) {
        coin -= (double)chances[i];
        if (coin < 0.0) return i;
    }
    return best;  /* what rounding may leave over */
}

/* ---- generation -------------------------------------------------------------------------------------------------- */

typedef struct {
    int *tokens;            /* the prompt, then what was drawn */
    int prompt, length;     /* how many those are: of the prompt, and in all */
    int drawn, shown, done;
} Text;

static struct {
    Text *items;
    int count, shown, headed;  /* all; those that are printed to their end; those that have their heading */
} texts;

static struct {
    int read, drawn, decoded;  /* tokens: of prompts, generated, and of these by the cache alone */
    double reading, decoding;  /* seconds */
} figures;

/* tokens (length). A text that has nothing begins with an end-of-text, as the documents of the training did. */
static void add_text(const int *tokens, int length, const Settings *s) {
    const int from_nothing = length == 0;
    texts.items = (Text *)realloc(texts.items, ((size_t)texts.count + 1) * sizeof(Text));
    if (!texts.items) die(1, "out of memory");
    Text *text = &texts.items[texts.count++];
    memset(text, 0, sizeof *text);
    if (length >= CONTEXT) {
        die(1, "prompt %d: %d tokens, but a sequence has %d at most, what is generated included; make it shorter",
            texts.count, length, CONTEXT);
    }
    const size_t room = (size_t)length + (size_t)from_nothing + (size_t)least(s->tokens, CONTEXT);
    text->tokens = (int *)allocate(room * sizeof(int));
    memcpy(text->tokens, tokens, (size_t)length * sizeof(int));
    if (from_nothing) text->tokens[0] = tokenizer.end_of_text;
    text->prompt = text->length = length + from_nothing;
    text->shown = from_nothing || s->quiet ? text->prompt : 0;
    text->done = s->tokens == 0;
}

/* The whole of a file, with a 0 behind it. */
static char *read_text(const char *path, int *length) {
    struct stat status;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &status) != 0) die(1, "%s: cannot be read: %s", path, strerror(errno));
    if (S_ISDIR(status.st_mode)) die(1, "%s: is a folder, not a file", path);
    if (status.st_size >= INT_MAX) die(1, "%s: longer than %d bytes; give a part of it", path, INT_MAX);
    char *text = (char *)allocate((size_t)status.st_size + 1);
    *length = (int)status.st_size;
    read_input(file, text, (size_t)status.st_size, path);
    text[*length] = '\0';
    fclose(file);
    return text;
}

static void add_encoded(const char *text, int length, const Settings *s) {
    int *tokens = (int *)allocate(((size_t)length + 1) * sizeof(int));
    add_text(tokens, encode(text, length, tokens), s);
    free(tokens);
}

/* Token ids as numbers, to the end of the line. */
static void add_numbers(char *line, const char *path, const Settings *s) {
    int *tokens = (int *)allocate((strlen(line) / 2 + 1) * sizeof(int)), count = 0;
    for (char *word = strtok(line, " \t\r"); word; word = strtok(NULL, " \t\r")) {
        char *end;
        const long long token = strtoll(word, &end, 10);
        if (*end || token < 0 || token >= V) die(1, "%s: '%s' is not a token id below %d", path, word, V);
        tokens[count++] = (int)token;
    }
    add_text(tokens, count, s);
    free(tokens);
}

/* Adds a prompt for each line of a file but the empty ones. */
static void add_lines(const char *path, int are_numbers, const Settings *s) {
    int length;
    char *text = read_text(path, &length);
    for (char *line = text, *end; line < text + length; line = end + 1) {
        end = (char *)memchr(line, '\n', (size_t)(text + length - line));
        if (!end) end = text + length;
        *end = '\0';
        if (end == line) continue;
        if (are_numbers) add_numbers(line, path, s);
        else add_encoded(line, (int)(end - line), s);
    }
    free(text);
}

static void add_prompts(const Settings *s) {
    for (int i = 0; i < s->prompt.count; i++) add_encoded(s->prompt.items[i], (int)strlen(s->prompt.items[i]), s);
    if (s->prompts) add_lines(s->prompts, 0, s);
    if (s->prompt_tokens) add_lines(s->prompt_tokens, 1, s);
    if (!s->prompt.count && !s->prompts && !s->prompt_tokens) add_text(NULL, 0, s);
    if (texts.count == 0) die(1, "%s: no prompt; write one a line", s->prompts ? s->prompts : s->prompt_tokens);
}

/* Prints what there is to print. The texts come in the order of their prompts: the first that is not done is printed as it
 * grows, those behind it wait. */
static void show(const Settings *s) {
    while (texts.shown < texts.count) {
        Text *text = &texts.items[texts.shown];
        const int headed = s->quiet || texts.count == 1 || texts.headed > texts.shown;
        if (!headed) say("prompt %d of %d:\n", ++texts.headed, texts.count);
        for (; text->shown < text->length; text->shown++) print_token(text->tokens[text->shown]);
        if (!text->done) return;
        say("\n");
        texts.shown++;
    }
}

/* Draws the next token of a text. */
static void extend(const Settings *s, Text *text, const float *logits) {
    const uint64_t counter = (uint64_t)(text - texts.items) << 32 | (uint64_t)text->drawn;
    const double coin = (double)(random_bits((uint64_t)s->seed, SAMPLE_STREAM, counter) >> 11) * 0x1p-53;
    const int token = draw_token(s, logits, coin);
    text->drawn++;
    figures.drawn++;
    text->done = text->drawn == s->tokens || text->length + 1 == CONTEXT;
    if (s->stop && token == tokenizer.end_of_text) text->done = 1;
    else text->tokens[text->length++] = token;
}

/* Reads a prompt into the cache, and draws the first token. */
static void begin_text(const Settings *s, Text *text, int sequence) {
    static int sequences[PIECE], positions[PIECE];
    const double start = seconds();
    int n = 0;
    for (int first = 0; first < text->prompt; first += n) {
        n = least(PIECE, text->prompt - first);
        for (int i = 0; i < n; i++) {
            sequences[i] = sequence;
            positions[i] = first + i;
        }
        const int last = n - 1, is_last = first + n == text->prompt;
        decode(text->tokens + first, sequences, positions, n, &last, is_last);  /* no other logits are wanted */
    }
    figures.read += text->prompt;
    figures.reading += seconds() - start;
    extend(s, text, acts.logits);
}

/* All texts: as many side by side as --batch says, each in a sequence of the cache. Where one is done, the next begins. */
static void generate(const Settings *s) {
    Text *active[SEQUENCES] = { NULL };
    int begun = 0;
    show(s);
    while (texts.shown < texts.count && !stop_signal) {
        int tokens[SEQUENCES], sequences[SEQUENCES], positions[SEQUENCES], rows[SEQUENCES], n = 0;
        for (int i = 0; i < s->batch; i++) {
            while ((!active[i] || active[i]->done) && begun < texts.count && !stop_signal) {
                active[i] = &texts.items[begun++];
                if (!active[i]->done) begin_text(s, active[i], i);
                show(s);
            }
            if (!active[i] || active[i]->done) continue;
            tokens[n] = active[i]->tokens[active[i]->length - 1];
            sequences[n] = i;
            positions[n] = active[i]->length - 1;
            rows[n] = n;
            n++;
        }
        const double start = seconds();
        if (n > 0) decode(tokens, sequences, positions, n, rows, n);
        for (int i = 0; i < n; i++) extend(s, active[sequences[i]], acts.logits + (size_t)i * VP);
        figures.decoded += n;
        figures.decoding += seconds() - start;
        show(s);
    }
    if (stop_signal) say("\n");
}

/* ---- arguments --------------------------------------------------------------------------------------------------- */

enum FlagKind { TEXT, INTEGER, SWITCH, REAL, TEXTS };

typedef struct {
    const char *name, *short_name, *metavar;
    enum FlagKind kind;
    size_t field;        /* where in Settings */
    double minimum;
    const char *help;
} Flag;

static const Settings default_settings = {
    .tokens = 128, .top_k = 0, .seed = 1337, .batch = 16, .stop = 1, .quiet = 0, .temperature = 1.0, .top_p = 1.0,
};

static const Flag flags[] = {
    { "--load", "-e", "FILE", TEXT, offsetof(Settings, load), 0, "weights, fp32 or bf16" },
    { "--tokenizer", "", "FILE", TEXT, offsetof(Settings, tokenizer), 0,
      "table of the tokens' texts; without it bytes are text, other tokens numbers" },
    { "--prompt", "-p", "TEXT", TEXTS, offsetof(Settings, prompt), 0,
      "text to go on from; without any prompt a text begins from nothing" },
    { "--prompts", "", "FILE", TEXT, offsetof(Settings, prompts), 0, "the same, a line each" },
    { "--prompt-tokens", "", "FILE", TEXT, offsetof(Settings, prompt_tokens), 0,
      "the same as token ids: numbers with spaces between, a prompt a line" },
    { "--tokens", "-n", "N", INTEGER, offsetof(Settings, tokens), 0, "most tokens that a prompt goes on for" },
    { "--temperature", "-t", "X", REAL, offsetof(Settings, temperature), 0,
      "divides the logits; 0 takes the most probable token" },
    { "--top-k", "-k", "N", INTEGER, offsetof(Settings, top_k), 0, "draw from the N most probable tokens; 0 is all" },
    { "--top-p", "", "X", REAL, offsetof(Settings, top_p), 0,
      "draw from the most probable tokens that have this probability in all" },
    { "--seed", "-s", "N", INTEGER, offsetof(Settings, seed), 0, "of what is drawn" },
    { "--batch", "-b", "N", INTEGER, offsetof(Settings, batch), 1, "prompts that are worked on side by side" },
    { "--stop", "", "0|1", SWITCH, offsetof(Settings, stop), 0, "end a text at the end-of-text token" },
    { "--quiet", "-q", "0|1", SWITCH, offsetof(Settings, quiet), 0,
      "print what is generated, without prompts and figures" },
    { "--encode", "", "FILE", TEXT, offsetof(Settings, encode), 0,
      "print the ids of this text's tokens, a line each; generate nothing" },
};
enum { NUM_FLAGS = sizeof flags / sizeof flags[0] };

static const char version[] = "gpt2-124m, configuration 1f9aacff";

static void print_help(void) {
    say("usage: generate_gpt2 [flags]\n\nBuilt for %s.\n\n", version);
    for (int i = 0; i < NUM_FLAGS; i++) {
        const void *field = (const char *)&default_settings + flags[i].field;
        say("  %-3s %s %-*s %s", flags[i].short_name, flags[i].name, 22 - (int)strlen(flags[i].name), flags[i].metavar,
            flags[i].help);
        if (flags[i].kind == INTEGER || flags[i].kind == SWITCH) say(" (default %d)\n", *(const int *)field);
        else if (flags[i].kind == REAL) say(" (default %g)\n", *(const double *)field);
        else if (flags[i].kind == TEXTS) say("; may be given several times\n");
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
    } else if (flag->kind == TEXTS) {
        Texts *texts = (Texts *)field;
        texts->items = (const char **)realloc(texts->items, ((size_t)texts->count + 1) * sizeof(char *));
        if (!texts->items) die(1, "out of memory");
        texts->items[texts->count++] = value;
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

static void check_settings(const Settings *s) {
    if (!s->load && !s->encode) die(2, "--load is missing: name a file of weights");
    if (s->batch > SEQUENCES) die(1, "--batch %d is too large; at most %d", s->batch, SEQUENCES);
    if (s->top_p > 1.0) die(1, "--top-p %g must be from 0 to 1", s->top_p);
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
            say("generate_gpt2: %s\n", version);
            exit(0);
        }
        if (argument[0] != '-') die(2, "'%s' is not expected here; --help lists the flags", argument);
        for (int f = 0; f < NUM_FLAGS && !flag; f++) {
            const int is_long = strlen(flags[f].name) == length && strncmp(argument, flags[f].name, length) == 0;
            if (is_long || strcmp(argument, flags[f].short_name) == 0) flag = &flags[f];
        }
        if (!flag) die(2, "unknown flag '%s'; --help lists the flags", argument);
        const int is_number = value && (strcmp(value, "0") == 0 || strcmp(value, "1") == 0);
        if (flag->kind == SWITCH && !equals && !is_number) {
            set_flag(&settings, flag, "1");
            continue;
        }
        const int is_empty = !value || (!*value && flag->kind != TEXTS);
        if (is_empty || (!equals && strncmp(value, "--", 2) == 0)) die(2, "%s needs a value", argument);
        set_flag(&settings, flag, value);
        if (!equals) i++;
    }
    check_settings(&settings);
    return settings;
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

/* --encode: the tokens of a text, a line each. */
static void print_encoded(const char *path) {
    int length;
    const char *text = read_text(path, &length);
    int *tokens = (int *)allocate((size_t)length * sizeof(int));
    const int count = encode(text, length, tokens);
    for (int i = 0; i < count; i++) printf("%d\n", tokens[i]);
    say("%s", "");  /* flushes, and notices a full disk */
}

static double rate(int tokens, double taken) { return taken > 0.0 ? tokens / taken : 0.0; }

int main(int argc, char **argv) {
    handle_signals();
    const Settings settings = parse_arguments(argc, argv);
    const Settings *s = &settings;
    if (s->tokenizer) load_tokenizer(s->tokenizer);
    if (s->encode) {
        print_encoded(s->encode);
        return 0;
    }
    add_prompts(s);
#ifdef _OPENMP
    num_threads = omp_get_max_threads();
#else
    num_threads = 1;
#endif
    allocate_model(least(s->batch, texts.count));
    load_weights(s->load);
    generate(s);
    if (!s->quiet) {
        say("\nread %d tokens in %.1f ms, %.1f tok/s | generated %d in %.1f ms, %.1f tok/s | threads: %d\n", figures.read,
            1e3 * figures.reading, rate(figures.read, figures.reading), figures.drawn, 1e3 * figures.decoding,
            rate(figures.decoded, figures.decoding), num_threads);
    }
    return stop_signal ? 128 + stop_signal : 0;
}
