/* generate_gpt2.cu: generates text with GPT-2 (12 layers, 12 heads, 768 channels, 50257 tokens) on an NVIDIA GPU, in bfloat16.
 *
 * Written by llmgen from the configuration gpt2-124m (hash fd5707a2):
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
 *   precision = "bf16"
 *
 * It is yours, free of any condition. It needs nvcc and the CUDA runtime, nothing else: no library is linked.
 * Compile:  nvcc -O3 -std=c++17 -arch=sm_80 generate_gpt2.cu -o generate_gpt2cu
 * Run:      ./generate_gpt2cu --load model.bin --tokenizer tokenizer.bin --prompt "Once upon a time"
 * Options:  ./generate_gpt2cu --help
 *
 * Memory of the GPU in bytes:
 *       248,951,808  parameters
 *        37,748,736  keys and values of each sequence
 *         4,718,592  activations
 *           405,504  scratch of the kernel that runs
 *
 * Contents: sizes, tensors, basics, the GPU, matrix products, layers, the model, weights, tokenizer, encoder, sampling,
 * generation, arguments, main.
 */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "this source needs a later architecture than nvcc was told: compile it as the line at its top says"
#endif

typedef __nv_bfloat16 bf16;
typedef bf16 floatX; /* activations and the weights the model works with */
typedef bf16 floatR; /* the residual stream */

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

enum {
    L = 12,           /* layers */
    NH = 12,          /* attention heads */
    HS = 64,          /* channels of a head */
    C = 768,          /* channels: NH * HS */
    V = 50257,        /* tokens in the vocabulary */
    VP = 50304,       /* V rounded up to a multiple of 128; the rows past V stay zero */
    MAXT = 1024,      /* longest sequence the position embeddings reach */
    CONTEXT = 1024,   /* tokens of a sequence, prompt included */
    CACHE = 1024,     /* the same, in the cache: rounded up to a multiple of 32 */
    PIECE = 512,      /* tokens that decode takes at most: a longer prompt goes in several pieces */
    SEQUENCES = 16,   /* sequences that are generated side by side, at most */
    CACHE_PARTS = 8,  /* of a sequence, that blocks attend to side by side */
};
static const size_t CACHED_VALUES = 18874368; /* values of a sequence in the cache */
static const float NORM_EPSILON = 1e-05f; /* added to the variance in a norm */

/* ---- tensors: one allocation on the GPU for each kind of memory; all offsets are computed by llmgen -------------- */

/* One pointer for each tensor, to its first layer. */
static struct {
    floatX *wte;       /* (VP, C) */
    floatX *wpe;       /* (MAXT, C) */
    floatX *ln1w;      /* (L, C) */
    floatX *ln1b;      /* (L, C) */
    floatX *qkvw;      /* (L, 3*C, C) */
    floatX *qkvb;      /* (L, 3*C) */
    floatX *attprojw;  /* (L, C, C) */
    floatX *attprojb;  /* (L, C) */
    floatX *ln2w;      /* (L, C) */
    floatX *ln2b;      /* (L, C) */
    floatX *fcw;       /* (L, 4*C, C) */
    floatX *fcb;       /* (L, 4*C) */
    floatX *fcprojw;   /* (L, C, 4*C) */
    floatX *fcprojb;   /* (L, C) */
    floatX *lnfw;      /* (C) */
    floatX *lnfb;      /* (C) */
} params;

/* Keys and values of the tokens that were decoded. A sequence has all of this; the next follows CACHED_VALUES further on. */
static struct {
    floatX *keys;    /* (L, NH, CACHE, HS) */
    floatX *values;  /* (L, NH, CACHE, HS) */
} cache;

/* What decode computes, for n tokens, and m rows of logits. */
static struct {
    floatX *residual;   /* (n, C) */
    floatX *ln1;        /* (n, C) */
    float *ln1_mean;    /* (n) */
    float *ln1_rstd;    /* (n) */
    floatX *qkv;        /* (n, 3*C) */
    floatX *attention;  /* (n, C) */
    floatX *ln2;        /* (n, C) */
    float *ln2_mean;    /* (n) */
    float *ln2_rstd;    /* (n) */
    floatX *gelu;       /* (n, 4*C) */
    floatX *lnf;        /* (n, C) */
    float *lnf_mean;    /* (n) */
    float *lnf_rstd;    /* (n) */
    floatX *selected;   /* (m, C) */
    float *logits;      /* (m, VP) */
} acts;

/* The parameters in the order of the files. A file holds them back to back; in memory every layer of every tensor starts
 * at a multiple of 256 bytes. */
typedef struct {
    floatX **tensor;
    size_t offset, stride; /* of the first layer, and from one layer to the next, in values */
    size_t count;          /* values of a layer */
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

static floatX *params_memory;

/* What decode is called with, as its kernels read it: so a recorded launch serves every call. */
static struct {
    int *tokens, *sequences, *positions; /* (PIECE) each */
    int *rows;                           /* (SEQUENCES) */
} inputs;

static float *scratch; /* partial results of the kernel that runs */

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

/* ---- the GPU: errors, its one stream, its memory ----------------------------------------------------------------- */

static cudaStream_t stream; /* everything runs on it, in order */

/* Ends the program if a call of the CUDA runtime failed. */
#define cudaCheck(call) cuda_check((call), #call, __FILE__, __LINE__)
static void cuda_check(cudaError_t error, const char *call, const char *file, int line) {
    if (error != cudaSuccess) die(1, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
}

__global__ void probe_kernel(void) {}

static cudaDeviceProp gpu; /* what it says of itself */

/* Takes the first GPU that the environment shows, and refuses one that this program was not compiled for. */
static void open_gpu(void) {
    const cudaError_t error = cudaGetDeviceProperties(&gpu, 0);
    if (error != cudaSuccess) die(1, "no GPU can be used: %s; nvidia-smi should list one", cudaGetErrorString(error));
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, probe_kernel) != cudaSuccess) {
        die(1, "%s (sm_%d%d): this program is compiled for sm_80; build it with --arch sm_%d%d", gpu.name, gpu.major,
            gpu.minor, gpu.major, gpu.minor);
    }
    cudaCheck(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
}

/* Memory of the model: zeroed, and counted, so that the program can say what it uses. */
static void *allocate_tensors(size_t bytes) {
    void *memory = NULL;
    if (cudaMalloc(&memory, bytes ? bytes : 256) != cudaSuccess) {
        size_t free_bytes = 0, total = 0;
        cudaGetLastError();
        cudaMemGetInfo(&free_bytes, &total);
        die(1, "out of memory: %zu bytes were refused after %zu, with %zu free; give a smaller --batch", bytes, model_bytes,
            free_bytes);
    }
    cudaCheck(cudaMemsetAsync(memory, 0, bytes, stream));
    model_bytes += bytes;
    return memory;
}

/* Room on the host for so many values on their way to or from the GPU; the same room each time. */
static float *staging(size_t count) {
    static float *values;
    static size_t room;
    if (count > room) {
        free(values);
        values = (float *)allocate(count * sizeof(float));
        room = count;
    }
    return values;
}

static void to_gpu(void *gpu, const void *host, size_t bytes) {
    cudaCheck(cudaMemcpyAsync(gpu, host, bytes, cudaMemcpyHostToDevice, stream));
    cudaCheck(cudaStreamSynchronize(stream));
}

/* count weights, rounded to the type that the model works with; values may be used for that. */
static void floats_to_gpu(floatX *gpu, float *values, size_t count) {
    char *halves = (char *)values; /* a half is written where what it was made from has been read */
    for (size_t i = 0; i < count; i++) {
        const bf16 rounded = __float2bfloat16(values[i]);
        memcpy(halves + i * sizeof rounded, &rounded, sizeof rounded);
    }
    to_gpu(gpu, values, count * sizeof(floatX));
}

static void from_gpu(void *host, const void *gpu, size_t bytes) {
    cudaCheck(cudaMemcpyAsync(host, gpu, bytes, cudaMemcpyDeviceToHost, stream));
    cudaCheck(cudaStreamSynchronize(stream));
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

/* ---- PTX, one instruction each ----------------------------------------------------------------------------------- */

/* Shared memory as the instructions below address it. */
__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
/* 16 bytes from global to shared memory, past the registers; of them only `bytes` are read, the rest become 0. */
__device__ __forceinline__ void cp_async(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most PENDING of the committed groups are still under way. */
template <int PENDING>
__device__ __forceinline__ void cp_async_wait(void) { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
/* Four 8x8 matrices of bf16: lanes 8i to 8i+7 give the addresses of the rows of matrix i; r[i] is this lane's part of it. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 { %0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

/* The same, each matrix transposed. */
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 { %0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

/* d (16x8, float) += a (16x16) . b (16x8), by one warp. */
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %0, %1, %2, %3}, { %4, %5, %6, %7}, { %8, %9}, "
                 "{ %0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* 2^x, to 2 units in the last place; results below the normal range are 0. */
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Asks for the line of 128 bytes at p; whatever p is, nothing but time is lost. */
__device__ __forceinline__ void prefetch_l2(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/* ---- rows, packs and sums: what the kernels that are bound by memory are made of --------------------------------- */

template <class Value>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

/* N values side by side, which move at once: 16 bytes an instruction, or fewer bytes where N is small. */
template <class Value, int N>
struct alignas(sizeof(Value) * N < 16 ? sizeof(Value) * N : 16) Pack {
    Value at[N];

    /* Value i as a float. A bf16 is the upper half of one: of two side by side each takes one instruction. */
    __device__ __forceinline__ float operator[](int i) const {
        if constexpr (IS_BF16<Value> && N % 2 == 0) {
            const uint32_t two = ((const uint32_t *)at)[i / 2];
            return __uint_as_float(i % 2 ? two & 0xffff0000u : two << 16);
        } else {
            return (float)at[i];
        }
    }
};

template <int N, class Value>
__device__ __forceinline__ Pack<Value, N> load_pack(const Value *p) { return *(const Pack<Value, N> *)p; }

template <int N, class Value>
__device__ __forceinline__ void store_pack(Value *p, const Pack<Value, N> &pack) {
    if (sizeof pack % 16 == 0) { /* so that the compiler does not take it apart */
        for (int i = 0; i < (int)(sizeof pack / 16); i++) ((uint4 *)p)[i] = ((const uint4 *)&pack)[i];
    } else {
        *(Pack<Value, N> *)p = pack;
    }
}

/* How many values of a row of c move at once: 16 bytes of floatX if all rows start at multiples of that, else fewer. */
constexpr int pack_width(int c) {
    int width = 16 / sizeof(floatX);
    while (c % width) width /= 2;
    return width;
}

/* How many warps share a row of c: as few lanes idle as can be, and no thread has more than `most` values (unless 32 warps do
 * not suffice for that), since these lie in registers. */
constexpr int row_warps(int c, int most) {
    const int packs = c / pack_width(c);
    int best = 32, least_slots = 1 << 30;
    for (int warps = 1; warps <= 32; warps++) {
        const int each = (packs + 32 * warps - 1) / (32 * warps);
        if (each * pack_width(c) > most || each * warps >= least_slots) continue;
        best = warps;
        least_slots = each * warps;
    }
    return best;
}

/* A row of C channels: pack k of a thread starts at channel (k * ROW_THREADS + thread) * ROW_WIDTH. */
enum {
    ROW_WIDTH = pack_width(C),
    ROW_THREADS = 32 * row_warps(C, 24),
    ROW_PACKS = (C + ROW_THREADS * ROW_WIDTH - 1) / (ROW_THREADS * ROW_WIDTH), /* of a thread */
    BLOCK_ROWS = ROW_THREADS == 32 ? 4 : 1,                                    /* rows that a block has at a time */
    ROW_BLOCK = BLOCK_ROWS * ROW_THREADS,                                      /* threads of such a block */
};

/* Whether channel i belongs to a row: always, where the packs of the threads are the row exactly. */
__device__ __forceinline__ bool in_row(int i) { return ROW_THREADS * ROW_PACKS * ROW_WIDTH == C || i < C; }

static int row_blocks(int n) { return (n + BLOCK_ROWS - 1) / BLOCK_ROWS; }

/* The same for a norm's forward. It keeps nothing but the row in registers, so that a thread may have more of it: mostly one
 * warp has the row, and no warp waits for another. */
enum {
    NORM_ROW_THREADS = 32 * row_warps(C, 64),
    NORM_ROW_PACKS = (C + NORM_ROW_THREADS * ROW_WIDTH - 1) / (NORM_ROW_THREADS * ROW_WIDTH),
    NORM_BLOCK_ROWS = NORM_ROW_THREADS == 32 ? 4 : 1, /* of a block */
    NORM_ROW_BLOCK = NORM_BLOCK_ROWS * NORM_ROW_THREADS,
};
__device__ __forceinline__ bool in_norm_row(int i) { return NORM_ROW_THREADS * NORM_ROW_PACKS * ROW_WIDTH == C || i < C; }

/* The sum over the lanes of a warp, for each of them, in the same order always. */
template <class Value>
__device__ __forceinline__ Value warp_sum(Value x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lane));
    return x;
}

/* Each of N numbers summed over the THREADS of a row; all of these get the sums. */
template <int THREADS, int N>
__device__ __forceinline__ void row_sums(float (&x)[N]) {
    for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
    if (THREADS == 32) return;
    __shared__ float warps[THREADS / 32][N];
    __syncthreads(); /* all have read the sums before */
    for (int i = 0; i < N; i++)
        if (threadIdx.x % 32 == i) warps[threadIdx.x / 32][i] = x[i];
    __syncthreads();
    for (int i = 0; i < N; i++) {
        x[i] = 0.0f;
        for (int warp = 0; warp < THREADS / 32; warp++) x[i] += warps[warp][i];
    }
}

/* exp(x): in bfloat16 programs by the processor's own 2^x, within 2^-22. */
__device__ __forceinline__ float fast_exp(float x) {
    return exp2_approx(x * 1.4426950408889634f);
}

__device__ __forceinline__ float fast_divide(float a, float b) {
    return __fdividef(a, b); /* 0 where b is above 2^126 */
}

/* ---- GELU: x/2 * (1 + tanh(u)) with u = sqrt(2/pi) * (x + 0.044715 x^3), which equals x / (1 + exp(-2u)) --------- */

/* s = 1 / (1 + exp(-2u)), the exponential kept finite. */
__device__ __forceinline__ float gelu_factor(float x) {
    return fast_divide(1.0f, 1.0f + fast_exp(fminf(x * (-1.5957691216f - 0.0713548162726f * x * x), 80.0f)));
}

__device__ __forceinline__ float gelu_value(float x) { return x * gelu_factor(x); }

/* ---- matrix products ------------------------------------------------------------------------------------------------
 *
 *   FORWARD           out (n, oc)      = inp (n, c) . weight (oc, c)^T    both operands have k, the summation index,
 *                                                                         contiguous in memory
 *   INPUT_GRADIENT    dinp (n, c)      = dout (n, oc) . weight (oc, c)    the left one has k contiguous, the right one
 *                                                                         the columns of the result
 *   WEIGHT_GRADIENT   dweight (oc, c)  = dout (n, oc)^T . inp (n, c)      left: rows of the result; right: its columns
 * One kernel serves all three: out (m, n) = a . b with k terms in each sum. The lanes of an operand are the rows of
 * out for a and its columns for b; memory holds either k behind k of one lane (BY_K) or lane behind lane of one k. No
 * matrix is ever transposed.
 *
 * Sums are floats and each is made in one order, so that the same inputs give the same bits. */

enum { FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT }; /* layouts */
enum { ADD, GELU, TIMES_GELU_GRADIENT };           /* what the epilogue does */

/* ADD: out = sum + bias + extra.  GELU: kept = sum + bias, out = gelu(kept).
 * TIMES_GELU_GRADIENT: out = sum * gelu'(extra), which is what was kept. */
template <class Out, class Extra>
struct Epilogue {
    Out *out;            /* (m, n) */
    floatX *kept;        /* (m, n) or NULL */
    const floatX *bias;  /* (n) or NULL */
    const Extra *extra;  /* (m, n), or NULL with ADD; may be out */
};

/* Four values side by side, of which the first `count` exist; ALIGNED: all of them, at a multiple of their size. */
template <bool ALIGNED>
__device__ __forceinline__ void load_four(float (&x)[4], const float *from, int count) {
    if (ALIGNED) {
        const float4 v = *(const float4 *)from;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = i < count ? from[i] : 0.0f;
    }
}

template <bool ALIGNED>
__device__ __forceinline__ void store_four(float *to, const float (&x)[4], int count) {
    if (ALIGNED) {
        *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) to[i] = x[i];
    }
}

template <bool ALIGNED>
__device__ __forceinline__ void load_four(float (&x)[4], const bf16 *from, int count) {
    if (ALIGNED) {
        const uint2 v = *(const uint2 *)from; /* a bf16 is the upper half of a float */
        x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
        x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = i < count ? __bfloat162float(from[i]) : 0.0f;
    }
}

template <bool ALIGNED>
__device__ __forceinline__ void store_four(bf16 *to, const float (&x)[4], int count) {
    if (ALIGNED) {
        __nv_bfloat162 v[2] = {__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])};
        *(uint2 *)to = *(const uint2 *)v;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < count) to[i] = __float2bfloat16(x[i]);
    }
}

/* What becomes of four sums side by side, the first of them out[at]. */
template <int THEN, bool ALIGNED, class Out, class Extra>
__device__ __forceinline__ void finish(const Epilogue<Out, Extra> &then, size_t at, int count, float (&sum)[4],
                                       const float (&bias)[4], const float (&extra)[4]) {
    if (THEN == TIMES_GELU_GRADIENT) {
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += bias[i];
    }
    if (THEN == GELU) {
        if (then.kept) store_four<ALIGNED>(then.kept + at, sum, count);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = gelu_value(sum[i]);
    }
    if (THEN == ADD) {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += extra[i];
    }
    store_four<ALIGNED>(then.out + at, sum, count);
}

/* The tiles of out in the order of the blocks: in bands of BAND tiles high, top to bottom first, then to the right.
 * Blocks that run at the same time then share rows of a and columns of b, and find them in the L2 cache. */
__device__ __forceinline__ void tile_at(int *row, int *column, int index, int rows, int columns) {
    constexpr int BAND = 16;
    const int band = index / (BAND * columns), first = band * BAND, high = min(BAND, rows - first);
    index -= first * columns;
    *row = first + index % high;
    *column = index / high;
}

/* ---- products of bf16 on tensor cores -------------------------------------------------------------------------------
 * A block of THREADS makes a tile of out, ROWS x COLUMNS, in steps of DEPTH of k. The operands of the next STAGES - 1
 * steps are on their way into shared memory (cp.async) while one is multiplied. Each of the WARPS_M x WARPS_N warps
 * makes a rectangle of the tile by mma m16n8k16, with the fragments of the next 16 of k already on their way from
 * shared memory to registers. BLOCKS of them run on a multiprocessor: with two, the epilogue of one is hidden behind
 * the sums of the other. */
struct Tile128x256 {
    enum { ROWS = 128, COLUMNS = 256, DEPTH = 32, STAGES = 4 };
    enum { WARPS_M = 2, WARPS_N = 4, THREADS = 256, BLOCKS = 1 };
};
struct Tile64x64 {
    enum { ROWS = 64, COLUMNS = 64, DEPTH = 64, STAGES = 3 };
    enum { WARPS_M = 2, WARPS_N = 2, THREADS = 128, BLOCKS = 3 };
};

/* A step of one operand in shared memory is rows of 16-byte chunks: BY_K a row is one lane, else it is one k. Where
 * chunk c of row r lies, in bytes: exchanged within its row such that eight rows of the same chunk, which one ldmatrix
 * reads, and eight neighbours in a row, which one cp.async writes, lie in different banks. */
template <int CHUNKS>
__device__ __forceinline__ int place(int row, int chunk) {
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "");
    return (row * CHUNKS + (chunk ^ (CHUNKS == 4 ? row / 2 % 4 : row % 8))) * 16;
}

/* Brings one step of an operand, LANES from lane0 on by DEPTH from k0 on, from global to shared memory, and `next`,
 * where this thread's first chunk of it lies, on to the step after. What is no lane, or lies at `end` of k or beyond,
 * is 0. */
template <bool BY_K, int LANES, int DEPTH, int THREADS, bool ALIGNED>
__device__ __forceinline__ void fetch(unsigned char *to, const bf16 *&next, int lane0, int lanes, int k0, int end,
                                      int k) {
    constexpr int CHUNKS = (BY_K ? DEPTH : LANES) / 8, ROWS = BY_K ? LANES : DEPTH, APART = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % APART == 0, "");
    const int row0 = (int)threadIdx.x / CHUNKS, chunk = (int)threadIdx.x % CHUNKS;
    const int lane = lane0 + (BY_K ? row0 : chunk * 8), at = k0 + (BY_K ? chunk * 8 : row0);
    const size_t stride = (size_t)APART * (BY_K ? k : lanes);
    if (ALIGNED) {
        const uint32_t address = shared_address(to);
#pragma unroll
        for (int i = 0; i < ROWS / APART; i++) {
            const bool there = BY_K ? at < end && lane + i * APART < lanes : at + i * APART < end && lane < lanes;
            cp_async(address + place<CHUNKS>(row0 + i * APART, chunk), next + i * stride, there ? 16 : 0);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < ROWS / APART; i++) {
            __align__(16) bf16 value[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool there = BY_K ? at + j < end && lane + i * APART < lanes
                                        : at + i * APART < end && lane + j < lanes;
                value[j] = there ? next[i * stride + j] : __float2bfloat16(0.0f);
            }
            *(uint4 *)(to + place<CHUNKS>(row0 + i * APART, chunk)) = *(const uint4 *)value;
        }
    }
    next += BY_K ? (size_t)DEPTH : (size_t)DEPTH * lanes;
}

/* Where a thread's first chunk of the step from k0 on lies. */
template <bool BY_K, int LANES, int DEPTH>
__device__ __forceinline__ const bf16 *first_chunk(const bf16 *from, int lane0, int lanes, int k0, int k) {
    constexpr int CHUNKS = (BY_K ? DEPTH : LANES) / 8;
    const int row = (int)threadIdx.x / CHUNKS, chunk = (int)threadIdx.x % CHUNKS * 8;
    return from + (BY_K ? (size_t)(lane0 + row) * k + k0 + chunk : (size_t)(k0 + row) * lanes + lane0 + chunk);
}

/* Fragments of COUNT times 16 lanes by 16 of k, as mma_bf16 takes a; `at`: where this thread's row of the first one
 * lies in the step, see below. Each 16 lanes further are 16 rows or two chunks, each 16 of k two chunks or 16 rows. */
template <bool BY_K, int LANES, int DEPTH, int COUNT>
__device__ __forceinline__ void load_fragments(uint32_t (&fragment)[COUNT][4], uint32_t step, int at, int k16) {
    constexpr int ROW_BYTES = (BY_K ? DEPTH : LANES) * 2;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (BY_K)
            ldmatrix_x4(fragment[i], step + ((at ^ (k16 * 32)) + i * 16 * ROW_BYTES));
        else
            ldmatrix_x4_trans(fragment[i], step + ((at ^ (i * 32)) + k16 * 16 * ROW_BYTES));
    }
}

/* The row of shared memory that a thread names for ldmatrix, of the 16 lanes that begin at `lane`. The four 8x8
 * matrices are, for a, lanes 0 to 7 and 8 to 15 of the first eight k, then of the last eight; for b (two times eight
 * lanes) the first and the last eight k of lanes 0 to 7, then of 8 to 15. */
template <bool BY_K, int LANES, int DEPTH>
__device__ __forceinline__ int fragment_row(int lane, bool is_b) {
    constexpr int CHUNKS = (BY_K ? DEPTH : LANES) / 8;
    const int thread = (int)threadIdx.x % 32, inner = thread / 8 % 2, outer = thread / 16;
    const int lane8 = is_b ? outer : inner, k8 = is_b ? inner : outer;
    if (BY_K) return place<CHUNKS>(lane + lane8 * 8 + thread % 8, k8);
    return place<CHUNKS>(k8 * 8 + thread % 8, lane / 8 + lane8);
}

/* Asks for the values that the epilogue will add or multiply by: they reach the L2 cache while the sums are made. */
template <class Tile, class Extra>
__device__ __forceinline__ void prefetch_extra(const Extra *extra, int row0, int column0, int m, int n) {
    constexpr int LINE = 128 / sizeof(Extra), LINES = Tile::COLUMNS / LINE;
#pragma unroll
    for (int i = (int)threadIdx.x; i < Tile::ROWS * LINES; i += Tile::THREADS) {
        const int row = row0 + i / LINES, column = column0 + i % LINES * LINE;
        if (row < m && column < n) prefetch_l2(extra + (size_t)row * n + column);
    }
}

/* out (m, n) = a . b, then the epilogue. Grid: (tiles, parts); a part sums its share of k into its own out, m * n
 * further on. sums, with TIMES_GELU_GRADIENT, (WARPS_M * rows of tiles, n) or NULL: partial sums of the
 * columns of out. */
template <class Tile, int LAYOUT, int THEN, bool ALIGNED, class Out, class Extra>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS)
    matmul_kernel(Epilogue<Out, Extra> then, const bf16 *a, const bf16 *b, int m, int n, int k,
                  float *sums) {
    constexpr int ROWS = Tile::ROWS, COLUMNS = Tile::COLUMNS, DEPTH = Tile::DEPTH, STAGES = Tile::STAGES;
    constexpr bool A_BY_K = LAYOUT != WEIGHT_GRADIENT, B_BY_K = LAYOUT == FORWARD;
    constexpr int A_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = A_BYTES + COLUMNS * DEPTH * 2;
    constexpr int HIGH = ROWS / Tile::WARPS_M, WIDE = COLUMNS / Tile::WARPS_N; /* of a warp's rectangle */
    constexpr int M16 = HIGH / 16, N16 = WIDE / 16, K16 = DEPTH / 16;
    static_assert(K16 % 2 == 0 && HIGH % 16 == 0 && (WIDE == 32 || WIDE == 64), "");
    extern __shared__ __align__(128) unsigned char shared[];

    const int tile_rows = (m + ROWS - 1) / ROWS, tile_columns = (n + COLUMNS - 1) / COLUMNS;
    const int steps = (k + DEPTH - 1) / DEPTH;
    const int first = (int)((long long)steps * blockIdx.y / gridDim.y);
    const int last = (int)((long long)steps * (blockIdx.y + 1) / gridDim.y);
    int tile_row, tile_column;
    tile_at(&tile_row, &tile_column, (int)blockIdx.x, tile_rows, tile_columns);
    const int row0 = tile_row * ROWS, column0 = tile_column * COLUMNS;
    const int warp = (int)threadIdx.x / 32, thread = (int)threadIdx.x % 32;
    const int warp_row = warp / Tile::WARPS_N * HIGH, warp_column = warp % Tile::WARPS_N * WIDE;
    const int a_at = fragment_row<A_BY_K, ROWS, DEPTH>(warp_row, false);
    const int b_at = fragment_row<B_BY_K, COLUMNS, DEPTH>(warp_column, true);
    const uint32_t stages = shared_address(shared);

    float sum[M16][2 * N16][4] = {};
    uint32_t a_fragment[2][M16][4], b_fragment[2][N16][4]; /* of these 16 of k, and of the next */

    const int end = min(last * DEPTH, k);
    const bf16 *a_next = first_chunk<A_BY_K, ROWS, DEPTH>(a, row0, m, first * DEPTH, k);
    const bf16 *b_next = first_chunk<B_BY_K, COLUMNS, DEPTH>(b, column0, n, first * DEPTH, k);
    auto fetch_step = [&](int step, int stage) { /* beyond the last one: zeros, so that the loop needs no branch */
        unsigned char *to = shared + stage * STAGE_BYTES;
        fetch<A_BY_K, ROWS, DEPTH, Tile::THREADS, ALIGNED>(to, a_next, row0, m, step * DEPTH, end, k);
        fetch<B_BY_K, COLUMNS, DEPTH, Tile::THREADS, ALIGNED>(to + A_BYTES, b_next, column0, n, step * DEPTH, end, k);
        cp_async_commit();
    };

    for (int i = 0; i < STAGES - 1; i++) fetch_step(first + i, i);
    if (sizeof(Extra) == 2 && then.extra) /* floats are too many for the L2 */
        prefetch_extra<Tile>(then.extra, row0, column0, m, n);
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_fragments<A_BY_K, ROWS, DEPTH>(a_fragment[0], stages, a_at, 0);
    load_fragments<B_BY_K, COLUMNS, DEPTH>(b_fragment[0], stages + A_BYTES, b_at, 0);
    int stage = 0, next_fetched = STAGES - 1;
    for (int step = first; step < last; step++) {
#pragma unroll
        for (int k16 = 0; k16 < K16; k16++) {
            if (k16 == K16 - 1) { /* the last fragments of this stage are in registers: it may be filled again */
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
            const uint32_t from = stages + stage * STAGE_BYTES;
            const int next = (k16 + 1) % 2, at16 = (k16 + 1) % K16;
            load_fragments<A_BY_K, ROWS, DEPTH>(a_fragment[next], from, a_at, at16);
            load_fragments<B_BY_K, COLUMNS, DEPTH>(b_fragment[next], from + A_BYTES, b_at, at16);
            if (k16 == 0) {
                fetch_step(step + STAGES - 1, next_fetched);
                next_fetched = next_fetched + 1 == STAGES ? 0 : next_fetched + 1;
            }
#pragma unroll
            for (int i = 0; i < M16; i++)
#pragma unroll
                for (int j = 0; j < 2 * N16; j++) {
                    const uint32_t(&b16)[4] = b_fragment[k16 % 2][j / 2];
                    mma_bf16(sum[i][j], a_fragment[k16 % 2][i], b16[j % 2 * 2], b16[j % 2 * 2 + 1]);
                }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    /* Sums lie two by two, scattered over the rows. Sixteen rows at a time they go through shared memory (whose rows
     * are shifted by eight banks each), after which a warp holds whole rows, four columns in a thread. */
    constexpr int PITCH = WIDE + 8, QUADS = WIDE / 4, TURNS = 16 * QUADS / 32;
    static_assert(16 * PITCH * 4 * (Tile::THREADS / 32) <= STAGES * STAGE_BYTES, "");
    float *mine = (float *)shared + warp * 16 * PITCH;
    const int column = column0 + warp_column + thread % QUADS * 4, count = n - column;
    float bias[4] = {}, of_out[4] = {};
    then.out += (size_t)blockIdx.y * (size_t)m * (size_t)n;
    if (then.bias && count > 0) load_four<ALIGNED>(bias, then.bias + column, count);
#pragma unroll
    for (int i = 0; i < M16; i++) {
        const int row = row0 + warp_row + i * 16 + thread / QUADS;
        float extra[TURNS][4] = {};
        if (then.extra && count > 0) {
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                const int r = row + turn * (32 / QUADS);
                if (r < m) load_four<ALIGNED>(extra[turn], then.extra + (size_t)r * n + column, count);
            }
        }
#pragma unroll
        for (int j = 0; j < 2 * N16; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(float2 *)(mine + (half * 8 + thread / 4) * PITCH + j * 8 + thread % 4 * 2) =
                    make_float2(sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
        __syncwarp();
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int r = row + turn * (32 / QUADS);
            float four[4];
            load_four<true>(four, mine + (turn * (32 / QUADS) + thread / QUADS) * PITCH + thread % QUADS * 4, 4);
            if (r < m && count > 0) {
                finish<THEN, ALIGNED>(then, (size_t)r * n + column, count, four, bias, extra[turn]);
#pragma unroll
                for (int c = 0; c < 4 && THEN == TIMES_GELU_GRADIENT; c++) of_out[c] += four[c];
            }
        }
        __syncwarp();
    }
    if (THEN == TIMES_GELU_GRADIENT && sums) {
#pragma unroll
        for (int lane = 16; lane >= QUADS; lane /= 2)
#pragma unroll
            for (int c = 0; c < 4; c++) of_out[c] += __shfl_xor_sync(0xffffffff, of_out[c], lane);
        const size_t to = (size_t)(tile_row * Tile::WARPS_M + warp / Tile::WARPS_N) * n + column;
        if (thread < QUADS && count > 0) store_four<ALIGNED>(sums + to, of_out, count);
    }
}

/* ALIGNED: the rows of every matrix are multiples of 16 bytes. */
template <class Tile, int LAYOUT, int THEN, bool ALIGNED, class Out, class Extra>
static void matmul(Epilogue<Out, Extra> then, const bf16 *a, const bf16 *b, int m, int n, int k, int parts = 1,
                   float *sums = NULL) {
    constexpr int SHARED = Tile::STAGES * (Tile::ROWS + Tile::COLUMNS) * Tile::DEPTH * 2;
    const int tiles = ((m + Tile::ROWS - 1) / Tile::ROWS) * ((n + Tile::COLUMNS - 1) / Tile::COLUMNS);
    cudaCheck(cudaFuncSetAttribute(matmul_kernel<Tile, LAYOUT, THEN, ALIGNED, Out, Extra>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
    const dim3 grid(tiles, parts);
    matmul_kernel<Tile, LAYOUT, THEN, ALIGNED><<<grid, Tile::THREADS, SHARED, stream>>>(then, a, b, m, n, k, sums);
    cudaCheck(cudaGetLastError());
}

/* ---- token embedding: out[i] = wte[tokens[i]] -------------------------------------------------------------------- */

__global__ void __launch_bounds__(ROW_BLOCK) token_embedding_kernel(floatR *out, const int *tokens, const floatX *wte, int n,
                                                                    int c) {
    const int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / ROW_THREADS, thread = threadIdx.x % ROW_THREADS;
    if (row >= n) return;
    const floatX *w = wte + (size_t)tokens[row] * c;
    for (int k = 0; k < ROW_PACKS; k++) {
        const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
        if (!in_row(i)) break;
        const Pack<floatX, ROW_WIDTH> x = load_pack<ROW_WIDTH>(w + i);
        Pack<floatR, ROW_WIDTH> y;
        for (int j = 0; j < ROW_WIDTH; j++) y.at[j] = (floatR)x[j];
        store_pack(out + (size_t)row * c + i, y);
    }
}

static void token_embedding_forward(floatR *out,                            /* (n, c) */
                                    const int *tokens, const floatX *wte, /* (n), (V, c) */
                                    int n, int c) {
    token_embedding_kernel<<<row_blocks(n), ROW_BLOCK, 0, stream>>>(out, tokens, wte, n, c);
    cudaCheck(cudaGetLastError());
}

/* ---- position embedding: out[i] = inp[i] + wpe[positions[i]] ----------------------------------------------------- */

__global__ void __launch_bounds__(ROW_BLOCK) position_embedding_kernel(floatR *out, const floatR *inp, const floatX *wpe,
                                                                       const int *positions, int n, int c) {
    const int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / ROW_THREADS, thread = threadIdx.x % ROW_THREADS;
    if (row >= n) return;
    const size_t at = (size_t)row * c, position = (size_t)positions[row] * c;
    for (int k = 0; k < ROW_PACKS; k++) {
        const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
        if (!in_row(i)) break;
        Pack<floatR, ROW_WIDTH> x = load_pack<ROW_WIDTH>(inp + at + i);
        const Pack<floatX, ROW_WIDTH> p = load_pack<ROW_WIDTH>(wpe + position + i);
        for (int j = 0; j < ROW_WIDTH; j++) x.at[j] = (floatR)(x[j] + p[j]);
        store_pack(out + at + i, x);
    }
}

static void position_embedding_forward(floatR *out,                           /* (n, c); may be inp */
                                       const floatR *inp, const floatX *wpe, /* (n, c), (MAXT, c) */
                                       const int *positions, int n, int c) { /* (n) */
    position_embedding_kernel<<<row_blocks(n), ROW_BLOCK, 0, stream>>>(out, inp, wpe, positions, n, c);
    cudaCheck(cudaGetLastError());
}

/* ---- layer norm: out = xhat * weight + bias with xhat = (inp - mean) * rstd, over each row of c channels --------- */

/* A row lies in the registers of its threads, so that it is read once. */
__global__ void __launch_bounds__(NORM_ROW_BLOCK)
    layernorm_forward_kernel(floatX *out, float *mean, float *rstd, const floatR *inp,
                             const floatX *weight, const floatX *bias, int n, int c) {
    const int row = blockIdx.x * NORM_BLOCK_ROWS + threadIdx.x / NORM_ROW_THREADS, thread = threadIdx.x % NORM_ROW_THREADS;
    if (row >= n) return;
    const size_t at = (size_t)row * c;
    Pack<floatR, ROW_WIDTH> x[NORM_ROW_PACKS] = {};
    for (int k = 0; k < NORM_ROW_PACKS; k++) {
        const int i = (k * NORM_ROW_THREADS + thread) * ROW_WIDTH;
        if (in_norm_row(i)) x[k] = load_pack<ROW_WIDTH>(inp + at + i);
    }
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    for (int k = 0; k < NORM_ROW_PACKS; k++)
        for (int j = 0; j < ROW_WIDTH; j++) sum[0] += x[k][j];
    row_sums<NORM_ROW_THREADS>(sum);
    const float m = sum[0] / c;
    for (int k = 0; k < NORM_ROW_PACKS; k++) {
        if (!in_norm_row((k * NORM_ROW_THREADS + thread) * ROW_WIDTH)) break;
        for (int j = 0; j < ROW_WIDTH; j++) squares[0] += (x[k][j] - m) * (x[k][j] - m);
    }
    row_sums<NORM_ROW_THREADS>(squares);
    const float s = 1.0f / sqrtf(squares[0] / c + NORM_EPSILON), offset = -m * s; /* xhat = inp * s + offset */
    for (int k = 0; k < NORM_ROW_PACKS; k++) {
        const int i = (k * NORM_ROW_THREADS + thread) * ROW_WIDTH;
        if (!in_norm_row(i)) break;
        const Pack<floatX, ROW_WIDTH> w = load_pack<ROW_WIDTH>(weight + i), b = load_pack<ROW_WIDTH>(bias + i);
        Pack<floatX, ROW_WIDTH> y;
        for (int j = 0; j < ROW_WIDTH; j++)
            y.at[j] = (floatX)(fmaf(x[k][j], s, offset) * w[j] + b[j]);
        store_pack(out + at + i, y);
    }
    if (thread == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

static void layernorm_forward(floatX *out, float *mean, float *rstd, /* (n, c), (n), (n) */
                              const floatR *inp, const floatX *weight, const floatX *bias, /* (n, c), (c), (c) */
                              int n, int c) {
    const int blocks = (n + NORM_BLOCK_ROWS - 1) / NORM_BLOCK_ROWS;
    layernorm_forward_kernel<<<blocks, NORM_ROW_BLOCK, 0, stream>>>(out, mean, rstd, inp, weight, bias, n, c);
    cudaCheck(cudaGetLastError());
}

/* ---- linear: out = inp . weight^T + bias ------------------------------------------------------------------------- */

/* out (n, oc) = inp (n, c) . weight (oc, c)^T for at most SEQUENCES rows, then the epilogue: as fast as the weights come.
 * A block makes FEW_COLUMNS columns of out; its warps take turns at pieces of c, and their sums are added in the order of
 * the warps. A row of out does not depend on the others, nor on how many there are.
 *
 * Within a warp, lane 4 g + i takes FEW_WIDTH terms of every 4 * FEW_WIDTH, those from i * FEW_WIDTH on, of channel g.
 * The product is one of tensor cores, with 16 rows: it does not matter which of its k is which term, if the rows agree.
 */
enum { FEW_WIDTH = 16 / sizeof(floatX), FEW_COLUMNS = 8, FEW_WARPS = 8 };
static_assert(SEQUENCES <= 16, "a warp has sums of 16 rows");

template <int THEN, class Out, class Extra>
__global__ void __launch_bounds__(32 * FEW_WARPS)
    few_rows_kernel(Epilogue<Out, Extra> then, const floatX *inp, const floatX *weight, int n, int c, int oc) {
    __shared__ float sums[FEW_WARPS][16][FEW_COLUMNS];
    const int thread = (int)threadIdx.x, warp = thread / 32, g = thread % 32 / 4, first = thread % 4 * FEW_WIDTH;
    const int column0 = (int)blockIdx.x * FEW_COLUMNS;
    const bool there = column0 + g < oc;
    const floatX *w = weight + (size_t)(column0 + g) * c;
    const floatX *low = inp + (size_t)g * c, *high = low + (size_t)8 * c;
    float sum[4] = {};
#pragma unroll 4
    for (int k = warp * 4 * FEW_WIDTH; k < c; k += FEW_WARPS * 4 * FEW_WIDTH) {
        const uint4 zero = {0, 0, 0, 0};
        const int at = k + first;
        const uint4 b = there && at < c ? *(const uint4 *)(w + at) : zero;
        const uint4 l = g < n && at < c ? *(const uint4 *)(low + at) : zero;
        const uint4 h = g + 8 < n && at < c ? *(const uint4 *)(high + at) : zero;
        const uint32_t half[4] = {l.x, h.x, l.y, h.y}, other[4] = {l.z, h.z, l.w, h.w};
        mma_bf16(sum, half, b.x, b.y);
        mma_bf16(sum, other, b.z, b.w);
    }
    for (int i = 0; i < 4; i++) sums[warp][g + i / 2 * 8][thread % 4 * 2 + i % 2] = sum[i];
    __syncthreads();
    const int row = thread / FEW_COLUMNS, column = column0 + thread % FEW_COLUMNS;
    if (row >= n || column >= oc) return;
    const size_t at = (size_t)row * oc + column;
    float total = 0.0f;
    for (int i = 0; i < FEW_WARPS; i++) total += sums[i][row][thread % FEW_COLUMNS];
    if (then.bias) total += (float)then.bias[column];
    if (THEN == GELU) total = gelu_value(total);
    if (THEN == ADD && then.extra) total += (float)then.extra[at];
    then.out[at] = (Out)total;
}

template <int THEN, class Out, class Extra>
static void few_rows(Epilogue<Out, Extra> then, const floatX *inp, const floatX *weight, int n, int c, int oc) {
    const int blocks = (oc + FEW_COLUMNS - 1) / FEW_COLUMNS;
    few_rows_kernel<THEN><<<blocks, 32 * FEW_WARPS, 0, stream>>>(then, inp, weight, n, c, oc);
    cudaCheck(cudaGetLastError());
}

template <class Out, class Addend>
static void linear_forward(Out *out,                                                      /* (n, oc) */
                           const floatX *inp, const floatX *weight,                       /* (n, c), (oc, c) */
                           const floatX *bias, const Addend *addend, /* (oc) or NULL, (n, oc) or NULL; may be out */
                           int n, int c, int oc) {
    const Epilogue<Out, Addend> epilogue = {out, NULL, bias, addend};
    if (n <= SEQUENCES && c % FEW_WIDTH == 0) {
        few_rows<ADD>(epilogue, inp, weight, n, c, oc);
        return;
    }
    matmul<Tile64x64, FORWARD, ADD, true>(epilogue, inp, weight, n, oc, c);
}

/* pre = inp . weight^T + bias, and out = gelu(pre) while pre is still at hand. */
static void linear_gelu_forward(floatX *out, floatX *pre,                /* (n, oc), (n, oc) or NULL */
                                const floatX *inp, const floatX *weight, /* (n, c), (oc, c) */
                                const floatX *bias,                      /* (oc) or NULL */
                                int n, int c, int oc) {
    const Epilogue<floatX, floatX> epilogue = {out, pre, bias, NULL};
    if (n <= SEQUENCES && c % FEW_WIDTH == 0) {
        few_rows<GELU>(epilogue, inp, weight, n, c, oc);
        return;
    }
    matmul<Tile128x256, FORWARD, GELU, true>(epilogue, inp, weight, n, oc, c);
}

/* ---- attention of a prompt: out = softmax(q . k^T / sqrt(HS)) . v, each query seeing the keys up to its own ---------
 *
 * No T x T matrix ever exists: a block of queries meets one block of keys at a time (Dao 2023, arXiv:2307.08691). The
 * softmax runs along these blocks: the largest score and the sum are kept for each query, and what has been accumulated
 * is rescaled when the largest has grown by much. Heads lie side by side: a row of qkv holds all of q, then k, then v.
 * Keys and values are taken from the cache, where those of this call stand already.
 *
 * A warp owns M x 16 rows, on which it is alone: its scores s (M*16, N) come out of one product and go into the next
 * without leaving its registers. The tiles of the rows which pass by are double-buffered in shared memory:
 *
 *   for each tile:  wait for it, all threads;  fetch the next;  s = own rows . tile^T;  softmax;  sums += s . tile
 */

enum {
    ATTENTION_WARPS = 4,
    HEAD_PIECE = 8, /* values in 16 bytes */
    HEAD = (HS + 15) / 16 * 16, /* columns of a tile: HS, then 0s */
    HEAD_PITCH = HEAD + HEAD_PIECE, /* an odd number of pieces: no two of 8 rows begin in the same bank */

    /* How often 16 rows a warp has, rows of a tile passing by, thread blocks of a multiprocessor. */
    FORWARD_M = HS <= 128 ? 2 : 1, FORWARD_KEYS = 32, FORWARD_BLOCKS = HS <= 64 ? 3 : 2,
    FORWARD_QUERIES = ATTENTION_WARPS * FORWARD_M * 16,

    SOFTMAX_SLACK = 8,       /* what is subtracted from a score may be this far from the largest, in powers of 2 */
};

static const float LOG2E = 1.44269504089f;

/* A lane's part of scores and sums: of each 16 x 8 values its element e is in this row and this column. */
__device__ __forceinline__ int row_of(int m, int e) { return m * 16 + threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int n, int e) { return n * 8 + threadIdx.x % 4 * 2 + e % 2; }

/* The 4 lanes that share a row. */
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__device__ __forceinline__ bool sees(int query, int key) { return key <= query; }

/* tile (ROWS, HEAD) = rows of a head: `rows` there are, HS values each; the others are 0. */
template <int ROWS>
__device__ __forceinline__ void fetch_tile(floatX *tile, const floatX *from, size_t stride, int rows) {
    /* A row is fetched in pieces of 16 bytes or, where these are not aligned, value by value. */
    constexpr unsigned PIECES = HS % HEAD_PIECE == 0 ? HEAD / HEAD_PIECE : HEAD;
#pragma unroll
    for (unsigned start = 0; start < ROWS * PIECES; start += ATTENTION_WARPS * 32) {
        const unsigned i = start + threadIdx.x, row = i / PIECES, column = i % PIECES * (HEAD / PIECES);
        if (ROWS * PIECES % (ATTENTION_WARPS * 32) != 0 && row >= ROWS) break;
        const bool there = (int)row < rows && column < HS;
        if (PIECES < HEAD)
            cp_async(shared_address(tile + row * HEAD_PITCH + column), there ? from + row * stride + column : from,
                     there ? 16 : 0);
        else
            tile[row * HEAD_PITCH + column] = there ? from[row * stride + column] : (floatX)0.0f;
    }
}

/* The way back. */
template <int ROWS>
__device__ __forceinline__ void save_tile(floatX *to, size_t stride, const floatX *tile, int rows) {
    constexpr unsigned PIECES = HS % HEAD_PIECE == 0 ? HEAD / HEAD_PIECE : HEAD;
#pragma unroll
    for (unsigned start = 0; start < ROWS * PIECES; start += ATTENTION_WARPS * 32) {
        const unsigned i = start + threadIdx.x, row = i / PIECES, column = i % PIECES * (HEAD / PIECES);
        if (row >= ROWS || (int)row >= rows || column >= HS) continue;
        if (PIECES < HEAD)
            *(float4 *)(to + row * stride + column) = *(const float4 *)(tile + row * HEAD_PITCH + column);
        else
            to[row * stride + column] = tile[row * HEAD_PITCH + column];
    }
}

/* A warp's sums, times `factor`, into its rows of a tile. */
template <int M, int COLUMNS>
__device__ __forceinline__ void put_sums(floatX *tile, const float (&sums)[M][COLUMNS / 8][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                floatX *to = tile + row_of(m, e) * HEAD_PITCH + column_of(n, e);
                *(__nv_bfloat162 *)to = __floats2bfloat162_rn(sums[m][n][e] * factor, sums[m][n][e + 1] * factor);
            }
}

/* s (M*16, N) = a (M*16, HEAD) . b (N, HEAD)^T, both tiles. */
template <int M, int N>
__device__ __forceinline__ void rows_by_rows(float (&s)[M][N / 8][4], const bf16 *a, const bf16 *b) {
    const int lane = threadIdx.x % 32;
    const uint32_t from_a = shared_address(a + lane % 16 * HEAD_PITCH + lane / 16 * 8);
    const uint32_t from_b = shared_address(b + (lane % 8 + lane / 16 * 8) * HEAD_PITCH + lane / 8 % 2 * 8);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < HEAD; k += 16) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(x[m], from_a + (m * 16 * HEAD_PITCH + k) * (int)sizeof(bf16));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t y[4];
            ldmatrix_x4(y, from_b + (n * HEAD_PITCH + k) * (int)sizeof(bf16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(s[m][n / 8], x[m], y[0], y[1]);
                mma_bf16(s[m][n / 8 + 1], x[m], y[2], y[3]);
            }
        }
    }
}

__device__ __forceinline__ uint32_t pack_pair(const float *x) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    return *(const uint32_t *)&pair;
}

/* sums (M*16, COLUMNS) += s (M*16, N) . b (N, COLUMNS), the last a tile. What a lane holds of s after one product is
 * just what it has to hold for the next. */
template <int M, int N, int COLUMNS>
__device__ __forceinline__ void scores_by_rows(float (&sums)[M][COLUMNS / 8][4], const float (&s)[M][N / 8][4],
                                               const bf16 *b) {
    const int lane = threadIdx.x % 32;
    const uint32_t from_b = shared_address(b + lane % 16 * HEAD_PITCH + lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][i] = pack_pair(&s[m][k / 8 + i / 2][i % 2 * 2]);
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 16) {
            uint32_t y[4];
            ldmatrix_x4_trans(y, from_b + (k * HEAD_PITCH + n) * (int)sizeof(bf16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(sums[m][n / 8], x[m], y[0], y[1]);
                mma_bf16(sums[m][n / 8 + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* out (n, C) of n tokens that follow one another in a sequence. A thread block owns FORWARD_QUERIES queries
 * of a head, tiles of FORWARD_KEYS keys and values pass by. */
__global__ void __launch_bounds__(ATTENTION_WARPS * 32, FORWARD_BLOCKS)
prompt_attention_kernel(floatX *out, const floatX *qkv, const floatX *cached_keys, const floatX *cached_values,
                        const int *sequences, const int *positions, int n) {
    extern __shared__ __align__(16) floatX attention_tiles[];
    constexpr int M = FORWARD_M, N = FORWARD_KEYS;
    floatX *queries = attention_tiles, *keys = queries + FORWARD_QUERIES * HEAD_PITCH;
    floatX *values = keys + 2 * N * HEAD_PITCH;
    const int block = (int)(gridDim.x - 1 - blockIdx.x) / NH, head = (int)blockIdx.x % NH; /* those of most work first */
    const int token = block * FORWARD_QUERIES, row = (int)threadIdx.x / 32 * M * 16;
    const int q0 = positions[0] + token, t = positions[0] + n; /* as positions: the block's first query, the end */
    const int first = q0 + row, last = first + M * 16 - 1;     /* the warp's queries */
    const size_t wide = 3 * C, narrow = C, stride = HS;
    const size_t kept = (size_t)sequences[0] * CACHED_VALUES + (size_t)head * CACHE * HS;
    const floatX *q = qkv + token * wide + head * HS, *k = cached_keys + kept, *v = cached_values + kept;
    const float scale = 1.0f / sqrtf(HS), unit = scale * LOG2E; /* exponents are of 2 */

    const float slack = SOFTMAX_SLACK / unit;
    const int end = min(t, q0 + FORWARD_QUERIES);
    const int begin = 0;
    fetch_tile<FORWARD_QUERIES>(queries, q, wide, t - q0);
    fetch_tile<N>(keys, k + begin * stride, stride, t - begin);
    fetch_tile<N>(values, v + begin * stride, stride, t - begin);
    cp_async_commit();

    float o[M][HEAD / 8][4] = {}, top[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;
    for (int k0 = begin, stage = 0; k0 < end; k0 += N, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (k0 + N < end) {
            const int next = k0 + N, to = (stage ^ 1) * N * HEAD_PITCH;
            fetch_tile<N>(keys + to, k + next * stride, stride, t - next);
            fetch_tile<N>(values + to, v + next * stride, stride, t - next);
            cp_async_commit();
        }
        if (first >= t || k0 > last) continue;
        float s[M][N / 8][4];
        rows_by_rows<M, N>(s, queries + row * HEAD_PITCH, keys + stage * N * HEAD_PITCH);
        if (!sees(first, k0 + N - 1)) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!sees(first + row_of(m, e), k0 + column_of(n, e))) s[m][n][e] = -INFINITY;
        }
        float most[M][2]; /* of each row */
        bool grows = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                float x = top[m][e / 2];
#pragma unroll
                for (int n = 0; n < N / 8; n++) x = fmaxf(x, fmaxf(s[m][n][e], s[m][n][e + 1]));
                x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
                most[m][e / 2] = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
                grows = grows || most[m][e / 2] > top[m][e / 2] + slack;
            }
        if (__any_sync(0xffffffff, grows)) { /* seldom after the first tile: exponents up to SOFTMAX_SLACK do no harm */
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    const float fall = top[m][e / 2] - most[m][e / 2];
                    const float shrink = most[m][e / 2] > -INFINITY ? exp2_approx(fall * unit) : 1.0f;
                    top[m][e / 2] = most[m][e / 2];
                    sum[m][e / 2] *= shrink;
#pragma unroll
                    for (int n = 0; n < HEAD / 8; n++) {
                        o[m][n][e] *= shrink;
                        o[m][n][e + 1] *= shrink;
                    }
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                /* A row may have seen nothing yet. */
                const float shift = top[m][e / 2] > -INFINITY ? top[m][e / 2] * unit : 0.0f;
#pragma unroll
                for (int n = 0; n < N / 8; n++) {
                    s[m][n][e] = exp2_approx(s[m][n][e] * unit - shift);
                    s[m][n][e + 1] = exp2_approx(s[m][n][e + 1] * unit - shift);
                    sum[m][e / 2] += s[m][n][e] + s[m][n][e + 1];
                }
            }
        scores_by_rows<M, N, HEAD>(o, s, values + stage * N * HEAD_PITCH);
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const float share = 1.0f / row_sum(sum[m][e / 2]);
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                o[m][n][e] *= share;
                o[m][n][e + 1] *= share;
            }
        }
    __syncthreads(); /* the tile of the queries becomes that of out */
    put_sums<M, HEAD>(queries + row * HEAD_PITCH, o, 1.0f);
    __syncthreads();
    save_tile<FORWARD_QUERIES>(out + token * narrow + head * HS, narrow, queries, t - q0);
}

static void prompt_attention(floatX *out, const floatX *qkv,           /* (n, C), (n, 3*C) */
                             const floatX *keys, const floatX *values, /* of this layer, in the first sequence */
                             const int *sequences, const int *positions, int n) { /* (n), (n) */
    const int blocks = NH * ((n + FORWARD_QUERIES - 1) / FORWARD_QUERIES);
    const int shared = (FORWARD_QUERIES + 4 * FORWARD_KEYS) * HEAD_PITCH * (int)sizeof(floatX);
    cudaCheck(cudaFuncSetAttribute(prompt_attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    prompt_attention_kernel<<<blocks, ATTENTION_WARPS * 32, shared, stream>>>(out, qkv, keys, values, sequences,
                                                                              positions, n);
    cudaCheck(cudaGetLastError());
}

/* ---- attention with a cache: each token looks back at its sequence, whose keys and values are kept ------------------
 *
 * Of each sequence and layer: keys and values (NH, CACHE, HS). From one sequence to the next are CACHED_VALUES values.
 * For a few tokens of any sequences, as generation has them, a sequence is cut in parts of PART_KEYS keys. A block has one
 * part, one token and one of its heads. It leaves a sum of values, the largest score and the sum of the probabilities in
 * scratch; then a second kernel adds the parts up in their order. What comes out depends neither on what else is computed
 * nor on when.
 */

enum {
    PART_KEYS = 128,      /* a thread of a block has the score of one */
    PART_VALUES = HS + 2, /* that a part leaves: sums of values, largest score, sum of probabilities */
    QUERY_HEADS = 1,

    /* To sum values, a thread has a pack of channels and one of KEY_GROUPS groups of keys. */
    CACHE_WIDTH = pack_width(HS),
    CACHE_PACKS = HS / CACHE_WIDTH,
    PACKS_AT_ONCE = CACHE_PACKS < PART_KEYS ? CACHE_PACKS : PART_KEYS,
    KEY_GROUPS = PART_KEYS / PACKS_AT_ONCE,
};

/* Puts the keys and values of n tokens where they stand: token i at positions[i] of sequence sequences[i]. */
__global__ void __launch_bounds__(256) cache_append_kernel(floatX *keys, floatX *values, const floatX *qkv,
                                                           const int *sequences, const int *positions, int n) {
    constexpr int PACKS = NH * CACHE_PACKS; /* of a token's keys */
    const int index = (int)blockIdx.x * 256 + (int)threadIdx.x, row = index / PACKS, pack = index % PACKS;
    if (row >= n) return;
    const int head = pack / CACHE_PACKS, i = pack % CACHE_PACKS * CACHE_WIDTH;
    const floatX *k = qkv + (size_t)row * (3 * C) + (NH + head) * HS + i;
    const size_t at = (size_t)sequences[row] * CACHED_VALUES + ((size_t)head * CACHE + positions[row]) * HS + i;
    store_pack(keys + at, load_pack<CACHE_WIDTH>(k));
    store_pack(values + at, load_pack<CACHE_WIDTH>(k + NH * HS));
}

static void cache_append(floatX *keys, floatX *values,                        /* of this layer, in the first sequence */
                         const floatX *qkv,                                   /* (n, 3*C) */
                         const int *sequences, const int *positions, int n) { /* (n), (n) */
    const int packs = n * NH * CACHE_PACKS;
    cache_append_kernel<<<(packs + 255) / 256, 256, 0, stream>>>(keys, values, qkv, sequences, positions, n);
    cudaCheck(cudaGetLastError());
}

/* parts (n, NH, CACHE_PARTS, PART_VALUES). Grid: (n * NH / QUERY_HEADS, CACHE_PARTS). */
__global__ void __launch_bounds__(PART_KEYS) cached_attention_kernel(float *parts, const floatX *qkv, const floatX *keys,
                                                                     const floatX *values, const int *sequences,
                                                                     const int *positions) {
    constexpr int GROUPS = NH / QUERY_HEADS;
    __shared__ float queries[QUERY_HEADS][HS], scores[QUERY_HEADS][PART_KEYS], sums[KEY_GROUPS][HS];
    const int thread = (int)threadIdx.x, row = (int)blockIdx.x / GROUPS, head = (int)blockIdx.x % GROUPS * QUERY_HEADS;
    const int part = (int)blockIdx.y, position = positions[row];
    const int begin = part * PART_KEYS, end = min((part + 1) * PART_KEYS, position + 1);
    if (begin >= end) return; /* nothing of this part is seen */
    const size_t kept = (size_t)sequences[row] * CACHED_VALUES + (size_t)head * CACHE * HS;
    for (int i = thread; i < QUERY_HEADS * HS; i += PART_KEYS)
        queries[i / HS][i % HS] = (float)qkv[(size_t)row * (3 * C) + head * HS + i];
    __syncthreads();

    float score[QUERY_HEADS] = {};
    const int key = part * PART_KEYS + thread;
    const bool seen = key >= begin && key < end;
    if (seen) {
#pragma unroll 8
        for (int i = 0; i < HS; i += CACHE_WIDTH) {
            const Pack<floatX, CACHE_WIDTH> k = load_pack<CACHE_WIDTH>(keys + kept + (size_t)key * HS + i);
            for (int h = 0; h < QUERY_HEADS; h++)
                for (int j = 0; j < CACHE_WIDTH; j++) score[h] += queries[h][i + j] * k[j];
        }
    }
    const float scale = 1.0f / sqrtf(HS);
    for (int h = 0; h < QUERY_HEADS; h++)
        scores[h][thread] = seen ? score[h] * scale : -INFINITY;
    __syncthreads();

    float *mine = parts + (((size_t)row * NH + head) * CACHE_PARTS + part) * PART_VALUES;
    constexpr size_t NEXT_HEAD = (size_t)CACHE_PARTS * PART_VALUES;
    const int warp = thread / 32, lane = thread % 32; /* a warp makes the probabilities of one head */
    if (warp < QUERY_HEADS) {
        float most = -INFINITY, sum = 0.0f;
        for (int j = lane; j < PART_KEYS; j += 32) most = fmaxf(most, scores[warp][j]);
        most = warp_max(most);
        for (int j = lane; j < PART_KEYS; j += 32) {
            const float p = fast_exp(scores[warp][j] - most);
            scores[warp][j] = p;
            sum += p;
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            mine[warp * NEXT_HEAD + HS] = most;
            mine[warp * NEXT_HEAD + HS + 1] = sum;
        }
    }
    __syncthreads();

    const int group = thread / PACKS_AT_ONCE;
    float sum[QUERY_HEADS][CACHE_WIDTH];
    for (int first = 0; first < CACHE_PACKS; first += PACKS_AT_ONCE) {
        const int channel = (first + thread % PACKS_AT_ONCE) * CACHE_WIDTH;
        const bool works = group < KEY_GROUPS && channel < HS;
        for (int h = 0; h < QUERY_HEADS; h++)
            for (int i = 0; i < CACHE_WIDTH; i++) sum[h][i] = 0.0f;
#pragma unroll 4
        for (int j = begin + group; works && j < end; j += KEY_GROUPS) {
            const Pack<floatX, CACHE_WIDTH> v = load_pack<CACHE_WIDTH>(values + kept + (size_t)j * HS + channel);
            for (int h = 0; h < QUERY_HEADS; h++) {
                const float p = scores[h][j - part * PART_KEYS];
                for (int i = 0; i < CACHE_WIDTH; i++) sum[h][i] += p * v[i];
            }
        }
        for (int h = 0; h < QUERY_HEADS; h++) {
            for (int i = 0; works && i < CACHE_WIDTH; i++) sums[group][channel + i] = sum[h][i];
            __syncthreads();
            const int end_channel = min(HS, (first + PACKS_AT_ONCE) * CACHE_WIDTH);
            for (int i = first * CACHE_WIDTH + thread; i < end_channel; i += PART_KEYS) {
                float total = 0.0f;
                for (int g = 0; g < KEY_GROUPS; g++) total += sums[g][i];
                mine[h * NEXT_HEAD + i] = total;
            }
            __syncthreads();
        }
    }
}

/* out (n, C): the parts that a token sees, rescaled to the largest score of all. A block has one head. */
__global__ void __launch_bounds__(PART_KEYS)
    add_parts_kernel(floatX *out, const float *parts, const int *positions) {
    const int row = (int)blockIdx.x / NH, head = (int)blockIdx.x % NH, position = positions[row];
    const float *begin = parts + ((size_t)blockIdx.x * CACHE_PARTS) * PART_VALUES;
    const float *end = parts + ((size_t)blockIdx.x * CACHE_PARTS + position / PART_KEYS + 1) * PART_VALUES;
    float most = -INFINITY;
    for (const float *part = begin; part < end; part += PART_VALUES) most = fmaxf(most, part[HS]);
    for (int i = (int)threadIdx.x; i < HS; i += PART_KEYS) {
        float sum = 0.0f, probabilities = 0.0f;
        for (const float *part = begin; part < end; part += PART_VALUES) {
            const float scale = fast_exp(part[HS] - most);
            sum += part[i] * scale;
            probabilities += part[HS + 1] * scale;
        }
        out[((size_t)row * NH + head) * HS + i] = (floatX)(sum / probabilities);
    }
}

/* More than SEQUENCES tokens follow one another in one sequence. */
static void cached_attention(floatX *out, const floatX *qkv,           /* (n, C), (n, 3*C) */
                             const floatX *keys, const floatX *values, /* of this layer, in the first sequence */
                             const int *sequences, const int *positions, int n) { /* (n), (n) */
    if (n > SEQUENCES) {
        prompt_attention(out, qkv, keys, values, sequences, positions, n);
        return;
    }
    const dim3 grid(n * (NH / QUERY_HEADS), CACHE_PARTS);
    cached_attention_kernel<<<grid, PART_KEYS, 0, stream>>>(scratch, qkv, keys, values, sequences, positions);
    cudaCheck(cudaGetLastError());
    add_parts_kernel<<<n * NH, PART_KEYS, 0, stream>>>(out, scratch, positions);
    cudaCheck(cudaGetLastError());
}

/* ---- select: out[i] = inp[rows[i]] ------------------------------------------------------------------------------- */

__global__ void __launch_bounds__(ROW_BLOCK) select_kernel(floatX *out, const floatX *inp, const int *rows, int m, int c) {
    const int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / ROW_THREADS, thread = threadIdx.x % ROW_THREADS;
    if (row >= m) return;
    const floatX *from = inp + (size_t)rows[row] * c;
    for (int k = 0; k < ROW_PACKS; k++) {
        const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
        if (in_row(i)) store_pack(out + (size_t)row * c + i, load_pack<ROW_WIDTH>(from + i));
    }
}

static void select_rows(floatX *out, const floatX *inp, const int *rows, int m, int c) { /* (m, c), (n, c), (m) */
    select_kernel<<<row_blocks(m), ROW_BLOCK, 0, stream>>>(out, inp, rows, m, c);
    cudaCheck(cudaGetLastError());
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

static int least(int a, int b) { return a < b ? a : b; }

/* All memory of the GPU that the program ever uses, for so many sequences side by side. */
static void allocate_model(int sequences) {
    params_memory = (floatX *)allocate_tensors(248951808);
    for (int i = 0; i < NUM_TENSORS; i++) *parameter_table[i].tensor = params_memory + parameter_table[i].offset;

    floatX *kept = (floatX *)allocate_tensors((size_t)sequences * CACHED_VALUES * sizeof(floatX));
    cache.keys = kept;
    cache.values = kept + 9437184;

    char *workspace = (char *)allocate_tensors(4718592);
    acts.residual = (floatX *)(workspace + 3145728);
    acts.ln1 = (floatX *)(workspace + 2359296);
    acts.ln1_mean = (float *)workspace;
    acts.ln1_rstd = (float *)(workspace + 2048);
    acts.qkv = (floatX *)workspace;
    acts.attention = (floatX *)(workspace + 2359296);
    acts.ln2 = (floatX *)(workspace + 3932160);
    acts.ln2_mean = (float *)workspace;
    acts.ln2_rstd = (float *)(workspace + 2048);
    acts.gelu = (floatX *)workspace;
    acts.lnf = (floatX *)workspace;
    acts.lnf_mean = (float *)(workspace + 786432);
    acts.lnf_rstd = (float *)(workspace + 788480);
    acts.selected = (floatX *)(workspace + 3219456);
    acts.logits = (float *)workspace;

    inputs.tokens = (int *)allocate_tensors((3 * PIECE + SEQUENCES) * sizeof(int));
    inputs.sequences = inputs.tokens + PIECE;
    inputs.positions = inputs.sequences + PIECE;
    inputs.rows = inputs.positions + PIECE;
    scratch = (float *)allocate_tensors(405504);
}

/* Computes what decode says; all it is told lies on the GPU. */
static void launch_decode(const int *tokens, const int *sequences, const int *positions, int n, const int *rows, int m) {
    /* embedding */
    token_embedding_forward(acts.residual, tokens, params.wte, n, C);
    position_embedding_forward(acts.residual, acts.residual, params.wpe, positions, n, C);
    /* layers */
    for (size_t l = 0; l < L; l++) {
        layernorm_forward(acts.ln1, acts.ln1_mean, acts.ln1_rstd, acts.residual, params.ln1w + l*C, params.ln1b + l*C,
                          n, C);
        linear_forward(acts.qkv, acts.ln1, params.qkvw + l*3*C*C, params.qkvb + l*3*C, (floatX *)NULL, n, C, 3*C);
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
    linear_forward(acts.logits, acts.selected, params.wte, NULL, (float *)NULL, m, C, VP);
}

/* The same for the next token of each of n sequences, which is the bulk of the work: what is launched for so many is
 * recorded once, then replayed. */
static void launch_recorded(int n) {
    static cudaGraphExec_t recorded[SEQUENCES + 1];
    if (!recorded[n]) {
        cudaGraph_t launches;
        cudaCheck(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        launch_decode(inputs.tokens, inputs.sequences, inputs.positions, n, inputs.rows, n);
        cudaCheck(cudaStreamEndCapture(stream, &launches));
        cudaCheck(cudaGraphInstantiate(&recorded[n], launches, 0));
        cudaCheck(cudaGraphDestroy(launches));
    }
    cudaCheck(cudaGraphLaunch(recorded[n], stream));
}

/* n tokens: token i stands at positions[i] of sequence sequences[i], and what stands before it there was decoded earlier,
 * in this call or another. More than SEQUENCES of them follow one another in one sequence. Leaves the logits of m of them,
 * of token rows[i] in row i, in acts.logits. */
static void decode(const int *tokens, const int *sequences, const int *positions, int n, const int *rows, int m) {
    static int given[3 * PIECE + SEQUENCES]; /* as it lies on the GPU */
    memcpy(given, tokens, (size_t)n * sizeof(int));
    memcpy(given + PIECE, sequences, (size_t)n * sizeof(int));
    memcpy(given + 2 * PIECE, positions, (size_t)n * sizeof(int));
    memcpy(given + 3 * PIECE, rows, (size_t)m * sizeof(int));
    to_gpu(inputs.tokens, given, sizeof given);
    if (n == m) launch_recorded(n);
    else launch_decode(inputs.tokens, inputs.sequences, inputs.positions, n, inputs.rows, m);
}

/* The first m rows of logits, (m, VP), on the host; they stay until the next call. */
static const float *logits_from_gpu(int m) {
    static float *logits; /* where the GPU can write without help */
    if (!logits) cudaCheck(cudaMallocHost(&logits, (size_t)SEQUENCES * VP * sizeof(float)));
    from_gpu(logits, acts.logits, (size_t)m * VP * sizeof(float));
    return logits;
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
static void read_tensors(FILE *file, floatX *memory, int is_bf16, const char *path) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorRow *row = &parameter_table[i];
        for (int l = 0; l < row->layers; l++) {
            float *values = staging(row->count);
            if (is_bf16) read_bf16(file, values, row->count, path);
            else read_input(file, values, row->count * sizeof(float), path);
            floats_to_gpu(memory + row->offset + (size_t)l * row->stride, values, row->count);
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
        const int last = n - 1;
        decode(text->tokens + first, sequences, positions, n, &last, 1);
    }
    const float *logits = logits_from_gpu(1);
    figures.read += text->prompt;
    figures.reading += seconds() - start;
    extend(s, text, logits);
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
        const float *logits = n > 0 ? logits_from_gpu(n) : NULL;
        for (int i = 0; i < n; i++) extend(s, active[sequences[i]], logits + (size_t)i * VP);
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

static const char version[] = "gpt2-124m, configuration fd5707a2";

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
    open_gpu();
    allocate_model(least(s->batch, texts.count));
    load_weights(s->load);
    generate(s);
    if (!s->quiet) {
        say("\nread %d tokens in %.1f ms, %.1f tok/s | generated %d in %.1f ms, %.1f tok/s | gpu: %s\n", figures.read,
            1e3 * figures.reading, rate(figures.read, figures.reading), figures.drawn, 1e3 * figures.decoding,
            rate(figures.decoded, figures.decoding), gpu.name);
    }
    return stop_signal ? 128 + stop_signal : 0;
}
