/* See cuda.h. Device memory lies between pages that cannot be touched, and is all ones (not a number) at first. */
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <map>

struct CUgraph_st {
    std::vector<emulator::Action> work;
};
struct CUgraphExec_st {
    std::vector<emulator::Action> work;
};
struct CUstream_st {
    CUgraph_st *capture;
};
struct CUevent_st {
    double time;
};

static CUstream_st default_stream;
static cudaError_t last_error;
static int capturing;

static cudaError_t keep(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}

static cudaError_t refuse(cudaError_t e, const char *why) {
    emulator::set_message(why);
    return keep(e);
}

namespace emulator {

size_t shared_allowed = 48 * 1024;

int submit(void *stream, Action what) {
    CUstream_st *s = stream ? (CUstream_st *)stream : &default_stream;
    if (s->capture) s->capture->work.push_back(what);
    else what();
    return last_error;
}

/* ---- memory ---- */

static constexpr size_t PAGE = 4096, ALIGNMENT = 256, FAR = 16 * PAGE;
struct Allocation {
    char *base;
    size_t bytes, mapped;
};
static std::map<char *, Allocation> allocations;

static size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

static bool clean(char *p, const Allocation &a) {
    for (size_t i = a.bytes; i < rounded(a.bytes, ALIGNMENT); i++)
        if ((unsigned char)p[i] != 0xFF) return false;
    return true;
}

const char *check_memory(void) {
    for (auto &[p, a] : allocations)
        if (!clean(p, a)) return "a write past the end of memory from cudaMalloc";
    return "";
}

static bool is_device(const void *p, size_t bytes) {
    auto next = allocations.upper_bound((char *)p);
    if (next == allocations.begin()) return false;
    auto &[start, a] = *--next;
    return (const char *)p + bytes <= start + a.bytes;
}

} // namespace emulator

using namespace emulator;

cudaError_t cudaMalloc(void **p, size_t bytes) {
    if (capturing) return refuse(cudaErrorStreamCaptureUnsupported, "cudaMalloc while a stream is captured");
    const size_t inner = rounded(rounded(bytes ? bytes : 1, ALIGNMENT), PAGE), mapped = inner + 2 * FAR;
    char *base = (char *)mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || mprotect(base + FAR, inner, PROT_READ | PROT_WRITE))
        return refuse(cudaErrorMemoryAllocation, "out of memory");
    char *start = base + FAR + inner - rounded(bytes ? bytes : 1, ALIGNMENT); /* it ends where the page does */
    memset(start, 0xFF, rounded(bytes ? bytes : 1, ALIGNMENT));
    allocations[start] = Allocation{base, bytes, mapped};
    *p = start;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    auto found = allocations.find((char *)p);
    if (found == allocations.end()) return refuse(cudaErrorInvalidValue, "cudaFree of what cudaMalloc has not given");
    const bool good = clean((char *)p, found->second);
    munmap(found->second.base, found->second.mapped);
    allocations.erase(found);
    return good ? cudaSuccess : refuse(cudaErrorInvalidValue, "a write past the end of memory from cudaMalloc");
}

cudaError_t cudaMallocHost(void **p, size_t bytes) {
    *p = malloc(bytes ? bytes : 1);
    return *p ? cudaSuccess : refuse(cudaErrorMemoryAllocation, "out of memory");
}
cudaError_t cudaFreeHost(void *p) {
    free(p);
    return cudaSuccess;
}

static const char *wrong_side(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    const bool to_device = is_device(to, bytes), from_device = is_device(from, bytes);
    if (kind == cudaMemcpyDefault) return nullptr;
    if (to_device != (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice))
        return "memcpy: the destination is not what its kind says";
    if (from_device != (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice))
        return "memcpy: the source is not what its kind says";
    return nullptr;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (capturing) return refuse(cudaErrorStreamCaptureUnsupported, "cudaMemcpy while a stream is captured");
    if (last_error == cudaErrorLaunchFailure) return last_error;
    const char *wrong = wrong_side(to, from, bytes, kind);
    if (wrong) return refuse(cudaErrorInvalidValue, wrong);
    memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    const char *wrong = wrong_side(to, from, bytes, kind);
    if (wrong) return refuse(cudaErrorInvalidValue, wrong);
    return (cudaError_t)submit(stream, [=] { memmove(to, from, bytes); });
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    if (!is_device(p, bytes)) return refuse(cudaErrorInvalidValue, "memset: not device memory");
    return (cudaError_t)submit(stream, [=] { memset(p, value, bytes); });
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = *free = (size_t)8 << 30;
    for (auto &[p, a] : allocations) *free -= std::min(*free, a.bytes);
    return cudaSuccess;
}

/* ---- errors and the device ---- */

cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    const cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
const char *cudaGetErrorString(cudaError_t error) { return error ? message() : "no error"; }
const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    }
    return "unknown";
}
cudaError_t cudaDeviceSynchronize(void) {
    if (capturing) return refuse(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize while a stream is captured");
    return last_error;
}
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int) {
    snprintf(id, (size_t)size, "0000:00:00.0");
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = cudaDeviceProp{"emulated device", (size_t)8 << 30, SHARED_LIMIT, 228 * 1024, 0, 0, MULTIPROCESSORS, 50 << 20, 2048};
    cudaDeviceGetAttribute(&p->major, cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&p->minor, cudaDevAttrComputeCapabilityMinor, 0);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_LIMIT; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    }
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

/* ---- streams, graphs, events ---- */

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = new CUstream_st();
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    if (capturing) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize while a stream is captured");
    return last_error;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || stream->capture) return refuse(cudaErrorInvalidValue, "this stream cannot be captured");
    stream->capture = new CUgraph_st();
    capturing++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!stream || !stream->capture) return refuse(cudaErrorInvalidValue, "this stream is not captured");
    *graph = stream->capture;
    stream->capture = nullptr;
    capturing--;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new CUgraphExec_st{graph->work};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    for (const Action &action : exec->work) submit(stream, action);
    return last_error;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

static double now(void) {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = new CUevent_st();
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return (cudaError_t)submit(stream, [=] { event->time = now(); });
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return last_error; }
cudaError_t cudaEventQuery(cudaEvent_t) { return last_error; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = (float)(to->time - from->time);
    return last_error;
}
namespace emulator {
void launch_and_keep(const Launch &l) {
    if (l.shared > shared_allowed) {
        set_message(std::string(l.name) + " cannot be launched: " + std::to_string(l.shared) +
                    " bytes of shared memory, without cudaFuncSetAttribute");
        keep(cudaErrorInvalidValue);
    } else if (last_error != cudaErrorLaunchFailure) keep((cudaError_t)launch(l));
}
} // namespace emulator
