"""CUDA kernels against numpy, on the emulator and on a GPU; and that the emulator notices what it should notice."""

import cuda_kernels
import emulator
import numpy as np
import pytest

from llmgen.config import ModelConfig

pytestmark = pytest.mark.skipif(not emulator.available(), reason="the emulator needs g++ on x86-64 Linux")
MODEL = ModelConfig(1, 2, 16, 50, 16, 2, 8, 64)


def own(folder, device, kernels: str, races: bool = False, **functions: str) -> cuda_kernels.Library:
    """A library of the test's own kernels."""
    return cuda_kernels.build(folder, device, {"C": 16}, MODEL, [], functions, more=kernels, races=races)


# A product of 32x32 matrices by one warp in the way the real kernels go about it: c = a . b^T, a and b (32, 32).
PRODUCT = """
__global__ void product_kernel(float *c, const bf16 *a, const bf16 *b) {
    extern __shared__ bf16 tiles[];
    bf16 *rows = tiles, *columns = tiles + 32 * 32;
    const int lane = threadIdx.x;
    for (int i = lane; i < 128; i += 32) {
        cp_async(shared_address(rows + 8 * i), a + 8 * i, 16);
        cp_async(shared_address(columns + 8 * i), b + 8 * i, 16);
    }
    cp_async_commit();
    WAIT
    __syncthreads();
    float d[2][4][4] = {};
    for (int k = 0; k < 32; k += 16) {
        uint32_t x[2][4], y[2][4];
        for (int i = 0; i < 2; i++) {
            ldmatrix_x4(x[i], shared_address(rows + (16 * i + lane % 16) * 32 + k + lane / 16 * 8));
            ldmatrix_x4(y[i], shared_address(columns + (16 * i + lane % 16) * 32 + k + lane / 16 * 8));
        }
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++) mma_bf16(d[i][j], x[i], y[j / 2][j % 2], y[j / 2][j % 2 + 2]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int h = 0; h < 2; h++) {
                float *to = c + (16 * i + 8 * h + lane / 4) * 32 + 8 * j + lane % 4 * 2;
                *(float2 *)to = make_float2(d[i][j][2 * h], d[i][j][2 * h + 1]);
            }
}
static void product(float *c, const bf16 *a, const bf16 *b) { product_kernel<<<1, 32, 4096, stream>>>(c, a, b); }
"""


def product(folder, device, rng, wait: str):
    library = own(folder, device, PRODUCT.replace("WAIT", wait), product="float *c, const bf16 *a, const bf16 *b")
    a, b = rng.standard_normal((2, 32, 32), dtype=np.float32)
    c = np.full((32, 32), np.nan, np.float32)
    library.product(c, a, b)
    return c, cuda_kernels.rounded(a) @ cuda_kernels.rounded(b).T


def test_a_product_by_tensor_cores(folder, device, rng):
    got, want = product(folder, device, rng, "cp_async_wait<0>();")
    assert np.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_missing_wait_for_copies_shows(folder, rng):
    got, _ = product(folder, "emulator", rng, "")
    assert np.isnan(got).all()


SHUFFLES = """
__global__ void shuffles_kernel(float *out, const float *inp) {
    __shared__ float sums[4], all[2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float x = inp[blockIdx.x * blockDim.x + threadIdx.x];
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, i);
    if (lane == 0) sums[warp] = x;
    BARRIER
    if (warp == 0) {
        float s = lane < 4 ? sums[lane] : 0;
        for (int i = 2; i > 0; i /= 2) s += __shfl_down_sync(0xFFFFFFFF, s, i);
        if (lane == 0) all[0] = s, all[1] = __popc(__ballot_sync(1, s > 0));
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = all[0];
}
static void shuffles(float *out, const float *inp, int blocks) { shuffles_kernel<<<blocks, 128, 0, stream>>>(out, inp); }
"""


def shuffles(folder, device, rng, barrier: str):
    library = own(folder, device, SHUFFLES.replace("BARRIER", barrier), shuffles="float *out, const float *inp, int blocks")
    inp, out = rng.standard_normal((20, 128), dtype=np.float32), np.full((20, 128), np.nan, np.float32)
    library.shuffles(out, inp, 20)
    return out, np.repeat(inp.sum(axis=1, keepdims=True), 128, axis=1)


def test_sums_by_shuffles_and_static_shared_memory_of_several_blocks(folder, device, rng):
    got, want = shuffles(folder, device, rng, "__syncthreads();")
    assert np.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_missing_barrier_shows(folder, rng):
    got, want = shuffles(folder, "emulator", rng, "")
    assert not np.allclose(got, want, rtol=1e-4, atol=1e-4)


RACES = """
__global__ void races_kernel(float *out, const float *inp, int which) {
    extern __shared__ float shared[];
    const int i = threadIdx.x;
    for (int round = 0; round < 3; round++) {
        cp_async(shared_address(shared + 4 * i), inp + 4 * i, 16);
        cp_async_commit();
        cp_async_wait<0>();
        if (which != 1) __syncthreads();
        out[i] = shared[(4 * i + 128 * (round + 1)) % 512];
        if (which != 2) __syncthreads();
        shared[i] = i;
        if (which == 3) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + i / 64), "r"(64) : "memory");
        out[i] += shared[i / 64 * 64 + (i + 32) % 64];
        __syncthreads();
    }
}
static void races(float *out, const float *inp, int which) { races_kernel<<<1, 128, 2048, stream>>>(out, inp, which); }
"""


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_races_are_found_whatever_the_order(folder, rng, which):
    library = own(folder, "emulator", RACES, races=True, races_="races(float *out, const float *inp, int which)")
    out, inp = np.zeros(128, np.float32), rng.standard_normal(512, dtype=np.float32)
    if which == 0:
        library.races_(out, inp, 0)
        return
    with pytest.raises(cuda_kernels.Failure, match="a race: it"):
        library.races_(out, inp, which)


TURNS = """
/* out: which block came when; they take their turns from the last to the first. */
__device__ __forceinline__ int load_acquire(const int *p) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__global__ void in_turn_kernel(int *out, int *turns, int offset) {
    if (threadIdx.x == 0) {
        const int mine = gridDim.x - 1 - blockIdx.x;
        while (load_acquire(turns) != mine + offset) {}
        out[mine] = blockIdx.x;
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turns), "r"(mine + 1 == gridDim.x ? 0 : mine + 1) : "memory");
    }
    __syncthreads();
}
static void in_turn(int *out, int offset) { in_turn_kernel<<<4, 64, 0, stream>>>(out, turns, offset); }
"""


def test_blocks_that_wait_for_each_other(folder, device):
    library = own(folder, device, TURNS, in_turn="int *out, int offset")
    out = np.zeros(4, np.int32)
    library.in_turn(out, 0)
    assert out.tolist() == [3, 2, 1, 0]


def test_a_deadlock_is_reported(folder):
    library = own(folder, "emulator", TURNS, in_turn="int *out, int offset")
    with pytest.raises(cuda_kernels.Failure, match=r"deadlock") as error:
        library.in_turn(np.zeros(4, np.int32), 1)
    assert "1 threads (first 0, last 0) wait for a load in a loop" in str(error.value)
    assert "63 threads (first 1, last 63) wait for __syncthreads at " in str(error.value)
    library.in_turn(np.zeros(4, np.int32), 0)  # and it can be used again


MISTAKES = """
__global__ void mistake_kernel(float *out, const float *inp, int which) {
    extern __shared__ float shared[];
    const int i = threadIdx.x;
    shared[i] = inp[i];
    if (which == 0) out[i + 1] = 1;
    if (which == 1) out[i] = inp[i + 1024];
    if (which == 2) shared[i + 40] = 1;
    if (which == 3) *(float4 *)(out + i) = make_float4(1, 2, 3, 4);
    if (which == 4 && i % 2) __syncwarp();
    if (which == 4 && i % 2 == 0) out[i] = __shfl_sync(0xFFFFFFFF, inp[i], 0);
    if (which == 5) if (i < 32) __syncthreads(); else
        __syncthreads();
    if (which == 6 && i < 32) asm volatile("bar.sync %0, %1;" ::"r"(1), "r"(64) : "memory");
    if (which == 7) cp_async(shared_address(shared + i), inp, 16);
    if (which == 8) out[i] = shared[i + 70000];
}
static void mistake(float *out, const float *inp, int which) { mistake_kernel<<<1, 64, 256 + 128, stream>>>(out, inp, which); }
"""


@pytest.mark.parametrize(
    "which, words",
    [
        (0, "outside of memory"),
        (1, "outside of memory"),
        (2, "into shared memory, which has 384"),
        (3, "misaligned"),
        (4, "lanes of a warp do different things together"),
        (5, "this thread is at line"),
        (6, "deadlock(.|\n)*32 threads .first 32, last 63. have ended(.|\n)*32 threads .first 0, last 31. wait for bar.sync"),
        (7, "must be a multiple of 16"),
        (8, "outside of memory"),
    ],
)
def test_mistakes_are_reported(folder, which, words):
    library = own(folder, "emulator", MISTAKES, mistake="float *out, const float *inp, int which")
    out, inp = np.zeros(64, np.float32), np.zeros(64, np.float32)
    with pytest.raises(cuda_kernels.Failure, match=words):
        library.mistake(out, inp, which)
    library.mistake(out, inp, -1)


# A product of 64x64 matrices on Hopper: TMA brings a (lines of 64 k) and b (lines of 64 k, or of 64 columns), one warpgroup
# multiplies, with a from shared memory or from registers, and TMA stores.
HOPPER = """
#include <cudaTypedefs.h>
__device__ __forceinline__ bool arrived(uint32_t bar) {
    uint32_t done;
    asm volatile("{.reg .pred p;mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(bar), "r"(0) : "memory");
    return done;
}
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(0), "r"(0), "r"(bar) : "memory");
}
__device__ __forceinline__ uint64_t matrix(uint32_t address) {
    return (uint64_t)(1u << 30 | 1024 / 16) << 32 | (address & 0x3FFFF) / 16;
}
template <int B_MN>
__global__ void hopper_kernel(const __grid_constant__ CUtensorMap map_c, const __grid_constant__ CUtensorMap map_a,
                              const __grid_constant__ CUtensorMap map_b, int from_registers) {
    extern __shared__ __align__(1024) char tiles[];
    __shared__ uint64_t barrier;
    const uint32_t a = shared_address(tiles), b = a + 8192, bar = shared_address(&barrier);
    const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4;
    if (t == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(1));
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(16384) : "memory");
        tma_load(a, &map_a, bar);
        tma_load(b, &map_b, bar);
    }
    __syncthreads();
    ARRIVAL
    float d[32];
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < 64; k += 16) {
        const uint64_t mb = matrix(b + (B_MN ? k * 128 : k * 2));
        if (from_registers) {
            uint32_t r[4];
            for (int i = 0; i < 4; i++) {
                const int line = row + i % 2 * 8, slot = (k / 8 + i / 2) ^ line % 8;
                r[i] = *(const uint32_t *)(tiles + line * 128 + slot * 16 + t % 4 * 4);
            }
            asm volatile("{.reg .pred p;setp.ne.b32 p, %37, 0;"
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                         "{D}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
                         : OUT : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(mb), "r"(k), "n"(B_MN));
        } else {
            asm volatile("{.reg .pred p;setp.ne.b32 p, %34, 0;"
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {D}, %32, %33, p, 1, 1, 0, %35;}"
                         : OUT : "l"(matrix(a + k * 2)), "l"(mb), "r"(k), "n"(B_MN));
        }
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    COMPLETION
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();
    for (int j = 0; j < 8; j++)
        for (int h = 0; h < 2; h++) {
            const __nv_bfloat162 v = __floats2bfloat162_rn(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
            *(__nv_bfloat162 *)(tiles + (row + 8 * h) * 128 + (j ^ (row + 8 * h) % 8) * 16 + t % 4 * 4) = v;
        }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (t == 0) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                     ::"l"(&map_c), "r"(0), "r"(0), "r"(a) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
}
static CUtensorMap make_map(const void *p, int rows) {
    void *encode;
    cudaDriverEntryPointQueryResult found;
    cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
    CUtensorMap map;
    const cuuint64_t dims[2] = {64, (cuuint64_t)rows}, strides[1] = {128};
    const cuuint32_t box[2] = {64, 64}, ones[2] = {1, 1};
    const CUresult failed = ((PFN_cuTensorMapEncodeTiled_v12000)encode)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)p, dims, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (failed) cudaCheck(cudaErrorInvalidValue);
    return map;
}
static void hopper(bf16 *c, const bf16 *a, const bf16 *b, int rows, int columns_first, int from_registers) {
    const CUtensorMap map_c = make_map(c, rows), map_a = make_map(a, rows), map_b = make_map(b, 64);
    if (columns_first) hopper_kernel<1><<<1, 128, 16384, stream>>>(map_c, map_a, map_b, from_registers);
    else hopper_kernel<0><<<1, 128, 16384, stream>>>(map_c, map_a, map_b, from_registers);
}
"""
HOPPER = HOPPER.replace("{D}", "{" + ", ".join(f"%{i}" for i in range(32)) + "}")
HOPPER = HOPPER.replace("OUT", ", ".join(f'"+f"(d[{i}])' for i in range(32)))


def hopper(folder, device, rng, columns_first, from_registers, arrival="while (!arrived(bar)) {}", completion=""):
    text = HOPPER.replace("ARRIVAL", arrival).replace("COMPLETION", completion)
    names = {"hopper": "bf16 *c, const bf16 *a, const bf16 *b, int rows, int columns_first, int from_registers"}
    library = cuda_kernels.build(folder, device, {"C": 16}, MODEL, [], names, arch="sm_90a", more=text)
    a, b = cuda_kernels.rounded(rng.standard_normal((2, 64, 64), dtype=np.float32))
    c = np.full((50, 64), np.nan, np.float32)
    library.hopper(c, a[:50].copy(), b, 50, columns_first, from_registers)
    return c, a[:50] @ (b if columns_first else b.T)


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("from_registers", [False, True])
def test_a_product_by_tma_and_wgmma(folder, device, rng, columns_first, from_registers):
    got, want = hopper(folder, device, rng, columns_first, from_registers)
    assert np.allclose(got, want, rtol=1e-2, atol=1e-2)


def test_a_missing_wait_for_tma_shows(folder, rng):
    try:
        got, _ = hopper(folder, "emulator", rng, False, False, arrival="")
        assert np.isnan(got).any()
    except cuda_kernels.Failure as error:
        assert "operands in shared memory changed" in str(error)


def test_an_operand_that_is_overwritten_too_early_is_reported(folder, rng):
    with pytest.raises(cuda_kernels.Failure, match="operands in shared memory changed"):
        hopper(folder, "emulator", rng, False, False, completion="((int *)tiles)[threadIdx.x] = 0;")
