/* Hopper's instructions: barriers in shared memory, the tensor memory accelerator (TMA), wgmma.
 *
 * What TMA loads arrives when somebody waits and finds it missing; what it stores is read when its thread waits. A wgmma
 * computes when it is waited for, and fails if its operands in shared memory are not those that were there at its issue.
 */
#pragma once
#include "ptx.h"

typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
    CU_TENSOR_MAP_SWIZZLE_NONE,
    CU_TENSOR_MAP_SWIZZLE_32B,
    CU_TENSOR_MAP_SWIZZLE_64B,
    CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion {
    CU_TENSOR_MAP_L2_PROMOTION_NONE,
    CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
    CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA };

struct alignas(64) CUtensorMap { /* as large as the real one, which is opaque */
    char *address;
    uint64_t strides[4];
    uint32_t dims[5];
    uint16_t box[5];
    uint8_t rank, element, swizzle, is_float;
    char unused[128 - 8 - 32 - 20 - 10 - 4 - 2];
};
static_assert(sizeof(CUtensorMap) == 128, "");
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);
typedef decltype(&cuTensorMapEncodeTiled) PFN_cuTensorMapEncodeTiled_v12000;
typedef decltype(&cuTensorMapEncodeTiled) PFN_cuTensorMapEncodeTiled;

namespace ptx {

/* ---- blocks of a cluster ---- */

static inline void mapa(uint32_t *to, uint32_t address, uint32_t rank) {
    *to = (address & ((1u << RANK_SHIFT) - 1)) | rank << RANK_SHIFT;
}
static inline void elect(bool *leader, uint32_t mask) {
    *leader = vote(mask, 1, "elect", Ballot()) >> current->lane == 1 || (__builtin_ctz(mask) == current->lane);
}
static inline void setmaxnreg(int count) {
    if (count % 8 || count < 24 || count > 256) fail("setmaxnreg of %d", count);
    warpgroup_collective([](void **) {}, "setmaxnreg", nullptr);
}

/* ---- barriers in shared memory ---- */

void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_arrive(uint32_t barrier, uint32_t count = 1);
static inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    mbarrier_expect_tx(barrier, bytes);
    mbarrier_arrive(barrier);
}
bool mbarrier_passed(uint32_t barrier, uint32_t parity);
template <class... Hint> static inline void mbarrier_try_wait(bool *passed, uint32_t barrier, uint32_t parity, Hint...) {
    *passed = mbarrier_passed(barrier, parity);
}
template <class... Hint> static inline void mbarrier_try_wait(uint32_t *passed, uint32_t barrier, uint32_t parity, Hint...) {
    *passed = mbarrier_passed(barrier, parity);
}

/* ---- TMA ---- */

void tma_load_boxes(uint32_t to, const CUtensorMap *map, const int *at, int rank, uint32_t barrier, uint32_t blocks);
void tma_store_box(const CUtensorMap *map, const int *at, int rank, uint32_t from, bool add);
void bulk_load(uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier);
void bulk_store_bytes(uint64_t to, uint32_t from, uint32_t bytes, bool add);
void bulk_commit(void);
void bulk_wait(int pending, bool only_read);

template <int RANK, class... Hint>
static inline void tma_load(uint32_t to, uint64_t map, const uint32_t (&at)[RANK], uint32_t barrier, Hint...) {
    tma_load_boxes(to, (const CUtensorMap *)map, (const int *)at, RANK, barrier, 0);
}
template <int RANK, class... Hint>
static inline void tma_load_multicast(uint32_t to, uint64_t map, const uint32_t (&at)[RANK], uint32_t barrier, uint16_t blocks,
                                      Hint...) {
    tma_load_boxes(to, (const CUtensorMap *)map, (const int *)at, RANK, barrier, blocks);
}
template <int RANK, class... Hint>
static inline void tma_store(uint64_t map, const uint32_t (&at)[RANK], uint32_t from, Hint...) {
    tma_store_box((const CUtensorMap *)map, (const int *)at, RANK, from, false);
}
template <int RANK, class... Hint>
static inline void tma_reduce_add(uint64_t map, const uint32_t (&at)[RANK], uint32_t from, Hint...) {
    tma_store_box((const CUtensorMap *)map, (const int *)at, RANK, from, true);
}
static inline void bulk_store(uint64_t to, uint32_t from, uint32_t bytes) { bulk_store_bytes(to, from, bytes, false); }
static inline void bulk_reduce_add(uint64_t to, uint32_t from, uint32_t bytes) { bulk_store_bytes(to, from, bytes, true); }
static inline void bulk_wait_read(int pending) { bulk_wait(pending, true); }
static inline void bulk_wait_done(int pending) { bulk_wait(pending, false); }

/* ---- wgmma ---- */

struct Wgmma { /* what one thread brings */
    float *d;
    uint32_t a[4];
    uint64_t a_matrix, b_matrix;
    int n, accumulate, a_mn, b_mn, in_registers;
};
void wgmma_issue(Wgmma *mine);
void wgmma_commit(void);
void wgmma_wait(int pending);

template <int N, size_t R> static inline Wgmma wgmma_of(float *const (&d)[R], uint64_t b, bool accumulate, int b_mn) {
    static_assert(R == N / 2, "registers of d");
    for (size_t i = 0; i < R; i++)
        if (d[i] != d[0] + i) fail("wgmma: d must be one array");
    return Wgmma{d[0], {}, 0, b, N, accumulate, 0, b_mn, 0};
}
template <int N, size_t R>
static inline void wgmma(float *const (&d)[R], uint64_t a, uint64_t b, bool accumulate, int, int, int a_mn, int b_mn) {
    Wgmma mine = wgmma_of<N>(d, b, accumulate, b_mn);
    mine.a_matrix = a, mine.a_mn = a_mn;
    wgmma_issue(&mine);
}
template <int N, size_t R>
static inline void wgmma(float *const (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate, int, int, int b_mn) {
    Wgmma mine = wgmma_of<N>(d, b, accumulate, b_mn);
    std::copy_n(a, 4, mine.a);
    mine.in_registers = 1;
    wgmma_issue(&mine);
}

} // namespace ptx
