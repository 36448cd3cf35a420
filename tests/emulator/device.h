/* CUDA's types, its intrinsic functions and what of the language is not C++. */
#pragma once
#include <math.h>
#include <string.h>
#include <algorithm>
#include "runtime.h"

#undef NULL
#define NULL nullptr /* an argument of a launch keeps being a null pointer */

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)
static const dim3 &blockDim = emulator::launched.block, &gridDim = emulator::launched.grid; /* names of members too */
static constexpr int warpSize = 32;

/* ---- vectors ---- */

#define VECTORS(T, name, two, four)                                   \
    struct alignas(two) name##2 { T x, y; };                          \
    struct name##3 { T x, y, z; };                                    \
    struct alignas(four) name##4 { T x, y, z, w; };                   \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float, float, 8, 16)
VECTORS(int, int, 8, 16)
#define uint3 unused_uint3
VECTORS(unsigned, uint, 8, 16)
#undef uint3
VECTORS(unsigned short, ushort, 4, 8)
VECTORS(double, double, 16, 16)
VECTORS(long long, longlong, 16, 16)
VECTORS(unsigned char, uchar, 2, 4)

/* ---- bf16 ---- */

struct __nv_bfloat16_raw {
    unsigned short x;
};
struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) {
        uint32_t u;
        memcpy(&u, &f, 4);
        bits = f != f ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16; /* to nearest, ties to even */
    }
    __nv_bfloat16(double f) : __nv_bfloat16((float)f) {}
    __nv_bfloat16(int i) : __nv_bfloat16((float)i) {}
    __nv_bfloat16(__nv_bfloat16_raw r) : bits(r.x) {}
    operator float() const {
        const uint32_t u = (uint32_t)bits << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
static inline float __bfloat162float(__nv_bfloat16 b) { return b; }
static inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16_raw{bits}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
static inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }

/* ---- fp16 ---- */

typedef _Float16 __half;
struct alignas(4) __half2 {
    __half x, y;
};
static inline __half2 __float2half2_rn(float x) { return {(__half)x, (__half)x}; }
static inline __half2 __floats2half2_rn(float x, float y) { return {(__half)x, (__half)y}; }
static inline float2 __half22float2(__half2 h) { return {(float)h.x, (float)h.y}; }
static inline __half2 __hmul2(__half2 a, __half2 b) { return {(__half)(a.x * b.x), (__half)(a.y * b.y)}; }
static inline __half2 __hadd2(__half2 a, __half2 b) { return {(__half)(a.x + b.x), (__half)(a.y + b.y)}; }
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {(__half)((float)a.x * (float)b.x + (float)c.x), (__half)((float)a.y * (float)b.y + (float)c.y)};
}

/* ---- numbers ---- */

template <class A, class B> static inline std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return (T)b < (T)a || a != a ? (T)b : (T)a;
}
template <class A, class B> static inline std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return (T)a < (T)b || a != a ? (T)b : (T)a;
}
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
/* The C library has such names of its own. */
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }

namespace emulator {
template <class To, class From> static inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
} // namespace emulator
static inline int __float_as_int(float f) { return emulator::bits_of<int>(f); }
static inline unsigned __float_as_uint(float f) { return emulator::bits_of<unsigned>(f); }
static inline float __int_as_float(int i) { return emulator::bits_of<float>(i); }
static inline float __uint_as_float(unsigned i) { return emulator::bits_of<float>(i); }

/* ---- memory ---- */

template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T v) { *p = v; }
template <class T> static inline void __stcg(T *p, T v) { *p = v; }
static inline void __threadfence(void) {}
static inline void __threadfence_block(void) {}
static inline void __threadfence_system(void) {}
static inline void __trap(void) { emulator::fail("__trap()"); }
static inline size_t __cvta_generic_to_shared(const void *p) { return emulator::shared_address(p); }

/* What an atomic function found; loops around it wait for others. */
template <class T> static inline T emulator_found(const T *p, T old) {
    uint64_t bits = 0;
    memcpy(&bits, &old, sizeof old);
    emulator::spin(p, bits, "an atomic function");
    return old;
}
#define ATOMIC(name, expression)                                                                             \
    template <class T, class V> __attribute__((no_sanitize("thread"))) static inline T name(T *p, V value) { \
        const T old = *p, v = (T)value;                                                                      \
        *p = (expression);                                                                                   \
        return emulator_found(p, old);                                                                       \
    }
ATOMIC(atomicAdd, old + v)
ATOMIC(atomicSub, old - v)
ATOMIC(atomicMax, old < v ? v : old)
ATOMIC(atomicMin, v < old ? v : old)
ATOMIC(atomicOr, old | v)
ATOMIC(atomicAnd, old &v)
ATOMIC(atomicXor, old ^ v)
ATOMIC(atomicExch, v)
ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T, class V, class W>
__attribute__((no_sanitize("thread"))) static inline T atomicCAS(T *p, V compare, W value) {
    const T old = *p;
    if (old == (T)compare) *p = (T)value;
    return emulator_found(p, old);
}

/* ---- what a block and a warp do together ---- */

static inline void __syncthreads(int line = __builtin_LINE()) { emulator::barrier_sync(0, 0, "__syncthreads", line); }

namespace emulator {

struct Vote {
    unsigned value, result;
};
template <class Function> static inline unsigned vote(unsigned mask, int predicate, const char *what, Function) {
    Vote mine = {predicate != 0, 0};
    collective(
        mask,
        [](void **args, uint32_t lanes) {
            unsigned ballot = 0;
            for (int i = 0; i < WARP; i++)
                if (lanes >> i & 1 && ((Vote *)args[i])->value) ballot |= 1u << i;
            for (int i = 0; i < WARP; i++)
                if (lanes >> i & 1) ((Vote *)args[i])->result = Function()(ballot, lanes);
        },
        what, &mine);
    return mine.result;
}
struct Ballot {
    unsigned operator()(unsigned b, unsigned) { return b; }
};
struct Any {
    unsigned operator()(unsigned b, unsigned) { return b != 0; }
};
struct All {
    unsigned operator()(unsigned b, unsigned lanes) { return b == lanes; }
};

template <class T> struct Shuffle {
    T value, result;
    int source;
};
template <class T> static inline T shuffle(unsigned mask, T value, int source, const char *what) {
    Shuffle<T> mine = {value, value, source};
    collective(
        mask,
        [](void **args, uint32_t lanes) {
            for (int i = 0; i < WARP; i++) {
                if (!(lanes >> i & 1)) continue;
                Shuffle<T> *s = (Shuffle<T> *)args[i];
                if (lanes >> s->source & 1) s->result = ((Shuffle<T> *)args[s->source])->value;
                else memset((void *)&s->result, 0xFF, sizeof(T)); /* that lane takes no part: undefined */
            }
        },
        what, &mine);
    return mine.result;
}

} // namespace emulator

static inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
    emulator::collective(mask, [](void **, uint32_t) {}, "__syncwarp", nullptr);
}
static inline unsigned __ballot_sync(unsigned mask, int p) {
    return emulator::vote(mask, p, "__ballot_sync", emulator::Ballot());
}
static inline int __any_sync(unsigned mask, int p) { return emulator::vote(mask, p, "__any_sync", emulator::Any()); }
static inline int __all_sync(unsigned mask, int p) { return emulator::vote(mask, p, "__all_sync", emulator::All()); }
template <class T> static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    const int lane = emulator::current->lane;
    return emulator::shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
    const int lane = emulator::current->lane, source = lane ^ bits;
    return emulator::shuffle(mask, v, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source & 31, "__shfl_xor_sync");
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
    const int lane = emulator::current->lane;
    return emulator::shuffle(mask, v, (lane & (width - 1)) + by < (unsigned)width ? lane + (int)by : lane, "__shfl_down_sync");
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
    const int lane = emulator::current->lane;
    return emulator::shuffle(mask, v, (lane & (width - 1)) >= (int)by ? lane - (int)by : lane, "__shfl_up_sync");
}
