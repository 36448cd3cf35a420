"""What a multiplication costs on Hopper, in joules: by the tensor cores alone, and with operands and results that move.

    python3 tests/joules_of_wgmma.py

Blocks that stay, one on each multiprocessor: two warpgroups multiply steps of 64 k by wgmma, from operands that stay in shared
memory or that a third brings anew by bulk copies. Each case runs for HEAT and then WINDOW seconds, of which the card's energy
counter and clock are read, as `llmgen bench --energy` does.
"""

import subprocess
import tempfile
import time
from pathlib import Path

from llmgen import render
from llmgen.energy import Meter

HEAT, WINDOW = 0.25, 0.6  # seconds
STEPS = 20000  # of 256 x 192 x 64 in a call, some 20 ms
MEGABYTE = 1 << 20
CASES = [  # what; rows and columns of a tile; values; bytes that operands are brought from, 0: they stay; whether results leave
    ("256x192 tiles, operands stay", 256, 192, "normal", 0, False),
    ("128x256", 128, 256, "normal", 0, False),
    ("128x192", 128, 192, "normal", 0, False),
    ("256x192, zeros", 256, 192, "zeros", 0, False),
    ("256x192, positive", 256, 192, "positive", 0, False),
    ("256x192, all blocks the same operands", 256, 192, "normal", 57344, False),
    ("256x192, operands from L2", 256, 192, "normal", 24 * MEGABYTE, False),
    ("128x256, operands from L2", 128, 256, "normal", 24 * MEGABYTE, False),
    ("128x192, operands from L2", 128, 192, "normal", 24 * MEGABYTE, False),
    ("256x192, operands from L2, a result every 12 steps", 256, 192, "normal", 24 * MEGABYTE, True),
    ("256x192, operands from 1 GB", 256, 192, "normal", 1024 * MEGABYTE, False),
]
PTX = [
    "shared_address",
    "mbarrier_init",
    "mbarrier_init_fence",
    "mbarrier_expect",
    "mbarrier_arrive",
    "mbarrier_wait",
    "bulk_load",
    "bulk_commit",
    "bulk_wait_read",
    "registers_less",
    "registers_more",
    "matrix_descriptor",
    "wgmma_fence",
    "wgmma_commit",
    "wgmma_wait",
    "wgmma_192",
    "wgmma_256",
]
HEAD = """#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
"""
PROGRAM = """
enum { STEP = 64, PIECE = 8192, RESULT_STEPS = 12 };

__device__ __forceinline__ void bulk_store(void *to, uint32_t from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}

template <int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b) {
    if constexpr (N == 192) wgmma_192<0, 0>(d, a, b, 1);
    if constexpr (N == 256) wgmma_256<0, 0>(d, a, b, 1);
}

template <int M, int N>
struct Ring {
    enum { A = M * 128, B = N * 128, STAGE = A + B, STAGES = 3, SHARED = 1024 + STAGES * STAGE };
};

/* Tiles of M x N. from: bytes that operands are brought from, 0: what is there first stays. */
template <int M, int N>
__global__ void __launch_bounds__(384, 1)
multiply_kernel(const uint8_t *operands, size_t from, uint8_t *results, size_t to, float *never, int steps) {
    using R = Ring<M, N>;
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * R::STAGES];
    const uint32_t ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(barriers), empty = full + 8 * R::STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < R::STAGES; i++) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, 2);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_less<24>();
        if (threadIdx.x > 0) return;
        size_t at = from > R::STAGE ? (size_t)blockIdx.x * 7 * R::STAGE % (from - R::STAGE) / 16 * 16 : 0;
        size_t result = (size_t)blockIdx.x * M * N * 2 % (to ? to : 1);
        for (int i = 0; i < (from ? steps : (int)R::STAGES); i++) {
            const int stage = i % R::STAGES;
            if (from) mbarrier_wait(empty + 8 * stage, (i / R::STAGES & 1) ^ 1);
            mbarrier_expect(full + 8 * stage, R::STAGE);
            for (int k = 0; k < R::STAGE; k += PIECE)
                bulk_load(ring + stage * R::STAGE + k, operands + at + k, PIECE, full + 8 * stage);
            at += R::STAGE;
            if (at + R::STAGE > from) at = 0;
            if (to && i % RESULT_STEPS == RESULT_STEPS - 1) {
                for (int k = 0; k < M * N * 2; k += PIECE) bulk_store(results + result + k, ring + k % (2 * R::STAGE), PIECE);
                bulk_commit();
                bulk_wait_read<0>();
                result = (result + (size_t)gridDim.x * M * N * 2) % to;
            }
        }
    } else {
        registers_more<240>();
        constexpr int MINE = M / 128; /* blocks of 64 rows */
        const int w = threadIdx.x / 128 - 1;
        float d[MINE][N / 2] = {};
        for (int i = 0; i < steps; i++) {
            const int stage = i % R::STAGES;
            const uint32_t a = ring + stage * R::STAGE + w * MINE * PIECE, b = ring + stage * R::STAGE + R::A;
            if (from || i < R::STAGES) mbarrier_wait(full + 8 * stage, from ? i / R::STAGES & 1 : 0);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEP / 16; k++)
#pragma unroll
                for (int m = 0; m < MINE; m++)
                    multiply<N>(d[m], matrix_descriptor((a + m * PIECE) / 16 + k * 2, 0), matrix_descriptor(b / 16 + k * 2, 0));
            wgmma_commit();
            wgmma_wait<0>();
            if (from && threadIdx.x % 128 == 0) mbarrier_arrive(empty + 8 * stage);
        }
        float sum = 0;
        for (int m = 0; m < MINE; m++)
            for (int i = 0; i < N / 2; i++) sum += d[m][i];
        if (sum == 12345.678f) never[threadIdx.x] = sum; /* so that nothing is left out */
    }
}

static void check(void) {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) fprintf(stderr, "%s\\n", cudaGetErrorString(error)), exit(1);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

template <int M, int N>
static void measure(const uint8_t *operands, size_t from, uint8_t *results, size_t to, float *never, int blocks, int steps,
                    double heat, double window) {
    const auto kernel = multiply_kernel<M, N>;
    const int shared = Ring<M, N>::SHARED;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    double started = seconds();
    long calls = 0;
    for (int heated = 0;;) {
        for (int i = 0; i < 4; i++) kernel<<<blocks, 384, shared>>>(operands, from, results, to, never, steps);
        check();
        calls += 4;
        const double now = seconds();
        if (now - started < (heated ? window : heat)) continue;
        if (heated) {
            printf("done %.9g\\n", 2.0 * M * N * STEP * steps * blocks * (double)calls / (now - started));
            fflush(stdout);
            return;
        }
        printf("heated\\n");
        fflush(stdout);
        heated = 1, calls = 0, started = now;
    }
}

static float uniform(void) { return ((float)rand() + 0.5f) / ((float)RAND_MAX + 1.0f); }

int main(int argc, char **argv) { /* rows columns values from stores steps heat window */
    if (argc != 9) return 2;
    const int rows = atoi(argv[1]), columns = atoi(argv[2]), stores = atoi(argv[5]), steps = atoi(argv[6]);
    const size_t from = (size_t)atoll(argv[4]), there = from > (1 << 18) ? from : 1 << 18;
    const size_t to = stores ? (size_t)49152 * 8192 : 0;
    const double heat = atof(argv[7]), window = atof(argv[8]);
    const size_t some = there < (16 << 20) ? there : 16 << 20; /* bytes, repeated */
    __nv_bfloat16 *host = (__nv_bfloat16 *)malloc(some);
    for (size_t i = 0; i < some / 2; i++) {
        const float x = sqrtf(-2.0f * logf(uniform())) * cosf(6.2831853f * uniform());
        host[i] = __float2bfloat16(!strcmp(argv[3], "zeros") ? 0.0f : !strcmp(argv[3], "positive") ? fabsf(x) : x);
    }
    uint8_t *operands, *results = NULL;
    float *never;
    int blocks;
    cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0);
    cudaMalloc((void **)&operands, there);
    cudaMalloc((void **)&never, 4096);
    if (to) cudaMalloc((void **)&results, to);
    for (size_t at = 0; at < there; at += some)
        cudaMemcpy(operands + at, host, there - at < some ? there - at : some, cudaMemcpyHostToDevice);
    check();
    char card[32] = "none";
    cudaDeviceGetPCIBusId(card, sizeof card, 0);
    printf("card %s\\n", card);
    if (rows == 256 && columns == 192) measure<256, 192>(operands, from, results, to, never, blocks, steps, heat, window);
    if (rows == 128 && columns == 192) measure<128, 192>(operands, from, results, to, never, blocks, steps, heat, window);
    if (rows == 128 && columns == 256) measure<128, 256>(operands, from, results, to, never, blocks, steps, heat, window);
    return 0;
}
"""


def source() -> str:
    environment, wanted = render.environment(), frozenset(PTX)
    ptx = (environment.get_template(f"cuda/{name}.j2").render(functions=wanted, options={}) for name in ("ptx", "ptx_sm90"))
    return HEAD + "".join(ptx) + PROGRAM


def compile(path: Path, program: Path) -> None:
    flags = ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run(["nvcc", *flags, path, "-o", program], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, program = Path(folder) / "joules.cu", Path(folder) / "joules"
        path.write_text(source())
        compile(path, program)
        for name, rows, columns, values, size, stores in CASES:
            steps = STEPS * 256 * 192 // (rows * columns)
            command = [program, *map(str, (rows, columns, values, size, int(stores), steps, HEAT, WINDOW))]
            with Meter() as meter, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                heated = 0.0
                for line in child.stdout:
                    match line.split():
                        case ["card", bus_id]:
                            meter.watch(bus_id)
                        case ["heated"]:
                            heated = time.monotonic()
                        case ["done", flops]:
                            watts, clock = meter.between(heated, time.monotonic())
                            figures = f"{watts / float(flops) * 1e12:.3f} pJ a flop, {float(flops) * 1e-12:.0f} TFLOP/s"
                            print(f"{name:52s} {figures}, {watts:.0f} W, {clock:.0f} MHz", flush=True)
            if child.returncode:
                raise SystemExit(f"{name}: the program ended with status {child.returncode}")


if __name__ == "__main__":
    main()
