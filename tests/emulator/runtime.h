/* The emulated device: threads as fibres of one OS thread, their blocks, warps and shared memory; and the launch of kernels.
 *
 * A thread runs until it must wait for others. What a warp does together (shuffles, votes, ldmatrix, mma) is done by
 * whichever lane arrives last, for all of them (see `collective`). If nobody can run, who waits for what is reported.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int WARP = 32;
constexpr int MULTIPROCESSORS = 4;
constexpr int SHARED_BASE = 1024;         /* where a block's shared memory begins in its window; what is below is reserved */
constexpr int SHARED_LIMIT = 227 * 1024;  /* that one block can have */
constexpr int SHARED_WINDOW = 256 * 1024; /* the part of a shared address that matrix descriptors hold */
constexpr int RANK_SHIFT = 24;            /* above it: the block's rank in its cluster */

typedef std::function<void()> Action;
typedef std::vector<uint32_t> Clock; /* see races.cpp */
struct Block;
struct Shadow;

/* Bulk stores of a thread: their bytes leave shared memory, then reach memory. */
struct StoreGroup {
    std::vector<Action> reads, writes;
    bool committed = false;
};

/* A thread. */
struct Fibre {
    void *sp;
    char *stack;
    Block *block;
    uint3 thread;
    int linear, warp, lane;
    bool done;
    const char *waits_for; /* "": it can run */
    uint64_t detail;
    const volatile void *spins_on;   /* what it read last in a loop that waits for others... */
    uint64_t spins_value;            /* ...and what it found */
    unsigned cluster_phase;
    std::vector<Action> copies;              /* cp.async: issued */
    std::deque<std::vector<Action>> groups;  /* cp.async: committed, oldest first */
    std::deque<StoreGroup> stores;           /* oldest first */
    Clock clock;
};

/* Does the work of a collective, args[lane] being what each participant brought. */
typedef void (*Work)(void **args, uint32_t lanes);

struct Gathering {
    uint32_t mask, arrived;
    Work work;
    const char *what;
    void *args[WARP];
};

struct Warp {
    uint32_t live = 0;
    std::vector<Gathering *> open;
};

struct Barrier {
    int arrived = 0, expected = 0; /* expected 0: all threads of the block that have not ended */
    int line = 0;
    std::vector<Fibre *> waiting;
    Clock clock;
};

struct Warpgroup {
    int arrived = 0;
    const char *what = nullptr;
    void *args[4 * WARP];
    std::vector<Action> products;              /* wgmma: issued */
    std::deque<std::vector<Action>> groups;    /* wgmma: committed, oldest first */
};

struct Cluster {
    std::vector<Block *> blocks;
    int live = 0, arrived = 0;
    unsigned phase = 0;
    size_t ended = 0; /* blocks */
    Clock clock;
};

struct Block {
    uint3 index;
    int rank; /* in its cluster */
    Cluster *cluster;
    char *shared; /* its window */
    int dynamic_bytes, end;
    std::vector<std::pair<const void *, int>> statics; /* __shared__ variables: key, offset */
    std::vector<std::pair<int, int>> gaps; /* which nobody may write */
    int live;
    std::vector<Fibre *> fibres;
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    Barrier barriers[16];
    std::vector<std::pair<char *, Clock>> mbarriers; /* their clocks */
    std::shared_ptr<Shadow> shadow;
};

struct Launch {
    const char *name;
    dim3 grid, block, cluster;
    size_t shared;
    bool together; /* all blocks must be resident */
    Action body;
};

extern Fibre *current;
extern Launch launched;

/* ---- for the emulated instructions ---- */

/* Ends the launch with a message that says which thread of which kernel said so. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Until somebody makes this thread ready. */
void wait_for(const char *what, uint64_t detail = 0);
void make_ready(Fibre *fibre);
/* For where a thread looks at what others may change: if it finds the same as the last time, it lets the others run. */
void spin(const volatile void *address, uint64_t value, const char *what);
void collective(uint32_t mask, Work work, const char *what, void *arg);
void warpgroup_collective(void (*work)(void **args), const char *what, void *arg);
void barrier_sync(int id, int threads, const char *what, int line = 0);
void barrier_arrive(int id, int threads);
void cluster_arrive(void);
void cluster_wait(void);
uint32_t shared_address(const void *p);
/* Shared memory of this block, or of another of its cluster, as a plain pointer. */
char *shared_pointer(uint32_t address, int bytes, int alignment);
char *dynamic_shared(void);
char *static_shared(const void *key, size_t bytes, size_t alignment);
/* What happens some time later, at the latest when nothing else can. */
void later(Action what);
bool finish_one(void);

/* ---- races ---- */

extern bool checking_races;
extern std::vector<void *> found_at, other_at; /* addresses in the code, for the message */
void start_clocks(Block *b);
void join(Clock &to, const Clock &from);
void tick(Fibre *f);
/* What this thread has done is known to whoever acquires the clock afterwards. */
void release_to(Clock &clock);
void acquire_from(Fibre *f, const Clock &clock);
/* An access to shared memory that the compiler does not see. */
void touch(const void *p, size_t bytes, bool writes, const void *at = __builtin_return_address(0)); /* at: in the code */

/* ---- for the program ---- */

int launch(const Launch &l); /* a cudaError_t */
void launch_and_keep(const Launch &l); /* the error for cudaGetLastError */
const char *message(void);   /* what went wrong last */
void set_message(const std::string &text);
int submit(void *stream, Action what); /* does it, or records it where the stream is being captured */

/* Arguments are taken by value at once, as a launch does. */
template <class Kernel, class... Args>
int start(const char *name, const Launch &shape, void *stream, Kernel kernel, Args... args) {
    Launch l = shape;
    l.name = name;
    l.body = [=] { kernel(args...); };
    return submit(stream, [=] { launch_and_keep(l); });
}
inline Launch shape(dim3 grid, dim3 block, size_t shared = 0, void * = nullptr) {
    return Launch{"", grid, block, dim3(1), shared, false, nullptr};
}

} // namespace emulator
