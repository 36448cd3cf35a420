/* train_gpt2.cu: trains GPT-2 (12 layers, 12 heads, 768 channels, 50257 tokens) on an NVIDIA GPU, in bfloat16.
 *
 * Written by llmgen from the configuration gpt2-124m (hash a0b3a55a):
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
 *   batch_size = 16
 *   seq_len = 1024
 *   precision = "bf16"
 *
 * It is yours, free of any condition. It needs nvcc and the CUDA runtime, nothing else: no library is linked.
 * Compile:  nvcc -O3 -std=c++17 -arch=sm_80 train_gpt2.cu -o train_gpt2cu
 * Options:  ./train_gpt2cu --help
 *
 * Memory of the GPU in bytes, for a micro-batch of 16 x 1024 tokens:
 *       248,951,808  parameters, as the model works with them
 *       497,903,616  gradients, float32
 *     1,244,759,040  what the parameters lack of float32, and AdamW's moments
 *     4,869,586,944  activations that the backward needs
 *     1,698,889,728  arena for all that lives shorter (at least 1,698,889,728 are alive at once)
 *            66,048  tokens, results
 *        28,311,552  scratch of the kernel that runs
 *     8,588,468,736  in all
 *
 * Contents: sizes, tensors, basics, the GPU, matrix products, layers (forward beside backward), the model, AdamW,
 * files, data, sampling, logging, arguments, main.
 */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
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
    B = 16,               /* sequences in a micro-batch */
    T = 1024,             /* tokens in a sequence */
    BT = 16384,           /* B * T */
    L = 12,               /* layers */
    NH = 12,              /* attention heads */
    HS = 64,              /* channels of a head */
    C = 768,              /* channels: NH * HS */
    V = 50257,            /* tokens in the vocabulary */
    VP = 50304,           /* V rounded up to a multiple of 128; the rows past V stay zero */
    MAXT = 1024,          /* longest sequence the position embeddings reach */
    EVAL_TOKENS = 16384,  /* tokens that evaluate takes at most */
    CHUNK = 16384,        /* rows of logits that exist at a time */
};
static const float NORM_EPSILON = 1e-05f; /* added to the variance in a norm */

/* ---- tensors: one allocation on the GPU for each kind of memory; all offsets are computed by llmgen -------------- */

/* One pointer for each tensor, to its first layer. */
template <class Value>
struct Parameters {
    Value *wte;       /* (VP, C) */
    Value *wpe;       /* (MAXT, C) */
    Value *ln1w;      /* (L, C) */
    Value *ln1b;      /* (L, C) */
    Value *qkvw;      /* (L, 3*C, C) */
    Value *qkvb;      /* (L, 3*C) */
    Value *attprojw;  /* (L, C, C) */
    Value *attprojb;  /* (L, C) */
    Value *ln2w;      /* (L, C) */
    Value *ln2b;      /* (L, C) */
    Value *fcw;       /* (L, 4*C, C) */
    Value *fcb;       /* (L, 4*C) */
    Value *fcprojw;   /* (L, C, 4*C) */
    Value *fcprojb;   /* (L, C) */
    Value *lnfw;      /* (C) */
    Value *lnfb;      /* (C) */
};

static Parameters<floatX> params;
static Parameters<float> grads;
/* (PARAMETER_VALUES) each. params is what the model works with; with rest it is float32, which the optimizer changes and files
 * hold. */
static floatX *params_memory;
static int16_t *rest_memory;
static float *grads_memory, *moment1_memory, *moment2_memory;

/* What forward_backward computes on the way; a dimension L: kept for the backward, a slot for each layer. */
static struct {
    floatX *residual;      /* (L + 1, B, T, C) */
    floatX *ln1;           /* (L, B, T, C) */
    float *ln1_mean;       /* (L, B, T) */
    float *ln1_rstd;       /* (L, B, T) */
    floatX *qkv;           /* (L, B, T, 3*C) */
    floatX *attention;     /* (L, B, T, C) */
    float *attention_lse;  /* (L, B, NH, T) */
    floatX *residual2;     /* (L, B, T, C) */
    floatX *ln2;           /* (L, B, T, C) */
    float *ln2_mean;       /* (L, B, T) */
    float *ln2_rstd;       /* (L, B, T) */
    floatX *gelu;          /* (L, B, T, 4*C) */
    floatX *fc_slope;      /* (L, B, T, 4*C) */
    floatX *lnf;           /* (B, T, C) */
    float *lnf_mean;       /* (B, T) */
    float *lnf_rstd;       /* (B, T) */
    float *losses;         /* (B, T) */
    floatX *dlnf;          /* (B, T, C) */
    floatX *logits;        /* (CHUNK, VP) */
    floatX *dresidual;     /* (B, T, C) */
    floatX *dfc;           /* (B, T, 4*C) */
    floatX *dln2;          /* (B, T, C) */
    floatX *dattention;    /* (B, T, C) */
    floatX *dqkv;          /* (B, T, 3*C) */
    floatX *dln1;          /* (B, T, C) */
} acts;

/* What evaluate computes, for b rows of t tokens. It lies where acts lies: the two never run at once. */
static struct {
    floatX *residual;      /* (b, t, C) */
    floatX *ln1;           /* (b, t, C) */
    float *ln1_mean;       /* (b, t) */
    float *ln1_rstd;       /* (b, t) */
    floatX *qkv;           /* (b, t, 3*C) */
    floatX *attention;     /* (b, t, C) */
    float *attention_lse;  /* (b, NH, t) */
    floatX *ln2;           /* (b, t, C) */
    float *ln2_mean;       /* (b, t) */
    float *ln2_rstd;       /* (b, t) */
    floatX *gelu;          /* (b, t, 4*C) */
    floatX *lnf;           /* (b, t, C) */
    float *lnf_mean;       /* (b, t) */
    float *lnf_rstd;       /* (b, t) */
    float *losses;         /* (b*t - first) */
    floatX *logits;        /* (CHUNK, VP) */
} eval;

/* The parameters in the order of the files. A file holds them back to back; in memory every layer of every tensor starts
 * at a multiple of 256 bytes, and what lies between stays zero. */
typedef struct {
    const char *name;
    size_t offset, stride;     /* of the first layer, and from one layer to the next, in values */
    size_t count, valid;       /* values of a layer; those that are initialised: vocabulary padding stays zero */
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

/* What a step leaves for the host: the sum of the losses, the squared norm of the gradients. */
enum { LOSS, SQUARED_NORM };
static double *results;

static int *tokens_on_gpu; /* (BT + 1), or what evaluate takes */
static float *scratch;     /* partial results of the kernel that runs */

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

/* ---- the GPU: errors, its one stream, its memory ----------------------------------------------------------------- */

static cudaStream_t stream; /* everything runs on it, in order */

/* Ends the program if a call of the CUDA runtime failed. */
#define cudaCheck(call) cuda_check((call), #call, __FILE__, __LINE__)
static void cuda_check(cudaError_t error, const char *call, const char *file, int line) {
    if (error != cudaSuccess) die(1, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
}

__global__ void probe_kernel(void) {}

/* Takes the first GPU that the environment shows, and refuses one that this program was not compiled for. */
static void open_gpu(void) {
    cudaDeviceProp gpu;
    const cudaError_t error = cudaGetDeviceProperties(&gpu, 0);
    if (error != cudaSuccess) die(1, "no GPU can be used: %s; nvidia-smi should list one", cudaGetErrorString(error));
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, probe_kernel) != cudaSuccess) {
        die(1, "%s (sm_%d%d): this program is compiled for sm_80; build it with --arch sm_%d%d", gpu.name, gpu.major,
            gpu.minor, gpu.major, gpu.minor);
    }
    cudaCheck(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    say("gpu: %s, %d multiprocessors, %.1f GB\n", gpu.name, gpu.multiProcessorCount, (double)gpu.totalGlobalMem / 1e9);
}

/* Memory of the model: zeroed, and counted, so that the program can say what it uses. */
static void *allocate_tensors(size_t bytes) {
    void *memory = NULL;
    if (cudaMalloc(&memory, bytes ? bytes : 256) != cudaSuccess) {
        size_t free_bytes = 0, total = 0;
        cudaGetLastError();
        cudaMemGetInfo(&free_bytes, &total);
        const size_t fixed = 2019992064, each = 410529792, had = free_bytes + model_bytes;
        die(1, "out of memory: the plan needs %zu bytes, the GPU has %zu free; build with --batch-size %zu",
            (size_t)8588468736, had, had > fixed + each ? (had - fixed) / each : 1);
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

/* n tokens, as the functions of the model take them. */
static const int *tokens_to_gpu(const int *tokens, int n) {
    to_gpu(tokens_on_gpu, tokens, (size_t)n * sizeof(int));
    return tokens_on_gpu;
}

static void from_gpu(void *host, const void *gpu, size_t bytes) {
    cudaCheck(cudaMemcpyAsync(host, gpu, bytes, cudaMemcpyDeviceToHost, stream));
    cudaCheck(cudaStreamSynchronize(stream));
}

/* (count) values as floats; they stay until the next call. */
static const float *floats_from_gpu(const float *gpu, size_t count) {
    float *values = staging(count);
    from_gpu(values, gpu, count * sizeof(float));
    return values;
}

static const float *floats_from_gpu(const bf16 *gpu, size_t count) {
    float *values = staging(count);
    uint16_t *halves = (uint16_t *)values + count; /* the upper half of the room: widened from its beginning */
    from_gpu(halves, gpu, count * sizeof(bf16));
    for (size_t i = 0; i < count; i++) {
        const uint32_t bits = (uint32_t)halves[i] << 16; /* bfloat16 is the upper half of a float32 */
        memcpy(&values[i], &bits, sizeof bits);
    }
    return values;
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

static void write_logits(const floatX *logits, int rows) {  /* (rows, VP), of which V are written */
    for (int i = 0; i < rows; i++) write_output(logits_file, floats_from_gpu(logits + (size_t)i * VP, V), V * sizeof(float));
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

/* The sum over the THREADS threads of a block, for each of them. */
template <int THREADS, class Value>
__device__ __forceinline__ Value block_sum(Value x) {
    __shared__ Value warps[THREADS / 32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    Value sum = 0;
    for (int warp = 0; warp < THREADS / 32; warp++) sum += warps[warp];
    __syncthreads(); /* all have read before the next sum is made here */
    return sum;
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

static int multiprocessors(void) {
    int count = 0;
    cudaCheck(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
    return count;
}

/* Sums over all rows, for each channel: a block sums the rows it has and leaves its sums in scratch, a row of
 * (blocks, PARTIALS, c); then sum_partials adds those up. */
enum {
    PARTIALS = 3,          /* sums for which there is room: dweight, dbias, dsum */
    PARTIAL_BLOCKS = 1024, /* at most */
};

/* out (+)= the sum of the blocks' partial sums, which are (blocks, PARTIALS, c): a block has 32 channels and 8 warps that take
 * the rows in turn. blockIdx.y says which sum: to first, second or third, (c) each, or NULL. */
__global__ void __launch_bounds__(256) sum_partials_kernel(float *first, float *second, float *third, const float *partial,
                                                           int blocks, int c, int accumulate) {
    __shared__ float sums[8][32];
    float *out = blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third;
    if (!out) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (i < c) {
#pragma unroll 8
        for (int b = warp; b < blocks; b += 8) sum += partial[((size_t)b * PARTIALS + blockIdx.y) * c + i];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || i >= c) return;
    float total = accumulate ? out[i] : 0.0f;
    for (int w = 0; w < 8; w++) total += sums[w][lane];
    out[i] = total;
}

static void sum_partials(float *first, float *second, float *third, int blocks, int c, int accumulate) {
    if (!first && !second && !third) return;
    const dim3 grid((c + 31) / 32, PARTIALS);
    sum_partials_kernel<<<grid, 256, 0, stream>>>(first, second, third, scratch, blocks, c, accumulate);
    cudaCheck(cudaGetLastError());
}

/* For rows of C channels: each thread sums in registers the channels it has. */
enum {
    ROW_REGISTERS = 40 + 5 * ROW_PACKS * ROW_WIDTH, /* of a thread, about; so many blocks fit on a multiprocessor: */
    ROW_RESIDENT = 65536 / (ROW_REGISTERS * ROW_BLOCK) > 0 ? 65536 / (ROW_REGISTERS * ROW_BLOCK) : 1,
};

static int partial_blocks(int n) {
    int blocks = multiprocessors() * ROW_RESIDENT;
    if (blocks > row_blocks(n)) blocks = row_blocks(n);
    return blocks > PARTIAL_BLOCKS ? PARTIAL_BLOCKS : blocks;
}

/* One of a block's sums, (c): its rows of threads in their order. */
__device__ __forceinline__ void store_partial(float *partial, const float (&sum)[ROW_PACKS][ROW_WIDTH], int c) {
    __shared__ float rows[BLOCK_ROWS][BLOCK_ROWS > 1 ? ROW_THREADS * ROW_PACKS * ROW_WIDTH : 1];
    const int thread = threadIdx.x % ROW_THREADS, row = threadIdx.x / ROW_THREADS;
    for (int k = 0; k < ROW_PACKS; k++) {
        const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
        for (int j = 0; j < ROW_WIDTH; j++) {
            if (BLOCK_ROWS > 1) rows[row][i + j] = sum[k][j];
            else if (in_row(i)) partial[i + j] = sum[k][j];
        }
    }
    if (BLOCK_ROWS == 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < c; i += ROW_BLOCK) {
        float total = 0.0f;
        for (int r = 0; r < BLOCK_ROWS; r++) total += rows[r][i];
        partial[i] = total;
    }
    __syncthreads();
}

/* exp(x): in bfloat16 programs by the processor's own 2^x, within 2^-22. */
__device__ __forceinline__ float fast_exp(float x) {
    return exp2_approx(x * 1.4426950408889634f);
}

__device__ __forceinline__ float fast_divide(float a, float b) {
    return __fdividef(a, b); /* 0 where b is above 2^126 */
}

/* ---- weights in two halves ------------------------------------------------------------------------------------------
 * The upper one is the nearest bfloat16, of two that are as near the one further from 0: what the model works with. The lower
 * one, `rest`, is what that rounding took, in units of the float's last place. Together they are the float, bit for bit. */

__device__ __forceinline__ float whole(floatX working, int16_t rest) {
    return __uint_as_float(((uint32_t)__bfloat16_as_ushort(working) << 16) + (uint32_t)(int32_t)rest);
}

__device__ __forceinline__ void halve(float x, floatX *working, int16_t *rest) {
    const uint32_t bits = __float_as_uint(x);
    *working = __ushort_as_bfloat16((unsigned short)(isnan(x) ? 0x7fff : (bits + 0x8000) >> 16));
    *rest = (int16_t)(bits & 0xffff);
}

__global__ void __launch_bounds__(256)
    whole_weights_kernel(float *weights, const floatX *working, const int16_t *rest, size_t n) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) weights[i] = whole(working[i], rest[i]);
}

static void whole_weights(float *weights, const floatX *working, const int16_t *rest, size_t n) { /* (n) each */
    whole_weights_kernel<<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(weights, working, rest, n);
    cudaCheck(cudaGetLastError());
}

__global__ void __launch_bounds__(256)
    halve_weights_kernel(floatX *working, int16_t *rest, const float *weights, size_t n) {
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) halve(weights[i], &working[i], &rest[i]);
}

static void halve_weights(floatX *working, int16_t *rest, const float *weights, size_t n) { /* (n) each */
    halve_weights_kernel<<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(working, rest, weights, n);
    cudaCheck(cudaGetLastError());
}

/* ---- GELU: x/2 * (1 + tanh(u)) with u = sqrt(2/pi) * (x + 0.044715 x^3), which equals x / (1 + exp(-2u)) --------- */

/* s = 1 / (1 + exp(-2u)), the exponential kept finite. */
__device__ __forceinline__ float gelu_factor(float x) {
    return fast_divide(1.0f, 1.0f + fast_exp(fminf(x * (-1.5957691216f - 0.0713548162726f * x * x), 80.0f)));
}

__device__ __forceinline__ float gelu_value(float x) { return x * gelu_factor(x); }

/* x becomes gelu(x), with the same bits as by gelu_value; returns gelu'(x) = s + x s (1 - s) 2u'. */
__device__ __forceinline__ float gelu_and_slope(float &x) {
    const float s = gelu_factor(x), twice_du = 1.5957691216f + 0.2140644488178f * x * x;
    x *= s;
    return s + x * (1.0f - s) * twice_du;
}

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

/* ADD: out = sum + bias + extra.  GELU: x = sum + bias, out = gelu(x), kept = gelu'(x).
 * TIMES_GELU_GRADIENT: out = sum * extra, which is what was kept. */
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
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] *= extra[i];
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += bias[i];
    }
    if (THEN == GELU) {
        if (then.kept) {
            float slope[4];
#pragma unroll
            for (int i = 0; i < 4; i++) slope[i] = gelu_and_slope(sum[i]);
            store_four<ALIGNED>(then.kept + at, slope, count);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] = gelu_value(sum[i]);
        }
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

/* out (n) = the sum of the parts of it in scratch, (parts, n), in their order; or that is added to out. */
__global__ void sum_parts_kernel(float *out, const float *part, int parts, size_t n, int accumulate) {
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = part[i];
    for (int p = 1; p < parts; p++) sum += part[p * n + i];
    out[i] = accumulate ? out[i] + sum : sum;
}

static void sum_parts(float *out, int parts, size_t n, int accumulate) {
    sum_parts_kernel<<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(out, scratch, parts, n, accumulate);
    cudaCheck(cudaGetLastError());
}

/* part (gridDim.y, columns): sums of the columns of inp (n, columns), each over a share of the rows. A block of 8 warps
 * takes 128 columns, four in a thread; its warps take turns at the rows, and their sums are added in the order of the
 * warps. */
template <bool ALIGNED, class Inp>
__global__ void __launch_bounds__(256) column_sums_kernel(float *part, const Inp *inp, int n, int columns) {
    __shared__ __align__(16) float sums[8][128];
    const int warp = (int)threadIdx.x / 32, mine = (int)threadIdx.x % 32 * 4;
    const int column = (int)blockIdx.x * 128 + mine, count = columns - column;
    const int first = (int)((long long)n * blockIdx.y / gridDim.y);
    const int last = (int)((long long)n * (blockIdx.y + 1) / gridDim.y);
    float sum[4] = {};
    if (count > 0) {
#pragma unroll 8
        for (int row = first + warp; row < last; row += 8) {
            float x[4];
            load_four<ALIGNED>(x, inp + (size_t)row * columns + column, count);
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += x[i];
        }
    }
    store_four<true>(&sums[warp][mine], sum, 4);
    __syncthreads();
    const int c = (int)threadIdx.x;
    if (c >= 128 || (int)blockIdx.x * 128 + c >= columns) return;
    float total = 0.0f;
    for (int i = 0; i < 8; i++) total += sums[i][c];
    part[(size_t)blockIdx.y * columns + blockIdx.x * 128 + c] = total;
}

enum { SUM_PARTS = 64 }; /* at most: column_sums takes so many rows of scratch */

/* out (columns) = the sums of the columns of inp (n, columns); or they are added to out. inp may be behind that
 * scratch. */
template <class Inp>
static void column_sums(float *out, const Inp *inp, int n, int columns, int accumulate) {
    const int parts = min((n + 63) / 64, (int)SUM_PARTS);
    const dim3 grid((columns + 127) / 128, parts);
    if (columns % 4 == 0)
        column_sums_kernel<true><<<grid, 256, 0, stream>>>(scratch, inp, n, columns);
    else
        column_sums_kernel<false><<<grid, 256, 0, stream>>>(scratch, inp, n, columns);
    cudaCheck(cudaGetLastError());
    sum_parts(out, parts, (size_t)columns, accumulate);
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
struct Tile128x128 {
    enum { ROWS = 128, COLUMNS = 128, DEPTH = 32, STAGES = 3 };
    enum { WARPS_M = 2, WARPS_N = 2, THREADS = 128, BLOCKS = 2 };
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

/* dinp (n, c) = dout (n, oc) . weight (oc, c) * gelu', by what was kept; dsum (c) (+)= the sum of dinp over the rows,
 * if not NULL. */
template <class Tile, bool ALIGNED>
static void gelu_input_gradient(bf16 *dinp, float *dsum, const bf16 *dout, const bf16 *weight, const bf16 *kept, int n,
                                int c, int oc, int accumulate) {
    const Epilogue<bf16, bf16> then = {dinp, NULL, NULL, kept};
    float *sums = dsum ? scratch + SUM_PARTS * (size_t)c : NULL;
    matmul<Tile, INPUT_GRADIENT, TIMES_GELU_GRADIENT, ALIGNED>(then, dout, weight, n, c, oc, 1, sums);
    const int rows = (n + Tile::ROWS - 1) / Tile::ROWS * Tile::WARPS_M;
    if (dsum) column_sums(dsum, sums, rows, c, accumulate);
}

/* dweight (oc, c) (+)= dout (n, oc)^T . inp (n, c), and dbias (oc) (+)= the sum of dout over the rows, if not NULL. The
 * rows are cut in `parts`, each of which sums by itself in scratch; then these sums are added in their order. */
template <class Tile, bool ALIGNED>
static void weight_gradient(float *dweight, float *dbias, const bf16 *dout, const bf16 *inp, int n, int c, int oc,
                            int accumulate, int parts) {
    const Epilogue<float, float> then = {parts > 1 ? scratch : dweight, NULL, NULL,
                                         parts == 1 && accumulate ? dweight : NULL};
    matmul<Tile, WEIGHT_GRADIENT, ADD, ALIGNED>(then, dout, inp, oc, c, n, parts);
    if (parts > 1) sum_parts(dweight, parts, (size_t)oc * (size_t)c, accumulate);
    if (dbias) column_sums(dbias, dout, n, oc, accumulate);
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

/* dwte[tokens[i]] += dout[i], each row summed in the order of i. First the indices i are sorted by their tokens, equal tokens
 * in their order. Then a block sums the rows of SPAN sorted indices, and adds them to dwte where it has all rows of a token.
 * Where a token's rows go on in the spans that follow, each leaves its part in scratch, and the block of the span in which
 * they begin adds these up. */
enum {
    SORT_THREADS = 1024, /* a thread sorts an index */
    SORT_BITS = 8,       /* of the tokens by which one pass sorts */
    BINS = 1 << SORT_BITS,
    SPAN = 64, /* sorted indices that a block sums */
    SPAN_LOADS = 4,
    EMBEDDING_BLOCK = ROW_THREADS * ROW_PACKS < 256 ? ROW_THREADS * ROW_PACKS : 256,
};

/* One pass of the sort makes `to` of `from`: the same indices, ordered by the SORT_BITS bits of their tokens from `shift` on,
 * which are the bin; of equal ones the earlier stays the earlier. Without `from` they are 0 to n - 1. First: counts (blocks,
 * BINS), how many of the indices of each block fall in each bin. */
__global__ void __launch_bounds__(SORT_THREADS) count_bins_kernel(int *counts, const int *from, const int *tokens, int n,
                                                                  int shift) {
    __shared__ int bins[BINS];
    const int i = blockIdx.x * SORT_THREADS + threadIdx.x;
    if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
    __syncthreads();
    if (i < n) atomicAdd(&bins[tokens[from ? from[i] : i] >> shift & (BINS - 1)], 1); /* integers: any order will do */
    __syncthreads();
    if (threadIdx.x < BINS) counts[blockIdx.x * BINS + threadIdx.x] = bins[threadIdx.x];
}

/* Then each block knows where its indices go: behind those of lower bins, and behind those of its own bin in earlier blocks,
 * in earlier warps, in lower lanes. */
__global__ void __launch_bounds__(SORT_THREADS) sort_indices_kernel(int *to, const int *from, const int *tokens,
                                                                    const int *counts, int n, int shift) {
    __shared__ int starts[SORT_THREADS / 32][BINS]; /* first how many a warp has for a bin, then where they go */
    __shared__ int sums[BINS / 32];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, i = blockIdx.x * SORT_THREADS + thread;
    const int index = i >= n ? -1 : from ? from[i] : i, bin = i < n ? tokens[index] >> shift & (BINS - 1) : -1;
    for (int b = lane; b < BINS; b += 32) starts[warp][b] = 0;
    __syncwarp();
    unsigned peers = __ballot_sync(0xffffffff, i < n); /* the lanes with the same bin */
    for (int bit = 0; bit < SORT_BITS; bit++) {
        const unsigned ones = __ballot_sync(0xffffffff, bin >> bit & 1);
        peers &= bin >> bit & 1 ? ones : ~ones;
    }
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (i < n && rank == 0) starts[warp][bin] = __popc(peers);
    int earlier = 0, all = 0, up_to = 0; /* of bin `thread`: in earlier blocks, in all; of all bins up to it */
    if (thread < BINS) {
#pragma unroll 8
        for (int b = 0; b < (int)gridDim.x; b++) {
            const int count = counts[b * BINS + thread];
            earlier += b < (int)blockIdx.x ? count : 0;
            all += count;
        }
        up_to = all;
        for (int distance = 1; distance < 32; distance *= 2) {
            const int lower = __shfl_up_sync(0xffffffff, up_to, distance);
            if (lane >= distance) up_to += lower;
        }
        if (lane == 31) sums[warp] = up_to;
    }
    __syncthreads();
    if (thread < BINS) {
        int start = up_to - all + earlier;
        for (int w = 0; w < warp; w++) start += sums[w];
        for (int w = 0; w < SORT_THREADS / 32; w++) {
            const int count = starts[w][thread];
            starts[w][thread] = start;
            start += count;
        }
    }
    __syncthreads();
    if (i < n) to[starts[warp][bin] + rank] = index;
}

/* Span s: SPAN sorted indices. parts (spans, 2, c): [s][0] is the sum of the rows that go on from the span before, [s][1] of
 * those that begin here and go on in the next. */
__global__ void __launch_bounds__(EMBEDDING_BLOCK) token_embedding_backward_kernel(
    float *dwte, float *parts, const floatR *dout, const int *tokens, const int *order, int n, int c) {
    __shared__ int indices[SPAN], rows[SPAN];
    const int first = blockIdx.x * SPAN, count = n - first < SPAN ? n - first : SPAN;
    for (int p = threadIdx.x; p < count; p += EMBEDDING_BLOCK) {
        indices[p] = order[first + p];
        rows[p] = tokens[indices[p]];
    }
    __syncthreads();
    const int before = first > 0 ? tokens[order[first - 1]] : -1;
    const int after = first + count < n ? tokens[order[first + count]] : -1;
    for (int i = threadIdx.x * ROW_WIDTH; i < c; i += EMBEDDING_BLOCK * ROW_WIDTH) {
        Pack<float, ROW_WIDTH> sum = {};
        for (int p = 0; p < count; p += SPAN_LOADS) {
            Pack<floatR, ROW_WIDTH> g[SPAN_LOADS];
            for (int k = 0; k < SPAN_LOADS; k++)
                if (p + k < count) g[k] = load_pack<ROW_WIDTH>(dout + (size_t)indices[p + k] * c + i);
            for (int k = 0; k < SPAN_LOADS && p + k < count; k++) {
                for (int j = 0; j < ROW_WIDTH; j++) sum.at[j] += g[k][j];
                const int row = rows[p + k], last = p + k + 1 == count;
                if (!last && rows[p + k + 1] == row) continue;
                float *out = dwte + (size_t)row * c + i;
                if (row == before) {
                    out = parts + (size_t)blockIdx.x * 2 * c + i;
                } else if (last && row == after) {
                    out = parts + ((size_t)blockIdx.x * 2 + 1) * c + i;
                } else {
                    const Pack<float, ROW_WIDTH> d = load_pack<ROW_WIDTH>(out);
                    for (int j = 0; j < ROW_WIDTH; j++) sum.at[j] += d.at[j];
                }
                store_pack(out, sum);
                sum = {};
            }
        }
    }
}

/* Adds up, in their order, the parts of a token whose rows begin in span blockIdx.x and go on behind it. */
__global__ void __launch_bounds__(EMBEDDING_BLOCK) token_embedding_parts_kernel(
    float *dwte, const float *parts, const int *tokens, const int *order, int n, int c) {
    const int span = blockIdx.x, next = (span + 1) * SPAN;
    if (next >= n) return;
    const int token = tokens[order[next]];
    if (tokens[order[next - 1]] != token || (span > 0 && tokens[order[next - SPAN - 1]] == token)) return;
    int low = next, high = n; /* the token's last index lies from low on and before high */
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (tokens[order[middle]] == token) low = middle;
        else high = middle;
    }
    for (int i = threadIdx.x * ROW_WIDTH; i < c; i += EMBEDDING_BLOCK * ROW_WIDTH) {
        Pack<float, ROW_WIDTH> sum = load_pack<ROW_WIDTH>(parts + ((size_t)span * 2 + 1) * c + i);
        for (int s = span + 1; s <= low / SPAN; s += SPAN_LOADS) {
            Pack<float, ROW_WIDTH> part[SPAN_LOADS] = {};
            for (int k = 0; k < SPAN_LOADS; k++)
                if (s + k <= low / SPAN) part[k] = load_pack<ROW_WIDTH>(parts + (size_t)(s + k) * 2 * c + i);
            for (int k = 0; k < SPAN_LOADS; k++)
                for (int j = 0; j < ROW_WIDTH; j++) sum.at[j] += part[k].at[j];
        }
        float *out = dwte + (size_t)token * c + i;
        const Pack<float, ROW_WIDTH> d = load_pack<ROW_WIDTH>(out);
        for (int j = 0; j < ROW_WIDTH; j++) sum.at[j] += d.at[j];
        store_pack(out, sum);
    }
}

static void token_embedding_backward(float *dwte,                            /* (rows, c) */
                                     const floatR *dout, const int *tokens, /* (n, c), (n) */
                                     int rows, int n, int c, int accumulate) {
    const int spans = (n + SPAN - 1) / SPAN, sorters = (n + SORT_THREADS - 1) / SORT_THREADS, room = (n + 63) / 64 * 64;
    int *orders[2] = {(int *)scratch, (int *)scratch + room}, *counts = orders[1] + room; /* (n) each, (sorters, BINS) */
    float *parts = (float *)(counts + sorters * BINS);                                   /* (spans, 2, c) */
    const int *order = NULL;
    if (!accumulate) cudaCheck(cudaMemsetAsync(dwte, 0, (size_t)rows * c * sizeof(float), stream));
    for (int pass = 0; pass == 0 || (rows - 1) >> SORT_BITS * pass > 0; pass++) {
        count_bins_kernel<<<sorters, SORT_THREADS, 0, stream>>>(counts, order, tokens, n, SORT_BITS * pass);
        cudaCheck(cudaGetLastError());
        int *next = orders[pass % 2];
        sort_indices_kernel<<<sorters, SORT_THREADS, 0, stream>>>(next, order, tokens, counts, n, SORT_BITS * pass);
        cudaCheck(cudaGetLastError());
        order = next;
    }
    token_embedding_backward_kernel<<<spans, EMBEDDING_BLOCK, 0, stream>>>(dwte, parts, dout, tokens, order, n, c);
    cudaCheck(cudaGetLastError());
    token_embedding_parts_kernel<<<spans, EMBEDDING_BLOCK, 0, stream>>>(dwte, parts, tokens, order, n, c);
    cudaCheck(cudaGetLastError());
}

/* ---- position embedding: out[b][t] = inp[b][t] + wpe[t] ---------------------------------------------------------- */

__global__ void __launch_bounds__(ROW_BLOCK) position_embedding_kernel(floatR *out, const floatR *inp, const floatX *wpe,
                                                                       int n, int t, int c) {
    const int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / ROW_THREADS, thread = threadIdx.x % ROW_THREADS;
    if (row >= n) return;
    const size_t at = (size_t)row * c, position = (size_t)(row % t) * c;
    for (int k = 0; k < ROW_PACKS; k++) {
        const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
        if (!in_row(i)) break;
        Pack<floatR, ROW_WIDTH> x = load_pack<ROW_WIDTH>(inp + at + i);
        const Pack<floatX, ROW_WIDTH> p = load_pack<ROW_WIDTH>(wpe + position + i);
        for (int j = 0; j < ROW_WIDTH; j++) x.at[j] = (floatR)(x[j] + p[j]);
        store_pack(out + at + i, x);
    }
}

static void position_embedding_forward(floatR *out,                           /* (b, t, c); may be inp */
                                       const floatR *inp, const floatX *wpe, /* (b, t, c), (MAXT, c) */
                                       int b, int t, int c) {
    position_embedding_kernel<<<row_blocks(b * t), ROW_BLOCK, 0, stream>>>(out, inp, wpe, b * t, t, c);
    cudaCheck(cudaGetLastError());
}

/* dwpe[t] += the sum of dout[b][t] over b; positions that no token has get 0. A thread has a pack of one position. */
__global__ void __launch_bounds__(32) position_embedding_backward_kernel(float *dwpe, const floatR *dout, int b, int t, int c,
                                                                         int accumulate) {
    const int row = blockIdx.x, i = (blockIdx.y * 32 + threadIdx.x) * ROW_WIDTH;
    if (i >= c) return;
    Pack<float, ROW_WIDTH> sum = {};
    if (accumulate) sum = load_pack<ROW_WIDTH>(dwpe + (size_t)row * c + i);
    if (row < t) {
#pragma unroll 8
        for (int s = 0; s < b; s++) {
            const Pack<floatR, ROW_WIDTH> g = load_pack<ROW_WIDTH>(dout + ((size_t)s * t + row) * c + i);
            for (int j = 0; j < ROW_WIDTH; j++) sum.at[j] += g[j];
        }
    }
    store_pack(dwpe + (size_t)row * c + i, sum);
}

static void position_embedding_backward(float *dwpe,        /* (rows, c) */
                                        const floatR *dout, /* (b, t, c) */
                                        int rows, int b, int t, int c, int accumulate) {
    const dim3 grid(rows, (c + 32 * ROW_WIDTH - 1) / (32 * ROW_WIDTH));
    position_embedding_backward_kernel<<<grid, 32, 0, stream>>>(dwpe, dout, b, t, c, accumulate);
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

/* With g = dout * weight:  dinp = addend + rstd * (g - mean(g) - xhat * mean(g * xhat));
 * dweight += dout * xhat and dbias += dout, summed over the rows.
 * On request also dsum += dinp, summed over the rows (what lies below reads dinp as its dout: this is the gradient of its
 * bias), and dinp rounded to floatX. A block has every gridDim.x-th of the groups of BLOCK_ROWS rows, and reads each row
 * once. */
template <bool ADDEND>
__global__ void __launch_bounds__(ROW_BLOCK, ROW_RESIDENT) layernorm_backward_kernel(
    floatR *dinp, floatX *dinp_copy, float *partial, const floatX *dout, const floatR *inp, const float *mean,
    const float *rstd, const floatX *weight, const floatR *addend, int n, int c, bool make_dsum) {
    const int thread = threadIdx.x % ROW_THREADS;
    const float per_channel = 1.0f / c;
    Pack<floatX, ROW_WIDTH> w[ROW_PACKS] = {};
    for (int k = 0; k < ROW_PACKS; k++) {
        const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
        if (in_row(i)) w[k] = load_pack<ROW_WIDTH>(weight + i);
    }
    float dweight[ROW_PACKS][ROW_WIDTH] = {};
    float dbias[ROW_PACKS][ROW_WIDTH] = {};
    float dsum[ROW_PACKS][ROW_WIDTH] = {};
    for (int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / ROW_THREADS; row < n; row += gridDim.x * BLOCK_ROWS) {
        const size_t at = (size_t)row * c;
        const float s = rstd[row], offset = -mean[row] * s; /* xhat = inp * s + offset */
        Pack<floatX, ROW_WIDTH> g[ROW_PACKS] = {};
        Pack<floatR, ROW_WIDTH> x[ROW_PACKS] = {}, before[ROW_PACKS] = {};
        for (int k = 0; k < ROW_PACKS; k++) {
            const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
            if (!in_row(i)) break;
            g[k] = load_pack<ROW_WIDTH>(dout + at + i);
            x[k] = load_pack<ROW_WIDTH>(inp + at + i);
            if (ADDEND) before[k] = load_pack<ROW_WIDTH>(addend + at + i);
        }
        float sums[2] = {0.0f, 0.0f}; /* of g and of g * xhat */
        for (int k = 0; k < ROW_PACKS; k++) {
            const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
            if (!in_row(i)) break;
            for (int j = 0; j < ROW_WIDTH; j++) {
                const float d = g[k][j], xhat = fmaf(x[k][j], s, offset);
                dweight[k][j] += d * xhat;
                dbias[k][j] += d;
                sums[0] += d * w[k][j];
                sums[1] += d * w[k][j] * xhat;
            }
        }
        row_sums<ROW_THREADS>(sums);
        const float mean_g = sums[0] * per_channel, mean_dot = sums[1] * per_channel;
        for (int k = 0; k < ROW_PACKS; k++) {
            const int i = (k * ROW_THREADS + thread) * ROW_WIDTH;
            if (!in_row(i)) break;
            Pack<floatR, ROW_WIDTH> out;
            Pack<floatX, ROW_WIDTH> copy;
            for (int j = 0; j < ROW_WIDTH; j++) {
                const float xhat = fmaf(x[k][j], s, offset);
                const float change = s * (g[k][j] * w[k][j] - mean_g - xhat * mean_dot);
                const float d = before[k][j] + change;
                out.at[j] = (floatR)d;
                copy.at[j] = (floatX)d;
                dsum[k][j] += d;
            }
            store_pack(dinp + at + i, out);
            if (dinp_copy) store_pack(dinp_copy + at + i, copy);
        }
    }
    partial += (size_t)blockIdx.x * PARTIALS * c;
    store_partial(partial, dweight, c);
    store_partial(partial + c, dbias, c);
    if (make_dsum) store_partial(partial + 2 * (size_t)c, dsum, c);
}

/* dsum and dinp_copy: NULL where nobody needs them. */
static void layernorm_backward(floatR *dinp, float *dweight, float *dbias, /* (n, c), (c), (c) */
                               const floatX *dout, const floatR *inp,        /* (n, c), (n, c) */
                               const float *mean, const float *rstd,         /* (n), (n) */
                               const floatX *weight, const floatR *addend, /* (c), (n, c) or NULL; may be dinp */
                               int n, int c, int accumulate,
                               float *dsum = NULL, floatX *dinp_copy = NULL) { /* (c), (n, c) */
    const int blocks = partial_blocks(n);
    const auto kernel = addend ? layernorm_backward_kernel<true> : layernorm_backward_kernel<false>;
    kernel<<<blocks, ROW_BLOCK, 0, stream>>>(dinp, dinp_copy, scratch, dout, inp, mean, rstd, weight, addend, n, c,
                                             dsum != NULL);
    cudaCheck(cudaGetLastError());
    sum_partials(dweight, dbias, dsum, blocks, c, accumulate);
}

/* ---- linear: out = inp . weight^T + bias ------------------------------------------------------------------------- */

template <class Out, class Addend>
static void linear_forward(Out *out,                                                      /* (n, oc) */
                           const floatX *inp, const floatX *weight,                       /* (n, c), (oc, c) */
                           const floatX *bias, const Addend *addend, /* (oc) or NULL, (n, oc) or NULL; may be out */
                           int n, int c, int oc) {
    const Epilogue<Out, Addend> epilogue = {out, NULL, bias, addend};
    matmul<Tile128x256, FORWARD, ADD, true>(epilogue, inp, weight, n, oc, c);
}

/* out = gelu(x) of x = inp . weight^T + bias, and slope = gelu'(x), which is what the backward wants of x. */
static void linear_gelu_forward(floatX *out, floatX *slope,              /* (n, oc), (n, oc) or NULL */
                                const floatX *inp, const floatX *weight, /* (n, c), (oc, c) */
                                const floatX *bias,                      /* (oc) or NULL */
                                int n, int c, int oc) {
    const Epilogue<floatX, floatX> epilogue = {out, slope, bias, NULL};
    matmul<Tile128x256, FORWARD, GELU, true>(epilogue, inp, weight, n, oc, c);
}

/* dinp = dout . weight */
template <class Out>
static void linear_backward_input(Out *dinp,                                /* (n, c) */
                                  const floatX *dout, const floatX *weight, /* (n, oc), (oc, c) */
                                  int n, int c, int oc) {
    const Epilogue<Out, Out> epilogue = {dinp, NULL, NULL, NULL};
    matmul<Tile128x256, INPUT_GRADIENT, ADD, true>(epilogue, dout, weight, n, c, oc);
}

/* dinp = dout . weight * slope, while it is still at hand; dsum += the sum of dinp over the rows. */
static void linear_backward_input_gelu(floatX *dinp,                             /* (n, c) */
                                       const floatX *dout, const floatX *weight, /* (n, oc), (oc, c) */
                                       const floatX *slope,                      /* (n, c) */
                                       int n, int c, int oc, float *dsum = NULL, int accumulate = 0) { /* dsum (c) */
    gelu_input_gradient<Tile128x128, true>(dinp, dsum, dout, weight, slope, n, c, oc, accumulate);
}

/* dweight += dout^T . inp; dbias += the sum of dout over the rows. The last argument: in how many parts the rows are
 * summed, where the tiles of dweight alone would leave multiprocessors idle. */
static void linear_backward_weight(float *dweight, float *dbias,         /* (oc, c), (oc) or NULL */
                                   const floatX *dout, const floatX *inp, /* (n, oc), (n, c) */
                                   int n, int c, int oc, int accumulate) {
    if (c == 768 && oc == 50304)
        weight_gradient<Tile128x256, true>(dweight, dbias, dout, inp, n, c, oc, accumulate, 1);
    else if (c == 768 && oc == 768)
        weight_gradient<Tile128x256, true>(dweight, dbias, dout, inp, n, c, oc, accumulate, 6);
    else if (c == 768 && oc == 2304)
        weight_gradient<Tile128x256, true>(dweight, dbias, dout, inp, n, c, oc, accumulate, 2);
    else
        weight_gradient<Tile128x256, true>(dweight, dbias, dout, inp, n, c, oc, accumulate, 3);
}

/* ---- causal self-attention: out = softmax(q . k^T / sqrt(HS)) . v, each query seeing the keys up to its own ---------
 *
 * No T x T matrix ever exists: a block of queries meets one block of keys at a time (Dao 2023, arXiv:2307.08691). The
 * softmax runs along these blocks: the largest score and the sum are kept for each query, and what has been accumulated
 * is rescaled when the largest has grown by much. The forward leaves lse = max + log(sum), from which the backward
 * computes any block of probabilities again. Heads lie side by side: a row of qkv holds all of q, then k, then v.
 *
 * The backward takes two kernels. In the first a thread block owns queries and passes over keys, for dq; in the second
 * it owns keys and passes over queries, for dk and dv. The scores are computed twice that way, 7 products instead of 5,
 * but all sums stay in registers: no float atomics, no dq in memory, the same bits each time.
 *
 * A warp owns M x 16 rows, on which it is alone: its scores s (M*16, N) come out of one product and go into the next
 * without leaving its registers. The tiles of the rows which pass by are double-buffered in shared memory:
 *
 *   for each tile:  wait for it, all threads;  fetch the next;  s = own rows . tile^T;  softmax;  sums += s . tile
 */

enum {
    ATTENTION_WARPS = 4,
    HEAD_PIECE = 8, /* values in 16 bytes */
    HEAD_SPLIT = HS <= 128 ? 1 : 2, /* warps that share the columns of dk and dv */
    HEAD = (HS + 16 * HEAD_SPLIT - 1) / (16 * HEAD_SPLIT) * (16 * HEAD_SPLIT), /* columns of a tile: HS, then 0s */
    HEAD_PITCH = HEAD + HEAD_PIECE, /* an odd number of pieces: no two of 8 rows begin in the same bank */

    /* Of each kernel: how often 16 rows a warp has, rows of a tile passing by, thread blocks of a multiprocessor. */
    FORWARD_M = HS <= 128 ? 2 : 1, FORWARD_KEYS = 32, FORWARD_BLOCKS = HS <= 64 ? 3 : 2,
    DQ_M = HS <= 64 ? 2 : 1, DQ_KEYS = HS <= 128 ? 32 : 16, DQ_BLOCKS = HS <= 128 ? 3 : 2,
    DKV_M = HS <= 64 ? 2 : 1, DKV_QUERIES = HS <= 64 ? 64 : HS <= 128 ? 32 : 16, DKV_BLOCKS = 2,
    FORWARD_QUERIES = ATTENTION_WARPS * FORWARD_M * 16, DQ_QUERIES = ATTENTION_WARPS * DQ_M * 16,
    DKV_KEYS = ATTENTION_WARPS / HEAD_SPLIT * DKV_M * 16,
    DKV_N = DKV_QUERIES < 32 ? DKV_QUERIES : 32, /* of a tile's queries at a time */

    SOFTMAX_SLACK = 8,       /* what is subtracted from a score may be this far from the largest, in powers of 2 */
    ATTENTION_L2 = 16 << 20, /* bytes of keys and values that are worked on at a time */
};

static const float LOG2E = 1.44269504089f, LN2 = 0.69314718056f;

/* A lane's part of scores and sums: of each 16 x 8 values its element e is in this row and this column. */
__device__ __forceinline__ int row_of(int m, int e) { return m * 16 + threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int n, int e) { return n * 8 + threadIdx.x % 4 * 2 + e % 2; }

/* The 4 lanes that share a row. */
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__device__ __forceinline__ bool sees(int query, int key) { return key <= query; }

/* Which block of which head. `together` heads, which fit the L2 cache, go first, and of those the blocks of most work,
 * the blocks 0. */
__device__ __forceinline__ void block_and_head(int *block, int *head, int blocks, int heads, int together) {
    const int first = (int)blockIdx.x / (blocks * together) * together;
    const int at = (int)blockIdx.x - first * blocks, here = min(together, heads - first);
    *block = at / here;
    *head = first + at % here;
}

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

__device__ __forceinline__ float2 pair_at(const floatX *p) { return __bfloat1622float2(*(const __nv_bfloat162 *)p); }

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

static int heads_together(int t) { return max(1, (int)(ATTENTION_L2 / (2 * (size_t)t * HS * sizeof(floatX)))); }

/* out (b, t, C), lse (b, NH, t) from qkv (b, t, 3*C). A thread block owns
 * FORWARD_QUERIES queries of a head, tiles of FORWARD_KEYS keys and values pass by. */
__global__ void __launch_bounds__(ATTENTION_WARPS * 32, FORWARD_BLOCKS)
attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, int t, int heads, int together) {
    extern __shared__ __align__(16) floatX attention_tiles[];
    constexpr int M = FORWARD_M, N = FORWARD_KEYS;
    floatX *queries = attention_tiles, *keys = queries + FORWARD_QUERIES * HEAD_PITCH;
    floatX *values = keys + 2 * N * HEAD_PITCH;
    const int blocks = (t + FORWARD_QUERIES - 1) / FORWARD_QUERIES;
    int block, head;
    block_and_head(&block, &head, blocks, heads, together);
    const int q0 = (blocks - 1 - block) * FORWARD_QUERIES, row = (int)threadIdx.x / 32 * M * 16;
    const int first = q0 + row, last = first + M * 16 - 1; /* the warp's queries */
    const size_t start = (size_t)(head / NH) * t, stride = 3 * C, narrow = C;
    const floatX *q = qkv + start * stride + head % NH * HS;
    const floatX *k = qkv + start * stride + NH * HS + head % NH * HS, *v = k + NH * HS;
    const float scale = 1.0f / sqrtf(HS), unit = scale * LOG2E; /* exponents are of 2 */

    const float slack = SOFTMAX_SLACK / unit;
    const int end = min(t, q0 + FORWARD_QUERIES);
    const int begin = 0;
    fetch_tile<FORWARD_QUERIES>(queries, q + q0 * stride, stride, t - q0);
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
            const float total = row_sum(sum[m][e / 2]), share = 1.0f / total;
            const int query = first + row_of(m, e);
            if (threadIdx.x % 4 == 0 && query < t)
                lse[(size_t)head * t + query] = top[m][e / 2] * (unit * LN2) + logf(total);
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                o[m][n][e] *= share;
                o[m][n][e + 1] *= share;
            }
        }
    __syncthreads(); /* the tile of the queries becomes that of out */
    put_sums<M, HEAD>(queries + row * HEAD_PITCH, o, 1.0f);
    __syncthreads();
    save_tile<FORWARD_QUERIES>(out + (start + q0) * narrow + head % NH * HS, narrow, queries, t - q0);
}

static void attention_forward(floatX *out, float *lse, /* (b, t, C), (b, NH, t) */
                              const floatX *qkv,       /* (b, t, 3*C) */
                              int b, int t) {
    const int blocks = b * NH * ((t + FORWARD_QUERIES - 1) / FORWARD_QUERIES), together = heads_together(t);
    const int shared = (FORWARD_QUERIES + 4 * FORWARD_KEYS) * HEAD_PITCH * (int)sizeof(floatX);
    cudaCheck(cudaFuncSetAttribute(attention_forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    attention_forward_kernel<<<blocks, ATTENTION_WARPS * 32, shared, stream>>>(out, lse, qkv, t, b * NH,
                                                                              together);
    cudaCheck(cudaGetLastError());
}

/* With p = exp(q . k^T * scale - lse) and delta = the sum of dout * out over a row:
 *   dv = p^T . dout,  ds = p * (dout . v^T - delta),  dq = ds . k * scale,  dk = ds^T . q * scale */

/* dq of DQ_QUERIES queries of a head, tiles of DQ_KEYS keys and values passing by; on the way, delta (b, NH, t). */
__global__ void __launch_bounds__(ATTENTION_WARPS * 32, DQ_BLOCKS)
attention_backward_q_kernel(floatX *dqkv, float *delta, const floatX *dout, const floatX *out, const float *lse,
                            const floatX *qkv, int t, int heads, int together) {
    extern __shared__ __align__(16) floatX attention_tiles[];
    constexpr int M = DQ_M, N = DQ_KEYS;
    floatX *queries = attention_tiles, *douts = queries + DQ_QUERIES * HEAD_PITCH;
    floatX *keys = douts + DQ_QUERIES * HEAD_PITCH, *values = keys + 2 * N * HEAD_PITCH;
    const int blocks = (t + DQ_QUERIES - 1) / DQ_QUERIES;
    int block, head;
    block_and_head(&block, &head, blocks, heads, together);
    const int q0 = (blocks - 1 - block) * DQ_QUERIES, row = (int)threadIdx.x / 32 * M * 16;
    const int first = q0 + row, last = first + M * 16 - 1; /* the warp's queries */
    const size_t start = (size_t)(head / NH) * t, stride = 3 * C, narrow = C;
    const size_t at = (start + q0) * stride + head % NH * HS, narrow_at = (start + q0) * narrow + head % NH * HS;
    const floatX *k = qkv + start * stride + NH * HS + head % NH * HS, *v = k + NH * HS;
    const float scale = 1.0f / sqrtf(HS), unit = scale * LOG2E; /* exponents are of 2 */

    floatX *outs = keys; /* before there are keys */
    static_assert(DQ_QUERIES <= 4 * DQ_KEYS, "no room for out");
    fetch_tile<DQ_QUERIES>(queries, qkv + at, stride, t - q0);
    fetch_tile<DQ_QUERIES>(douts, dout + narrow_at, narrow, t - q0);
    fetch_tile<DQ_QUERIES>(outs, out + narrow_at, narrow, t - q0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float shift[M][2], mean[M][2]; /* lse and delta */
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int query = first + row_of(m, e);
            float part = 0.0f;
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                const int at_pair = (row + row_of(m, e)) * HEAD_PITCH + column_of(n, 0);
                const float2 g = pair_at(douts + at_pair), o = pair_at(outs + at_pair);
                part += g.x * o.x + g.y * o.y;
            }
            mean[m][e / 2] = row_sum(part);
            shift[m][e / 2] = query < t ? lse[(size_t)head * t + query] * LOG2E : INFINITY; /* p = 0 beyond the end */
            if (threadIdx.x % 4 == 0 && query < t) delta[(size_t)head * t + query] = mean[m][e / 2];
        }
    __syncthreads();

    const int end = min(t, q0 + DQ_QUERIES);
    const int begin = 0;
    fetch_tile<N>(keys, k + begin * stride, stride, t - begin);
    fetch_tile<N>(values, v + begin * stride, stride, t - begin);
    cp_async_commit();
    float dq[M][HEAD / 8][4] = {};
    for (int k0 = begin, stage = 0; k0 < end; k0 += N, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (k0 + N < end) {
            const int next = k0 + N, to = (stage ^ 1) * N * HEAD_PITCH;
            fetch_tile<N>(keys + to, k + next * stride, stride, t - next);
            fetch_tile<N>(values + to, v + next * stride, stride, t - next);
            cp_async_commit();
        }
        const int in_tile = stage * N * HEAD_PITCH;
        if (first >= t || k0 > last) continue;
        float s[M][N / 8][4], ds[M][N / 8][4];
        rows_by_rows<M, N>(s, queries + row * HEAD_PITCH, keys + in_tile);
        rows_by_rows<M, N>(ds, douts + row * HEAD_PITCH, values + in_tile);
        if (!sees(first, k0 + N - 1)) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!sees(first + row_of(m, e), k0 + column_of(n, e))) s[m][n][e] = -INFINITY;
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    ds[m][n][e] = exp2_approx(s[m][n][e] * unit - shift[m][e / 2]) * (ds[m][n][e] - mean[m][e / 2]);
        scores_by_rows<M, N, HEAD>(dq, ds, keys + in_tile);
    }
    __syncthreads();
    put_sums<M, HEAD>(queries + row * HEAD_PITCH, dq, scale);
    __syncthreads();
    save_tile<DQ_QUERIES>(dqkv + at, stride, queries, t - q0);
}

/* dk and dv of DKV_KEYS keys of a head, tiles of DKV_QUERIES queries and their dout passing by.
 * Rows are keys and columns queries here: s = k . q^T. */
__global__ void __launch_bounds__(ATTENTION_WARPS * 32, DKV_BLOCKS)
attention_backward_kv_kernel(floatX *dqkv, const floatX *dout, const float *lse, const float *delta, const floatX *qkv,
                             int t, int heads, int together) {
    extern __shared__ __align__(16) floatX attention_tiles[];
    constexpr int M = DKV_M, N = DKV_N, COLUMNS = HEAD / HEAD_SPLIT;
    floatX *keys = attention_tiles, *values = keys + DKV_KEYS * HEAD_PITCH;
    floatX *queries = values + DKV_KEYS * HEAD_PITCH, *douts = queries + 2 * DKV_QUERIES * HEAD_PITCH;
    __shared__ float shifts[2][DKV_QUERIES], means[2][DKV_QUERIES]; /* lse and delta */
    const int blocks = (t + DKV_KEYS - 1) / DKV_KEYS;
    int block, head;
    block_and_head(&block, &head, blocks, heads, together);
    const int warp = (int)threadIdx.x / 32, row = warp / HEAD_SPLIT * M * 16, column = warp % HEAD_SPLIT * COLUMNS;
    const int start_key = block * DKV_KEYS, first = start_key + row, last = first + M * 16 - 1; /* the warp's keys */
    const size_t start = (size_t)(head / NH) * t, stride = 3 * C, narrow = C;
    const size_t at = (start + start_key) * stride + NH * HS + head % NH * HS;
    const float scale = 1.0f / sqrtf(HS), unit = scale * LOG2E; /* exponents are of 2 */

    const int begin = start_key / DKV_QUERIES * DKV_QUERIES;
    const int end = t;
    const int tiles = (end - begin + DKV_QUERIES - 1) / DKV_QUERIES;
    float next_shift = 0.0f, next_mean = 0.0f;
    auto fetch = [&](int step, int stage) {
        const int q_head = head % NH, q0 = begin + step * DKV_QUERIES;
        const size_t line = (size_t)head * t;
        const int to = stage * DKV_QUERIES * HEAD_PITCH, query = q0 + (int)threadIdx.x;
        fetch_tile<DKV_QUERIES>(queries + to, qkv + (start + q0) * stride + q_head * HS, stride, t - q0);
        fetch_tile<DKV_QUERIES>(douts + to, dout + (start + q0) * narrow + q_head * HS, narrow, t - q0);
        const bool there = threadIdx.x < DKV_QUERIES && query < t;
        next_shift = there ? lse[line + query] * LOG2E : INFINITY; /* p = 0 beyond the end */
        next_mean = there ? delta[line + query] : 0.0f;
    };
    fetch_tile<DKV_KEYS>(keys, qkv + at, stride, t - start_key);
    fetch_tile<DKV_KEYS>(values, qkv + at + NH * HS, stride, t - start_key);
    fetch(0, 0);
    cp_async_commit();

    float dk[M][COLUMNS / 8][4] = {}, dv[M][COLUMNS / 8][4] = {};
    for (int step = 0, stage = 0; step < tiles; step++, stage ^= 1) {
        if (threadIdx.x < DKV_QUERIES) {
            shifts[stage][threadIdx.x] = next_shift;
            means[stage][threadIdx.x] = next_mean;
        }
        cp_async_wait<0>();
        __syncthreads();
        if (step + 1 < tiles) {
            fetch(step + 1, stage ^ 1);
            cp_async_commit();
        }
        for (int part = 0; part < DKV_QUERIES; part += N) {
            const int q0 = begin + step * DKV_QUERIES + part;
            const int in_tile = (stage * DKV_QUERIES + part) * HEAD_PITCH;
            if (first >= t || q0 >= t || q0 + N - 1 < first) continue;
            float s[M][N / 8][4], ds[M][N / 8][4];
            rows_by_rows<M, N>(s, keys + row * HEAD_PITCH, queries + in_tile);
            if (!sees(q0, last)) {
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < N / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (!sees(q0 + column_of(n, e), first + row_of(m, e))) s[m][n][e] = -INFINITY;
            }
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float shift = shifts[stage][part + column_of(n, i)];
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int e = i; e < 4; e += 2) s[m][n][e] = exp2_approx(s[m][n][e] * unit - shift);
                }
            scores_by_rows<M, N, COLUMNS>(dv, s, douts + in_tile + column);
            rows_by_rows<M, N>(ds, values + row * HEAD_PITCH, douts + in_tile);
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float mean = means[stage][part + column_of(n, i)];
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int e = i; e < 4; e += 2) ds[m][n][e] = s[m][n][e] * (ds[m][n][e] - mean);
                }
            scores_by_rows<M, N, COLUMNS>(dk, ds, queries + in_tile + column);
        }
    }
    __syncthreads();
    put_sums<M, COLUMNS>(keys + row * HEAD_PITCH + column, dk, scale);
    put_sums<M, COLUMNS>(values + row * HEAD_PITCH + column, dv, 1.0f);
    __syncthreads();
    save_tile<DKV_KEYS>(dqkv + at, stride, keys, t - start_key);
    save_tile<DKV_KEYS>(dqkv + at + NH * HS, stride, values, t - start_key);
}

static void attention_backward(floatX *dqkv,                          /* (b, t, 3*C) */
                               const floatX *dout, const floatX *out, /* (b, t, C) each */
                               const float *lse, const floatX *qkv,   /* (b, NH, t), (b, t, 3*C) */
                               int b, int t) {
    float *delta = scratch; /* (b, NH, t) */
    const int q_blocks = b * NH * ((t + DQ_QUERIES - 1) / DQ_QUERIES), together = heads_together(t);
    const int q_shared = (2 * DQ_QUERIES + 4 * DQ_KEYS) * HEAD_PITCH * (int)sizeof(floatX);
    cudaCheck(cudaFuncSetAttribute(attention_backward_q_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   q_shared));
    attention_backward_q_kernel<<<q_blocks, ATTENTION_WARPS * 32, q_shared, stream>>>(
        dqkv, delta, dout, out, lse, qkv, t, b * NH, together);
    cudaCheck(cudaGetLastError());

    const int kv_blocks = b * NH * ((t + DKV_KEYS - 1) / DKV_KEYS);
    const int kv_shared = (2 * DKV_KEYS + 4 * DKV_QUERIES) * HEAD_PITCH * (int)sizeof(floatX);
    cudaCheck(cudaFuncSetAttribute(attention_backward_kv_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kv_shared));
    attention_backward_kv_kernel<<<kv_blocks, ATTENTION_WARPS * 32, kv_shared, stream>>>(
        dqkv, dout, lse, delta, qkv, t, b * NH, together);
    cudaCheck(cudaGetLastError());
}

/* ---- classifier: logits = inp . weight^T, loss = log(sum(exp(logits))) - logits[target] -----------------------------
 * CHUNK rows at a time: the logits of all tokens never exist. The weight is padded from V to VP rows; the logits of the
 * padding are computed and then left out. */

enum {
    VOCABULARY_WIDTH = pack_width(VP),
    LOSS_THREADS = VP > 16384 ? 512 : VP > 2048 ? 256 : 64, /* a row of logits belongs to a block */
    LOSS_LOADS = 4,                                         /* packs that a thread has under way */
    LOSS_STEP = LOSS_THREADS * VOCABULARY_WIDTH,
    ROW_IS_HELD = VP * sizeof(floatX) + 512 <= 99 * 1024,   /* in shared memory; else the block reads it again */
};

/* exp(x - largest), in one multiply-add and one power of 2. */
__device__ __forceinline__ float exp_minus(float x, float largest) {
    return exp2_approx(fmaf(x, 1.4426950408889634f, largest * -1.4426950408889634f));
}

/* The loss of each row of logits and, with BACKWARD, in their place the gradient of loss_scale times the loss; 0 in the
 * padding. The row is read once: the sum of the exponentials runs along with the largest logit, and is rescaled when that
 * grows. */
template <bool BACKWARD>
__global__ void __launch_bounds__(LOSS_THREADS, 1024 / LOSS_THREADS)
    loss_kernel(float *losses, floatX *logits, const int *targets, float loss_scale) { /* (rows), (rows, VP), (rows) */
    typedef Pack<floatX, VOCABULARY_WIDTH> Logits;
    extern __shared__ Logits held[];
    __shared__ float warp_largest[LOSS_THREADS / 32], warp_total[LOSS_THREADS / 32];
    floatX *x = logits + (size_t)blockIdx.x * VP;
    const int target = targets[blockIdx.x], own = threadIdx.x * VOCABULARY_WIDTH;
    const float correct = (float)x[target];
    float largest = -1e30f, total = 0.0f;
    for (int first = own; first < V; first += LOSS_LOADS * LOSS_STEP) {
        Logits v[LOSS_LOADS];
        for (int k = 0; k < LOSS_LOADS; k++)
            if (first + k * LOSS_STEP < V) v[k] = load_pack<VOCABULARY_WIDTH>(x + first + k * LOSS_STEP);
        for (int k = 0; k < LOSS_LOADS; k++) {
            const int i = first + k * LOSS_STEP;
            if (i >= V) break;
            if (i + VOCABULARY_WIDTH > V)
                for (int j = 0; j < VOCABULARY_WIDTH; j++)
                    if (i + j >= V) v[k].at[j] = (floatX)-INFINITY;
            if (BACKWARD && ROW_IS_HELD) held[i / VOCABULARY_WIDTH] = v[k];
            float top = v[k][0], sum = 0.0f;
            for (int j = 1; j < VOCABULARY_WIDTH; j++) top = fmaxf(top, v[k][j]);
            if (top > largest) {
                total *= fast_exp(largest - top);
                largest = top;
            }
            for (int j = 0; j < VOCABULARY_WIDTH; j++) sum += exp_minus(v[k][j], largest);
            total += sum;
        }
    }
    const float warp_top = warp_max(largest);
    total = warp_sum(total * fast_exp(largest - warp_top));
    if (threadIdx.x % 32 == 0) {
        warp_largest[threadIdx.x / 32] = warp_top;
        warp_total[threadIdx.x / 32] = total;
    }
    __syncthreads();
    largest = warp_largest[0];
    for (int warp = 1; warp < LOSS_THREADS / 32; warp++) largest = fmaxf(largest, warp_largest[warp]);
    total = 0.0f;
    for (int warp = 0; warp < LOSS_THREADS / 32; warp++)
        total += warp_total[warp] * fast_exp(warp_largest[warp] - largest);
    const float lse = logf(total) + largest;
    const float loss = lse - correct;
    if (threadIdx.x == 0) losses[blockIdx.x] = loss;
    if (!BACKWARD) return;
    const float scale = loss_scale / total;
#pragma unroll 2
    for (int i = own; i < VP; i += LOSS_STEP) {
        Logits d;
        if (i < V) {
            const Logits v = ROW_IS_HELD ? held[i / VOCABULARY_WIDTH] : load_pack<VOCABULARY_WIDTH>(x + i);
            for (int j = 0; j < VOCABULARY_WIDTH; j++) {
                float g = exp_minus(v[j], largest) * scale;
                if (i + j == target) g -= loss_scale;
                d.at[j] = (floatX)g;
            }
        }
        if (i + VOCABULARY_WIDTH > V)
            for (int j = 0; j < VOCABULARY_WIDTH; j++)
                if (i + j >= V) d.at[j] = (floatX)0.0f;
        store_pack(x + i, d);
    }
}

static void classifier_forward(float *losses, floatX *logits,                                /* (n), (CHUNK, VP) */
                               const floatX *inp, const floatX *weight, const int *targets, /* (n, C), (VP, C), (n) */
                               int n) {
    for (int first = 0; first < n; first += CHUNK) {
        const int rows = n - first < CHUNK ? n - first : CHUNK;
        linear_forward(logits, inp + (size_t)first * C, weight, (floatX *)NULL, (floatX *)NULL, rows, C, VP);
        if (logits_file) write_logits(logits, rows);
        loss_kernel<false><<<rows, LOSS_THREADS, 0, stream>>>(losses + first, logits, targets + first, 0.0f);
        cudaCheck(cudaGetLastError());
    }
}

/* The logits become their own gradient, dlogits = (softmax(logits) - onehot(target)) * loss_scale, 0 in the padding;
 * dinp = dlogits . weight, dweight += dlogits^T . inp. */
static void classifier_forward_backward(float *losses, floatX *dinp, float *dweight,        /* (n), (n, C), (VP, C) */
                                        floatX *logits,                                     /* (CHUNK, VP) */
                                        const floatX *inp, const floatX *weight, /* (n, C), (VP, C) */
                                        const int *targets, float loss_scale, int n, int accumulate) {
    const int held = ROW_IS_HELD ? VP * (int)sizeof(floatX) : 0;
    cudaCheck(cudaFuncSetAttribute(loss_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, held));
    for (int first = 0; first < n; first += CHUNK) {
        const int rows = n - first < CHUNK ? n - first : CHUNK;
        const floatX *x = inp + (size_t)first * C;
        linear_forward(logits, x, weight, (floatX *)NULL, (floatX *)NULL, rows, C, VP);
        if (logits_file) write_logits(logits, rows);
        loss_kernel<true><<<rows, LOSS_THREADS, held, stream>>>(losses + first, logits, targets + first, loss_scale);
        cudaCheck(cudaGetLastError());
        linear_backward_input(dinp + (size_t)first * C, logits, weight, rows, C, VP);
        linear_backward_weight(dweight, NULL, logits, x, rows, C, VP, accumulate || first > 0);
    }
}

/* ---- the sum of squares of all gradients, for the global norm; the sum of the losses --------------------------------
 * In parts whose number does not depend on the GPU, which are then added in order. */

enum { NORM_PARTS = 1024, NORM_THREADS = 256 };

/* parts (NORM_PARTS): the squares of x (n), 4 values at a time; a block has every NORM_PARTS-th run of NORM_THREADS. */
__global__ void __launch_bounds__(NORM_THREADS) squares_kernel(double *parts, const float *x, size_t n) {
    const size_t packs = n / 4, step = (size_t)NORM_PARTS * NORM_THREADS;
    const size_t first = (size_t)blockIdx.x * NORM_THREADS + threadIdx.x;
    float sums[4] = {};
#pragma unroll 4
    for (size_t i = first; i < packs; i += step) {
        const Pack<float, 4> v = load_pack<4>(x + 4 * i);
        for (int j = 0; j < 4; j++) sums[j] += v.at[j] * v.at[j];
    }
    if (first < n % 4) sums[0] += x[4 * packs + first] * x[4 * packs + first];
    const double sum = block_sum<NORM_THREADS>((double)(sums[0] + sums[1]) + (double)(sums[2] + sums[3]));
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

/* out (+)= the sum of n numbers, by one block. */
template <class Value>
__global__ void __launch_bounds__(1024) sum_kernel(double *out, const Value *x, int n, int accumulate) { /* (1), (n) */
    double sum = 0.0;
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += 1024) sum += (double)x[i];
    sum = block_sum<1024>(sum);
    if (threadIdx.x == 0) *out = accumulate ? *out + sum : sum;
}

/* x starts at a multiple of 16 bytes. */
static void global_norm(double *out, const float *x, size_t n) { /* (1): the squared norm; (n) */
    squares_kernel<<<NORM_PARTS, NORM_THREADS, 0, stream>>>((double *)scratch, x, n);
    cudaCheck(cudaGetLastError());
    sum_kernel<<<1, 1024, 0, stream>>>(out, (const double *)scratch, NORM_PARTS, 0);
    cudaCheck(cudaGetLastError());
}

static void sum_losses(double *out, const float *losses, int n, int accumulate) { /* (1), (n) */
    sum_kernel<<<1, 1024, 0, stream>>>(out, losses, n, accumulate);
    cudaCheck(cudaGetLastError());
}

/* ---- AdamW (Loshchilov and Hutter): with g = grad * grad_scale,
 *   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
 *   param -= learning_rate * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon) + weight_decay * param) ---- */

/* Where the tensors end in memory, and the weight decay of each: all parameters are updated by one kernel. */
enum { MAX_TENSORS = 64, NOT_ADAMW = -1 };
typedef struct {
    int count;
    size_t end[MAX_TENSORS];         /* in values, multiples of 4; the last is the number of all */
    float weight_decay[MAX_TENSORS]; /* NOT_ADAMW: another optimizer's */
} Tensors;

/* A thread has 4 values. */
__global__ void __launch_bounds__(256) adamw_kernel(floatX *working, int16_t *rest, float *m, float *v,
                                                    const float *grad, const Tensors tensors, float grad_scale,
                                                    float learning_rate, float beta1, float beta2, float epsilon,
                                                    float correct1, float correct2) {
    const size_t i = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (i >= tensors.end[tensors.count - 1]) return;
    int tensor = 0;
    while (i >= tensors.end[tensor]) tensor++;
    const float weight_decay = tensors.weight_decay[tensor];
    if (weight_decay < 0.0f) return;
    Pack<floatX, 4> upper = load_pack<4>(working + i);
    Pack<int16_t, 4> lower = load_pack<4>(rest + i);
    Pack<float, 4> m_now = load_pack<4>(m + i), v_now = load_pack<4>(v + i);
    const Pack<float, 4> g_raw = load_pack<4>(grad + i);
    for (int j = 0; j < 4; j++) {
        const float g = g_raw.at[j] * grad_scale;
        m_now.at[j] = beta1 * m_now.at[j] + (1.0f - beta1) * g;
        v_now.at[j] = beta2 * v_now.at[j] + (1.0f - beta2) * g * g;
        const float direction = m_now.at[j] * correct1 / (sqrtf(v_now.at[j] * correct2) + epsilon);
        const float p = whole(upper.at[j], lower.at[j]);
        halve(p - learning_rate * (direction + weight_decay * p), &upper.at[j], &lower.at[j]);
    }
    store_pack(working + i, upper);
    store_pack(rest + i, lower);
    store_pack(m + i, m_now);
    store_pack(v + i, v_now);
}

static void adamw_update(floatX *working, int16_t *rest, float *m, float *v, const float *grad, /* as many as tensors say */
                         const Tensors *tensors, float grad_scale, float learning_rate, float beta1, float beta2,
                         float epsilon, int step) {
    const float correct1 = (float)(1.0 / (1.0 - pow(beta1, step))), correct2 = (float)(1.0 / (1.0 - pow(beta2, step)));
    const size_t n = tensors->end[tensors->count - 1];
    adamw_kernel<<<(unsigned)((n + 1023) / 1024), 256, 0, stream>>>(working, rest, m, v, grad, *tensors, grad_scale,
                                                                    learning_rate, beta1, beta2, epsilon, correct1, correct2);
    cudaCheck(cudaGetLastError());
}

/* ---- memory of the model ----------------------------------------------------------------------------------------- */

static_assert(sizeof(Parameters<float>) == NUM_TENSORS * sizeof(float *), "Parameters has a pointer for each row of the table");

template <class Value>
static void point_parameters(Parameters<Value> *p, Value *memory) {
    Value **tensors = (Value **)p;
    for (int i = 0; i < NUM_TENSORS; i++) tensors[i] = memory + parameter_table[i].offset;
}

/* All memory of the GPU that the program ever uses: 8,588,468,736 bytes. */
static void allocate_model(void) {
    params_memory = (floatX *)allocate_tensors(248951808);
    grads_memory = (float *)allocate_tensors(497903616);
    rest_memory = (int16_t *)allocate_tensors(248951808);
    moment1_memory = (float *)allocate_tensors(497903616);
    moment2_memory = (float *)allocate_tensors(497903616);
    point_parameters(&params, params_memory);
    point_parameters(&grads, grads_memory);

    char *workspace = (char *)allocate_tensors(6568476672);
    acts.residual = (floatX *)workspace;
    acts.ln1 = (floatX *)(workspace + 327155712);
    acts.ln1_mean = (float *)(workspace + 629145600);
    acts.ln1_rstd = (float *)(workspace + 629932032);
    acts.qkv = (floatX *)(workspace + 630718464);
    acts.attention = (floatX *)(workspace + 1536688128);
    acts.attention_lse = (float *)(workspace + 1838678016);
    acts.residual2 = (floatX *)(workspace + 1848115200);
    acts.ln2 = (floatX *)(workspace + 2150105088);
    acts.ln2_mean = (float *)(workspace + 2452094976);
    acts.ln2_rstd = (float *)(workspace + 2452881408);
    acts.gelu = (floatX *)(workspace + 2453667840);
    acts.fc_slope = (floatX *)(workspace + 3661627392);
    acts.lnf = (floatX *)(workspace + 6517948416);
    acts.lnf_mean = (float *)(workspace + 6568280064);
    acts.lnf_rstd = (float *)(workspace + 6568345600);
    acts.losses = (float *)(workspace + 6568411136);
    acts.dlnf = (floatX *)(workspace + 6543114240);
    acts.logits = (floatX *)(workspace + 4869586944);
    acts.dresidual = (floatX *)(workspace + 4970250240);
    acts.dfc = (floatX *)(workspace + 4869586944);
    acts.dln2 = (floatX *)(workspace + 4995416064);
    acts.dattention = (floatX *)(workspace + 4945084416);
    acts.dqkv = (floatX *)(workspace + 4869586944);
    acts.dln1 = (floatX *)(workspace + 4945084416);
    eval.residual = (floatX *)(workspace + 100663296);
    eval.ln1 = (floatX *)(workspace + 75497472);
    eval.ln1_mean = (float *)workspace;
    eval.ln1_rstd = (float *)(workspace + 65536);
    eval.qkv = (floatX *)workspace;
    eval.attention = (floatX *)(workspace + 75497472);
    eval.attention_lse = (float *)(workspace + 125829120);
    eval.ln2 = (floatX *)(workspace + 125829120);
    eval.ln2_mean = (float *)workspace;
    eval.ln2_rstd = (float *)(workspace + 65536);
    eval.gelu = (floatX *)workspace;
    eval.lnf = (floatX *)(workspace + 1648361472);
    eval.lnf_mean = (float *)workspace;
    eval.lnf_rstd = (float *)(workspace + 65536);
    eval.losses = (float *)(workspace + 1673527296);
    eval.logits = (floatX *)workspace;
    char *inputs = (char *)allocate_tensors(66048);
    tokens_on_gpu = (int *)inputs;
    results = (double *)(inputs + 65792);
    scratch = (float *)allocate_tensors(28311552);
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

/* One micro-batch: acts.losses of every token, their sum in results, and the gradients of loss_scale times that sum. The first
 * micro-batch of a step writes sum and gradients, later ones add to them. */
static void launch_forward_backward(const int *tokens, const int *targets, float loss_scale, int micro_batch) {
    /* embedding */
    token_embedding_forward(acts.residual, tokens, params.wte, BT, C);
    position_embedding_forward(acts.residual, acts.residual, params.wpe, B, T, C);
    /* layers */
    for (size_t l = 0; l < L; l++) {
        layernorm_forward(acts.ln1 + l*BT*C, acts.ln1_mean + l*BT, acts.ln1_rstd + l*BT, acts.residual + l*BT*C,
                          params.ln1w + l*C, params.ln1b + l*C, BT, C);
        linear_forward(acts.qkv + l*BT*3*C, acts.ln1 + l*BT*C, params.qkvw + l*3*C*C, params.qkvb + l*3*C,
                       (floatX *)NULL, BT, C, 3*C);
        attention_forward(acts.attention + l*BT*C, acts.attention_lse + l*B*NH*T, acts.qkv + l*BT*3*C, B, T);
        linear_forward(acts.residual2 + l*BT*C, acts.attention + l*BT*C, params.attprojw + l*C*C, params.attprojb + l*C,
                       acts.residual + l*BT*C, BT, C, C);
        layernorm_forward(acts.ln2 + l*BT*C, acts.ln2_mean + l*BT, acts.ln2_rstd + l*BT, acts.residual2 + l*BT*C,
                          params.ln2w + l*C, params.ln2b + l*C, BT, C);
        linear_gelu_forward(acts.gelu + l*BT*4*C, acts.fc_slope + l*BT*4*C, acts.ln2 + l*BT*C, params.fcw + l*4*C*C,
                            params.fcb + l*4*C, BT, C, 4*C);
        linear_forward(acts.residual + (l + 1)*BT*C, acts.gelu + l*BT*4*C, params.fcprojw + l*C*4*C,
                       params.fcprojb + l*C, acts.residual2 + l*BT*C, BT, 4*C, C);
    }
    /* head, forward and backward */
    layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, acts.residual + L*BT*C, params.lnfw, params.lnfb, BT, C);
    classifier_forward_backward(acts.losses, acts.dlnf, grads.wte, acts.logits, acts.lnf, params.wte, targets,
                                loss_scale, BT, micro_batch > 0);
    layernorm_backward(acts.dresidual, grads.lnfw, grads.lnfb, acts.dlnf, acts.residual + L*BT*C, acts.lnf_mean,
                       acts.lnf_rstd, params.lnfw, (floatX *)NULL, BT, C, micro_batch > 0);
    /* layers, backward */
    for (size_t l = L; l-- > 0;) {
        linear_backward_weight(grads.fcprojw + l*C*4*C, grads.fcprojb + l*C, acts.dresidual, acts.gelu + l*BT*4*C, BT,
                               4*C, C, micro_batch > 0);
        linear_backward_input_gelu(acts.dfc, acts.dresidual, params.fcprojw + l*C*4*C, acts.fc_slope + l*BT*4*C, BT,
                                   4*C, C, grads.fcb + l*4*C, micro_batch > 0);
        linear_backward_weight(grads.fcw + l*4*C*C, NULL, acts.dfc, acts.ln2 + l*BT*C, BT, C, 4*C, micro_batch > 0);
        linear_backward_input(acts.dln2, acts.dfc, params.fcw + l*4*C*C, BT, C, 4*C);
        layernorm_backward(acts.dresidual, grads.ln2w + l*C, grads.ln2b + l*C, acts.dln2, acts.residual2 + l*BT*C,
                           acts.ln2_mean + l*BT, acts.ln2_rstd + l*BT, params.ln2w + l*C, acts.dresidual, BT, C,
                           micro_batch > 0, grads.attprojb + l*C);
        linear_backward_weight(grads.attprojw + l*C*C, NULL, acts.dresidual, acts.attention + l*BT*C, BT, C, C,
                               micro_batch > 0);
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

    sum_losses(&results[LOSS], acts.losses, BT, micro_batch > 0);
}

/* The same with two launches less costly than hundreds: what is launched is recorded once, then replayed. */
static void forward_backward(const int *tokens, const int *targets, float loss_scale, int micro_batch) {
    static cudaGraphExec_t recorded[2]; /* of the first micro-batch, of later ones */
    cudaGraphExec_t *graph = &recorded[micro_batch > 0];
    if (logits_file) { /* for a debug state, which takes the logits as they come */
        launch_forward_backward(tokens, targets, loss_scale, micro_batch);
        return;
    }
    if (!*graph) {
        cudaGraph_t launches;
        cudaCheck(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        launch_forward_backward(tokens, targets, loss_scale, micro_batch);
        cudaCheck(cudaStreamEndCapture(stream, &launches));
        cudaCheck(cudaGraphInstantiate(graph, launches, 0));
        cudaCheck(cudaGraphDestroy(launches));
    }
    cudaCheck(cudaGraphLaunch(*graph, stream));
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
        linear_forward(eval.qkv, eval.ln1, params.qkvw + l*3*C*C, params.qkvb + l*3*C, (floatX *)NULL, b*t, C, 3*C);
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

/* Waits for the gradients. Returns their norm, and the mean loss of the step's tokens. */
static double gradient_norm(int tokens, double *loss) {
    double host[2];
    global_norm(&results[SQUARED_NORM], grads_memory, PARAMETER_VALUES);
    from_gpu(host, results, sizeof host);
    *loss = host[LOSS] / tokens;
    return sqrt(host[SQUARED_NORM]);
}

/* Clips the gradients, whose norm is given, to one of at most grad_clip and applies AdamW; step counts from 1.
 * Nobody waits for it: the next step is prepared meanwhile. */
static void update(const Settings *s, double norm, float learning_rate, int step) {
    const float grad_scale = s->grad_clip > 0.0 && norm > s->grad_clip ? (float)(s->grad_clip / norm) : 1.0f;
    Tensors tensors;
    tensors.count = NUM_TENSORS;
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorRow *row = &parameter_table[i];
        tensors.end[i] = row->offset + row->stride * (size_t)row->layers;
        tensors.weight_decay[i] = row->decays ? (float)s->weight_decay : 0.0f;
    }
    adamw_update(params_memory, rest_memory, moment1_memory, moment2_memory, grads_memory, &tensors, grad_scale,
                 learning_rate, (float)s->beta1, (float)s->beta2, (float)s->epsilon, step);
}

/* The weights as floats, and back: between two steps the gradients' memory serves for that. */
static const float *whole_parameters(void) {
    whole_weights(grads_memory, params_memory, rest_memory, PARAMETER_VALUES);
    return grads_memory;
}

static void halve_parameters(void) { halve_weights(params_memory, rest_memory, grads_memory, PARAMETER_VALUES); }

/* Of the (B, T) losses of a micro-batch. */
static double mean_loss(const float *losses) {
    double sum;
    sum_losses(&results[LOSS], losses, BT, 0);
    from_gpu(&sum, &results[LOSS], sizeof sum);
    return sum / BT;
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
            float *values = staging(row->count);
            memset(values, 0, row->count * sizeof(float));
            const int64_t n = (int64_t)row->valid;
            for (int64_t j = 0; j < n; j += 2) {
                float a, b;
                normal_pair(random_bits(seed, INIT_STREAM, first + (uint64_t)j), &a, &b);
                values[j] = row->mean + row->std * a;
                if (j + 1 < n) values[j + 1] = row->mean + row->std * b;
            }
            first += row->count;
            to_gpu(grads_memory + row->offset + (size_t)l * row->stride, values, row->count * sizeof(float));
        }
    }
    halve_parameters();
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
            float *values = staging(row->count);
            if (is_bf16) read_bf16(file, values, row->count, path);
            else read_input(file, values, row->count * sizeof(float), path);
            to_gpu(memory + row->offset + (size_t)l * row->stride, values, row->count * sizeof(float));
        }
    }
}

static void write_tensors(FILE *file, const float *memory, int as_bf16) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorRow *row = &parameter_table[i];
        for (int l = 0; l < row->layers; l++) {
            const float *values = floats_from_gpu(memory + row->offset + (size_t)l * row->stride, row->count);
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
    read_tensors(file, grads_memory, is_bf16, path);
    halve_parameters();
    fclose(file);
}

static void save_weights(const char *path, int as_bf16) {
    int32_t header[HEADER_INTS] = { WEIGHTS_MAGIC };
    header[1] = as_bf16 ? WEIGHTS_BF16 : WEIGHTS_FP32;
    for (int i = 0; i < WEIGHTS_HEADER; i++) header[2 + i] = weights_header[i].value;
    FILE *file = open_output(path);
    write_output(file, header, HEADER_BYTES);
    write_tensors(file, whole_parameters(), as_bf16);
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
        const int *sent = tokens_to_gpu(tokens, t);
        evaluate(sent, sent, 1, t, t - 1);  /* only the logits matter: any targets will do */
        const int token = draw_token(floats_from_gpu(eval.logits, V), s->temperature, coin);
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
    header[STATE_MASTER_WEIGHTS] = 1;
    header[STATE_STEP] = run->step;
    state_entries(header, s, data, run, 0);
    FILE *file = open_output(path);
    write_output(file, header, HEADER_BYTES);
    write_tensors(file, moment1_memory, 0);
    write_tensors(file, moment2_memory, 0);
    write_tensors(file, whole_parameters(), 0);
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
    if (masters) {  /* what a model in bf16 was rounded from */
        read_tensors(file, grads_memory, 0, path);
        halve_parameters();
    }
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
    save_weights(checkpoint[MODEL], 1);
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
    const int *inputs = tokens_to_gpu(tokens, n);
    evaluate(inputs, inputs + 1, 1, n - 1, kept - 1);
    const float *losses = floats_from_gpu(eval.losses, ending[0]);
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

static const double FLOPS_PER_TOKEN = 808195584; /* forward and backward; a multiply-add is 2 */

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

/* Always the same batches, the first ones, so that the figures compare. */
static void validate(const Settings *s, Loader *data, int step) {
    const int64_t batches = s->val_steps < data->num_samples ? s->val_steps : data->num_samples;
    double loss = 0.0;
    for (int64_t i = 0; i < batches; i++) {
        if (stop_signal) return;
        const int *tokens = tokens_to_gpu(load_sample(data, i), BT + 1);
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
        const int *tokens = tokens_to_gpu(load_sample(data, training_sample(s, data, run->samples++)), BT + 1);
        prefetch_sample(data, training_sample(s, data, run->samples));
        forward_backward(tokens, tokens + 1, 1.0f / (float)s->total_batch_size, micro);
    }
    const double norm = gradient_norm(s->total_batch_size, &loss);
    check_finite((float)loss, "loss", step);
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
        tokens = tokens_to_gpu(tokens, BT + 1);
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
    .save_dtype = "bf16", .lr_schedule = "cosine", .steps = -1, .total_batch_size = 16384, .batch_size = 16,
    .seq_len = 1024, .warmup_steps = 0, .val_every = 20, .val_steps = 20, .sample_every = 0, .sample_length = 64,
    .seed = 1337, .checkpoint_every = 0, .checkpoint_keep = 0, .checkpoint_major = 0, .shuffle = 0, .overfit_batch = 0,
    .resume = 0, .learning_rate = 0.0003, .final_lr_fraction = 1.0, .weight_decay = 0.0, .beta1 = 0.9, .beta2 = 0.95,
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

static const char version[] = "gpt2-124m, configuration a0b3a55a";

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

    open_gpu();
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
