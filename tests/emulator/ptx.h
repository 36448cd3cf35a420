/* The instructions of PTX that the sources use inline, as functions: ptx.py turns each asm statement into calls of these.
 *
 * Results are pointers, and lists in braces are arrays (of pointers where they are results). Addresses of shared memory
 * are 32-bit numbers. What copies in the background has not copied before somebody waits for it.
 */
#pragma once
#include "device.h"

namespace ptx {

using namespace emulator;

template <class T> static inline T value(T v) { return v; }
template <class T> static inline T value(T *p) { return *p; }
static inline float low(uint32_t pair) { return bits_of<float>(pair << 16); }
static inline float high(uint32_t pair) { return bits_of<float>(pair & 0xFFFF0000); }
static inline void whole_warp(uint32_t lanes, const char *what) {
    if (lanes != 0xFFFFFFFF) fail("%s: only lanes %#x of the warp take part", what, lanes);
}
/* Operands as their constraints have them. */
template <class T> static inline uint32_t operand_r(T v) {
    static_assert(sizeof(T) == 4, "\"r\" is 32 bits");
    return bits_of<uint32_t>(v);
}
template <class T> static inline uint64_t operand_l(T v) {
    static_assert(sizeof(T) == 8, "\"l\" is 64 bits");
    return bits_of<uint64_t>(v);
}
template <class T> static inline uint16_t operand_h(T v) {
    static_assert(sizeof(T) == 2, "\"h\" is 16 bits");
    return bits_of<uint16_t>(v);
}
static inline float operand_f(float v) { return v; }

/* ---- moving and computing ---- */

template <class T, class S> static inline void mov(T *to, S from) { *to = bits_of<T>(from); }
template <class S> static inline void mov(uint32_t *to, S from) { *to = (uint32_t)from; }
template <class A, class B> static inline void setp_ne(bool *p, A a, B b) { *p = a != (A)b; }
template <class T, class A, class B> static inline void selp(T *to, A a, B b, bool p) { *to = p ? a : b; }
template <class T> static inline void ex2(T *to, float x) { *to = exp2f(x); }
template <class T> static inline void lg2(T *to, float x) { *to = log2f(x); }
template <class T> static inline void rcp(T *to, float x) { *to = 1 / x; }
template <class T> static inline void rsqrt(T *to, float x) { *to = 1 / sqrtf(x); }
template <class T> static inline void tanh(T *to, float x) { *to = tanhf(x); }
static inline void tanh_f16x2(uint32_t *to, uint32_t x) {
    uint32_t y = 0;
    for (int i = 0; i < 2; i++)
        y |= (uint32_t)bits_of<uint16_t>((_Float16)tanhf((float)bits_of<_Float16>((uint16_t)(x >> 16 * i)))) << 16 * i;
    *to = y;
}
static inline void cvt_bf16x2(uint32_t *to, float upper, float lower) {
    *to = (uint32_t)__nv_bfloat16(upper).bits << 16 | __nv_bfloat16(lower).bits;
}
static inline uint32_t special_laneid(void) { return current->lane; }
static inline uint32_t special_warpid(void) { return current->warp; }
static inline uint32_t special_smid(void) { return 0; }
static inline uint32_t special_cluster_ctarank(void) { return current->block->rank; }
static inline uint32_t special_cluster_nctarank(void) { return current->block->cluster->blocks.size(); }

/* ---- plain memory ---- */

template <class T> static inline void ld(T *to, uint64_t from) { *to = *(const T *)from; }
template <class T, size_t N> static inline void ld(T *const (&to)[N], uint64_t from) {
    if (from % (N * sizeof(T))) fail("ld: address %#lx must be a multiple of %zu", (unsigned long)from, N * sizeof(T));
    for (size_t i = 0; i < N; i++) *to[i] = ((const T *)from)[i];
}
/* Others may change what stands there. */
template <class T> static inline void ld_shared_with_others(T *to, uint64_t from) {
    *to = *(const volatile T *)from;
    uint64_t bits = 0;
    memcpy(&bits, to, sizeof(T));
    spin((const volatile void *)from, bits, "a load in a loop");
}
template <class T> static inline void st(uint64_t to, T v) { *(T *)to = v; }
template <class T, size_t N> static inline void st(uint64_t to, const T (&v)[N]) {
    if (to % (N * sizeof(T))) fail("st: address %#lx must be a multiple of %zu", (unsigned long)to, N * sizeof(T));
    memcpy((void *)to, v, sizeof v);
}
template <class T> static inline void red_add(uint64_t to, T v) { *(T *)to += v; }
template <class T> static inline void red_add_s32(uint64_t to, T v) { *(int *)to += (int)v; }
template <size_t N> static inline void red_add(uint64_t to, const float (&v)[N]) {
    for (size_t i = 0; i < N; i++) ((float *)to)[i] += v[i];
}
template <class T> static inline void lds(T *to, uint32_t from) {
    memcpy(to, shared_pointer(from, sizeof(T), sizeof(T)), sizeof(T));
}
template <class T, size_t N> static inline void lds(T *const (&to)[N], uint32_t from) {
    const char *p = shared_pointer(from, N * sizeof(T), N * sizeof(T));
    for (size_t i = 0; i < N; i++) memcpy(to[i], p + i * sizeof(T), sizeof(T));
}
template <class T> static inline void sts(uint32_t to, T v) { memcpy(shared_pointer(to, sizeof(T), sizeof(T)), &v, sizeof(T)); }
template <class T, size_t N> static inline void sts(uint32_t to, const T (&v)[N]) {
    memcpy(shared_pointer(to, sizeof v, sizeof v), v, sizeof v);
}
template <class... T> static inline void nothing(T...) {}

/* ---- cp.async ---- */

static inline void cp_async(uint32_t to, uint64_t from, int bytes, int from_bytes) {
    if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %d bytes", bytes);
    if (from_bytes < 0 || from_bytes > bytes) fail("cp.async of %d bytes, %d of them from memory", bytes, from_bytes);
    if (from % bytes) fail("cp.async: address %#lx must be a multiple of %d", (unsigned long)from, bytes);
    char *p = shared_pointer(to, bytes, bytes);
    memset(p, 0xFF, bytes);
    touch(p, bytes, true);
    current->copies.push_back([=] {
        touch(p, bytes, true);
        memset(p, 0, bytes);
        memcpy(p, (const void *)from, from_bytes);
    });
}
static inline void cp_async(uint32_t to, uint64_t from, int bytes) { cp_async(to, from, bytes, bytes); }
static inline void cp_async_commit(void) {
    current->groups.push_back(std::move(current->copies));
    current->copies.clear();
}
static inline void cp_async_wait(int pending) {
    while (current->groups.size() > (size_t)pending) {
        for (Action &copy : current->groups.front()) copy();
        current->groups.pop_front();
    }
}
static inline void cp_async_wait_all(void) {
    cp_async_commit();
    cp_async_wait(0);
}

/* ---- matrices in registers ---- */

template <size_t N> struct Matrices {
    uint32_t *r[N];
    uint32_t row;
};

/* Matrix i, row j at the address of lane 8i + j; of each matrix, a lane holds columns 2*(lane % 4) and + 1 of row lane / 4. */
template <bool TRANS, size_t N> static inline void ldmatrix(uint32_t *const (&r)[N], uint32_t row) {
    Matrices<N> mine;
    std::copy_n(r, N, mine.r);
    mine.row = row;
    collective(
        0xFFFFFFFF,
        [](void **args, uint32_t lanes) {
            whole_warp(lanes, "ldmatrix");
            for (size_t i = 0; i < N; i++) {
                uint16_t m[8][8];
                for (int j = 0; j < 8; j++) memcpy(m[j], shared_pointer(((Matrices<N> *)args[8 * i + j])->row, 16, 16), 16);
                for (int lane = 0; lane < WARP; lane++) {
                    const int a = lane / 4, b = 2 * (lane % 4);
                    *((Matrices<N> *)args[lane])->r[i] =
                        TRANS ? (uint32_t)m[b + 1][a] << 16 | m[b][a] : (uint32_t)m[a][b + 1] << 16 | m[a][b];
                }
            }
        },
        TRANS ? "ldmatrix.trans" : "ldmatrix", &mine);
}

struct Store {
    uint32_t r[4], row;
};
template <bool TRANS, size_t N> static inline void stmatrix(uint32_t row, const uint32_t (&r)[N]) {
    Store mine;
    std::copy_n(r, N, mine.r);
    mine.row = row;
    collective(
        0xFFFFFFFF,
        [](void **args, uint32_t lanes) {
            whole_warp(lanes, "stmatrix");
            for (size_t i = 0; i < N; i++) {
                uint16_t m[8][8];
                for (int lane = 0; lane < WARP; lane++) {
                    const int a = lane / 4, b = 2 * (lane % 4);
                    const uint32_t v = ((Store *)args[lane])->r[i];
                    (TRANS ? m[b][a] : m[a][b]) = v, (TRANS ? m[b + 1][a] : m[a][b + 1]) = v >> 16;
                }
                for (int j = 0; j < 8; j++) memcpy(shared_pointer(((Store *)args[8 * i + j])->row, 16, 16), m[j], 16);
            }
        },
        TRANS ? "stmatrix.trans" : "stmatrix", &mine);
}

/* d (16x8) = a (16xK) . b (Kx8) + c; a lane holds of rows lane/4 and + 8 two neighbouring values at 2*(lane % 4). */
template <int K> struct Product {
    float *d[4], c[4];
    uint32_t a[K / 4], b[K / 8];
};
template <int K, class C>
static inline void mma(float *const (&d)[4], const uint32_t (&a)[K / 4], const uint32_t (&b)[K / 8], const C (&c)[4]) {
    Product<K> mine;
    for (int i = 0; i < 4; i++) mine.d[i] = d[i], mine.c[i] = value(c[i]);
    std::copy_n(a, K / 4, mine.a);
    std::copy_n(b, K / 8, mine.b);
    collective(
        0xFFFFFFFF,
        [](void **args, uint32_t lanes) {
            whole_warp(lanes, "mma");
            float a[16][K], b[K][8], d[16][8] = {};
            for (int lane = 0; lane < WARP; lane++) {
                const Product<K> *p = (const Product<K> *)args[lane];
                const int row = lane / 4, column = 2 * (lane % 4);
                for (int i = 0; i < K / 4; i++) {
                    float *to = &a[row + 8 * (i % 2)][column + 8 * (i / 2)];
                    to[0] = low(p->a[i]), to[1] = high(p->a[i]);
                }
                for (int i = 0; i < K / 8; i++)
                    b[column + 8 * i][row] = low(p->b[i]), b[column + 8 * i + 1][row] = high(p->b[i]);
            }
            for (int i = 0; i < 16; i++)
                for (int k = 0; k < K; k++)
                    for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
            for (int lane = 0; lane < WARP; lane++) {
                Product<K> *p = (Product<K> *)args[lane];
                for (int i = 0; i < 4; i++) *p->d[i] = p->c[i] + d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
            }
        },
        "mma", &mine);
}

/* ---- barriers ---- */

static inline void bar_sync(int id, int threads = 0) { barrier_sync(id, threads, "bar.sync"); }
static inline void bar_arrive(int id, int threads) { barrier_arrive(id, threads); }

} // namespace ptx
