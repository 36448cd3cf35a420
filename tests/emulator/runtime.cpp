/* See runtime.h. Compiled once; every emulated program is linked with it. */
#include "runtime.h"
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <map>

#ifndef __x86_64__
#error "the emulator's threads switch by x86-64 assembly"
#endif

namespace emulator {

Fibre *current;
Launch launched;

static constexpr int STACK_BYTES = 128 * 1024;

static void *scheduler_sp;                /* where the launch itself goes on */
static std::deque<Fibre *> ready;
static std::vector<Fibre *> idle_fibres;  /* with their stacks, for the next block */
static std::vector<char *> idle_windows;
static std::vector<Block *> resident;
static std::deque<Action> pending;        /* see `later` */
static size_t fruitless;                  /* threads in turn that looked again and found nothing new */
static bool stuck;                        /* all that could run are such threads */
static std::string error, last_message;
std::vector<void *> found_at, other_at;
static uint32_t random_state, launches;

/* ---- switching ---- */

extern "C" void emulator_switch(void **from, void *to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

static bool random_bit(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 31;
}

static void to_scheduler(void) {
    Fibre *self = current;
    emulator_switch(&self->sp, scheduler_sp);
}

/* Runs whoever is next; the caller has seen to it that somebody makes this thread ready again. */
static void next(void) {
    if (ready.empty()) return to_scheduler();
    Fibre *self = current;
    current = ready.front();
    ready.pop_front();
    if (current != self) emulator_switch(&self->sp, current->sp);
}

void make_ready(Fibre *fibre) {
    fibre->waits_for = "";
    fruitless = 0;
    ready.push_back(fibre);
}

void wait_for(const char *what, uint64_t detail) {
    current->waits_for = what, current->detail = detail;
    current->spins_on = nullptr;
    fruitless = 0;
    next();
}

bool finish_one(void) {
    if (pending.empty()) return false;
    Action action = random_bit() ? pending.front() : pending.back(); /* they are in no order */
    if (random_state >> 31) pending.pop_front();
    else pending.pop_back();
    action();
    fruitless = 0;
    return true;
}

void later(Action what) { pending.push_back(what); }

void spin(const volatile void *address, uint64_t value, const char *what) {
    if (current->spins_on != address || current->spins_value != value) {
        current->spins_on = address, current->spins_value = value;
        fruitless = 0;
        return;
    }
    current->waits_for = what, current->detail = (uint64_t)(uintptr_t)address;
    if (++fruitless > 2 * ready.size() + 2 && !finish_one()) { /* all others have looked since, and nothing has changed */
        stuck = true;
        to_scheduler();
    }
    ready.push_back(current);
    next();
    current->waits_for = "";
}

/* ---- errors ---- */

static std::string place(const Fibre *f) {
    char text[200];
    const uint3 &b = f->block->index, &t = f->thread;
    snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
    return text;
}

/* Addresses in a thread's calls, the innermost first: `at`, then from the frame at `rbp` on. */
static std::vector<void *> calls(const Fibre *f, void *at, void **rbp) {
    std::vector<void *> found = {at};
    while ((char *)rbp > f->stack - STACK_BYTES && (char *)(rbp + 2) <= f->stack && rbp[1] && found.size() < 12) {
        found.push_back((char *)rbp[1] - 1);
        rbp = (void **)rbp[0];
    }
    return found;
}

/* The lines of the .cu behind such addresses, "name.cu:12 in name.cu:34"; "" if nobody can tell. */
static std::string source_lines(const std::vector<void *> &addresses) {
    Dl_info info;
    if (addresses.empty() || !dladdr((void *)source_lines, &info)) return "";
    std::string command = std::string("addr2line -ie '") + info.dli_fname + "'", found;
    for (void *a : addresses) {
        char text[32];
        snprintf(text, sizeof text, " %#lx", (long)((char *)a - (char *)info.dli_fbase));
        command += text;
    }
    FILE *file = popen((command + " 2>/dev/null").c_str(), "r");
    char line[1000];
    int count = 0;
    while (file && fgets(line, sizeof line, file)) {
        std::string text(line);
        text = text.substr(0, text.find_first_of(" \n"));
        text = text.substr(text.rfind('/') + 1);
        if (text.find(".cu:") == std::string::npos || found.find(text) != std::string::npos || count++ >= 4) continue;
        found += (found.empty() ? " at " : " in ") + text;
    }
    if (file) pclose(file);
    return found;
}

void fail(const char *format, ...) {
    char text[1000];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    error = std::string(launched.name) + ": " + (current ? place(current) + ": " : "") + text;
    if (!current) {
        fprintf(stderr, "%s\n", error.c_str());
        abort();
    }
    if (found_at.empty()) found_at = calls(current, __builtin_return_address(0), (void **)__builtin_frame_address(0));
    to_scheduler();
    abort();
}

const char *message(void) { return last_message.c_str(); }
void set_message(const std::string &text) { last_message = text; }

/* Who waits for what, threads of a block together. */
static std::string deadlock(void) {
    std::string text = std::string(launched.name) + ": deadlock";
    std::map<std::vector<void *>, std::string> known;
    for (const Block *b : resident) {
        std::map<std::string, std::vector<int>> groups;
        for (const Fibre *f : b->fibres) {
            char where[200];
            snprintf(where, sizeof where, f->detail ? "%s [%#lx]" : "%s", f->waits_for, (unsigned long)f->detail);
            const std::vector<void *> at = f->done ? std::vector<void *>() : calls(f, ((char **)f->sp)[6] - 1, ((void ***)f->sp)[5]);
            std::string &lines = known[at];
            if (!f->done && lines.empty()) lines = source_lines(at);
            groups[f->done ? "have ended" : "wait for " + (where + lines)].push_back(f->linear);
        }
        for (auto &[what, threads] : groups) {
            char line[400];
            snprintf(line, sizeof line, "\n  block (%u, %u, %u): %zu threads (first %d, last %d) %s", b->index.x, b->index.y,
                     b->index.z, threads.size(), threads.front(), threads.back(), what.c_str());
            if (text.size() < 4000) text += line;
        }
    }
    return text;
}

/* Faults of a kernel end its launch, others the program. */
static void on_signal(int number, siginfo_t *info, void *context) {
    const ucontext_t *c = (const ucontext_t *)context;
    if (!current) {
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    found_at = calls(current, (void *)c->uc_mcontext.gregs[REG_RIP], (void **)c->uc_mcontext.gregs[REG_RBP]);
    if (number == SIGILL) fail("a misaligned access, or an index outside of its array");
    if (number == SIGFPE) fail("an integer division by zero");
    fail("an access outside of memory, address %p", info->si_addr);
}

static void catch_signals(bool on) {
    static struct sigaction before[4];
    static const int numbers[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    static char *stack;
    static stack_t old_stack;
    if (on) {
        if (!stack) stack = (char *)malloc(65536);
        stack_t s = {};
        s.ss_sp = stack, s.ss_size = 65536;
        sigaltstack(&s, &old_stack);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 4; i++) sigaction(numbers[i], &action, &before[i]);
    } else {
        for (int i = 0; i < 4; i++) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&old_stack, nullptr);
    }
}

/* ---- what threads do together ---- */

/* Does what some threads do together: all that each of them has done before is known to them afterwards. */
static void together(Fibre *const *fibres, int count, uint32_t lanes, const Action &work) {
    if (!checking_races) return work();
    Clock all;
    for (int i = 0; i < count; i++)
        if (lanes >> i % WARP & 1) join(all, fibres[i]->clock);
    current->clock = all;
    work();
    for (int i = 0; i < count; i++)
        if (lanes >> i % WARP & 1) fibres[i]->clock = all, tick(fibres[i]);
}

static void complete(Block *b, int warp, Gathering *g) {
    std::vector<Gathering *> &open = b->warps[warp].open;
    open.erase(std::find(open.begin(), open.end(), g));
    const int first = warp * WARP;
    together(&b->fibres[first], std::min<int>(WARP, b->fibres.size() - first), g->arrived, [=] { g->work(g->args, g->arrived); });
}

/* Lanes that have ended are not waited for. */
static bool is_complete(const Warp &w, const Gathering *g) { return g->arrived == (g->mask & w.live); }

static void wake(Block *b, int warp, uint32_t lanes) {
    const bool backwards = random_bit();
    for (int i = 0; i < WARP; i++) {
        const int lane = backwards ? WARP - 1 - i : i;
        if (lanes >> lane & 1) make_ready(b->fibres[warp * WARP + lane]);
    }
}

void collective(uint32_t mask, Work work, const char *what, void *arg) {
    Fibre *self = current;
    Warp &w = self->block->warps[self->warp];
    const int size = std::min<int>(WARP, self->block->fibres.size() - self->warp * WARP);
    if (size < WARP) mask &= (1u << size) - 1;
    const uint32_t bit = 1u << self->lane;
    if (!(mask & bit)) fail("%s: this lane is not in its own mask %#x", what, mask);
    Gathering *mine = nullptr;
    for (Gathering *g : w.open)
        if (g->mask & mask) {
            if (g->work != work || g->mask != mask || strcmp(g->what, what))
                fail("lanes of a warp do different things together: this one %s (mask %#x), others %s (mask %#x)", what, mask,
                     g->what, g->mask);
            mine = g;
        }
    Gathering fresh; /* lives on the stack of the first to arrive, who waits */
    if (!mine) {
        fresh = Gathering{mask, 0, work, what, {}};
        w.open.push_back(mine = &fresh);
    }
    mine->arrived |= bit;
    mine->args[self->lane] = arg;
    if (!is_complete(w, mine)) return wait_for(what);
    const uint32_t others = mine->arrived & ~bit;
    self->spins_on = nullptr;
    complete(self->block, self->warp, mine);
    wake(self->block, self->warp, others);
}

void warpgroup_collective(void (*work)(void **args), const char *what, void *arg) {
    Fibre *self = current;
    Block *b = self->block;
    const int index = self->linear / 128;
    if ((size_t)(index + 1) * 128 > b->fibres.size()) fail("%s: no whole warpgroup", what);
    Warpgroup &g = b->warpgroups[index];
    if (g.arrived && strcmp(g.what, what)) fail("threads of a warpgroup do different things: this one %s, others %s", what, g.what);
    g.what = what;
    g.args[self->linear % 128] = arg;
    if (++g.arrived < 128) return wait_for(what);
    g.arrived = 0;
    self->spins_on = nullptr;
    together(&b->fibres[index * 128], 128, 0xFFFFFFFF, [&] { work(g.args); });
    for (int i = 0; i < 128; i++)
        if (b->fibres[index * 128 + i] != self) make_ready(b->fibres[index * 128 + i]);
}

static void release(Barrier &barrier) {
    if (random_bit()) std::reverse(barrier.waiting.begin(), barrier.waiting.end());
    for (Fibre *f : barrier.waiting) {
        acquire_from(f, barrier.clock);
        if (f != current) make_ready(f);
    }
    barrier.waiting.clear(), barrier.clock.clear();
    barrier.arrived = barrier.expected = barrier.line = 0;
}

static bool is_full(const Block *b, const Barrier &barrier) {
    return barrier.arrived && barrier.arrived >= (barrier.expected ? barrier.expected : b->live);
}

static Barrier &arrive(int id, int threads, const char *what, int line) {
    if (id < 0 || id > 15) fail("%s: there is no barrier %d", what, id);
    if (threads % WARP) fail("%s: %d threads are not whole warps", what, threads);
    Barrier &barrier = current->block->barriers[id];
    if (barrier.arrived && barrier.expected != threads)
        fail("%s: barrier %d is for %d threads here, for %d elsewhere", what, id, threads, barrier.expected);
    if (barrier.arrived && line && barrier.line && line != barrier.line)
        fail("%s: this thread is at line %d, another at line %d", what, line, barrier.line);
    barrier.expected = threads;
    if (line) barrier.line = line;
    barrier.arrived++;
    release_to(barrier.clock);
    return barrier;
}

void barrier_sync(int id, int threads, const char *what, int line) {
    Barrier &barrier = arrive(id, threads, what, line);
    barrier.waiting.push_back(current);
    if (!is_full(current->block, barrier)) return wait_for(what, id);
    current->spins_on = nullptr;
    release(barrier);
}

void barrier_arrive(int id, int threads) {
    Barrier &barrier = arrive(id, threads, "barrier.arrive", 0);
    if (is_full(current->block, barrier)) release(barrier);
}

static void cluster_check(Cluster *c) {
    if (c->arrived && c->arrived >= c->live) c->arrived = 0, c->phase++;
}

void cluster_arrive(void) {
    Cluster *c = current->block->cluster;
    current->cluster_phase = c->phase;
    release_to(c->clock);
    c->arrived++;
    cluster_check(c);
}

void cluster_wait(void) {
    Cluster *c = current->block->cluster;
    while (c->phase == current->cluster_phase) spin(&c->phase, c->phase, "barrier.cluster");
    acquire_from(current, c->clock);
    current->spins_on = nullptr;
}

/* ---- shared memory ---- */

uint32_t shared_address(const void *p) {
    const Block *b = current->block;
    const ptrdiff_t offset = (const char *)p - b->shared;
    if (offset < SHARED_BASE || offset > SHARED_WINDOW) fail("not an address in this block's shared memory");
    return (uint32_t)b->rank << RANK_SHIFT | (uint32_t)offset;
}

char *shared_pointer(uint32_t address, int bytes, int alignment) {
    const size_t rank = address >> RANK_SHIFT, offset = address & ((1u << RANK_SHIFT) - 1);
    const Cluster *c = current->block->cluster;
    if (rank >= c->blocks.size()) fail("shared address %#x: no such block in the cluster", address);
    const Block *b = c->blocks[rank];
    if (offset < SHARED_BASE || offset + bytes > (size_t)b->end)
        fail("%d bytes at %#zx: outside of shared memory, which ends at %#x", bytes, offset, b->end);
    if (offset % alignment) fail("shared address %#zx must be a multiple of %d", offset, alignment);
    if (b->live == 0) fail("shared memory of a block that has ended");
    return b->shared + offset;
}

char *dynamic_shared(void) { return current->block->shared + SHARED_BASE; }

/* They follow the dynamic part, at a distance, so that whoever runs over its end is noticed. */
char *static_shared(const void *key, size_t bytes, size_t alignment) {
    Block *b = current->block;
    for (auto &[known, offset] : b->statics)
        if (known == key) return b->shared + offset;
    alignment = std::max<size_t>(alignment, 16);
    const size_t offset = (b->end + 256 + alignment - 1) / alignment * alignment;
    if (offset + bytes > SHARED_LIMIT + 8192) fail("too much shared memory");
    b->gaps.push_back({b->end, (int)offset});
    b->end = offset + bytes;
    b->statics.push_back({key, (int)offset});
    return b->shared + offset;
}

/* Past the ends of the parts of shared memory there must still be what was there at first. */
static void check_shared(Block *b) {
    b->gaps.push_back({b->end, std::min(b->end + 4096, SHARED_WINDOW)});
    for (auto [from, to] : b->gaps)
        for (int i = from; i < to; i++)
            if ((unsigned char)b->shared[i] != 0xFF) {
                error = std::string(launched.name) + ": a write " + std::to_string(i - SHARED_BASE) +
                        " bytes into shared memory, which has " + std::to_string(b->dynamic_bytes) + " (dynamic)";
                return;
            }
}

/* ---- blocks come and go ---- */

static void thread_main(void) {
    launched.body();
    Fibre *self = current;
    Block *b = self->block;
    Warp &w = b->warps[self->warp];
    for (StoreGroup &g : self->stores) {
        if (!g.reads.empty()) fail("the thread ends before its bulk stores have been read");
        for (Action &write : g.writes) later(write);
    }
    self->stores.clear();
    self->done = true;
    self->waits_for = "";
    fruitless = 0;
    b->live--, b->cluster->live--;
    w.live &= ~(1u << self->lane);
    for (size_t i = 0; i < w.open.size(); i++) {
        Gathering *g = w.open[i];
        if (!is_complete(w, g)) continue;
        const uint32_t lanes = g->arrived;
        complete(b, self->warp, g);
        wake(b, self->warp, lanes);
        i = -1;
    }
    for (Barrier &barrier : b->barriers)
        if (is_full(b, barrier)) release(barrier);
    cluster_check(b->cluster);
    to_scheduler();
    abort();
}

static Fibre *new_fibre(void) {
    if (idle_fibres.empty()) {
        static int count;
        void *memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) perror("a thread's stack"), abort();
        Fibre *f = new Fibre();
        f->stack = (char *)memory + STACK_BYTES - count++ % 61 * 576; /* not all in the same lines of the cache */
        idle_fibres.push_back(f);
    }
    Fibre *f = idle_fibres.back();
    idle_fibres.pop_back();
    void **sp = (void **)((uintptr_t)f->stack & ~(uintptr_t)63);
    *--sp = nullptr;
    *--sp = (void *)thread_main;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f->sp = sp;
    f->done = false, f->waits_for = "", f->detail = 0, f->spins_on = nullptr;
    f->copies.clear(), f->groups.clear(), f->stores.clear();
    return f;
}

static char *new_window(void) {
    if (idle_windows.empty()) {
        void *p = mmap(nullptr, 3 * SHARED_WINDOW, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) perror("shared memory"), abort();
        char *window = (char *)(((uintptr_t)p + SHARED_WINDOW - 1) / SHARED_WINDOW * SHARED_WINDOW);
        mprotect(window, SHARED_WINDOW, PROT_READ | PROT_WRITE);
        idle_windows.push_back(window);
    }
    char *window = idle_windows.back();
    idle_windows.pop_back();
    return window;
}

static Block *start_block(size_t number, int rank, Cluster *cluster) {
    const dim3 g = launched.grid, d = launched.block;
    const int threads = d.x * d.y * d.z;
    Block *b = new Block();
    b->index = uint3{(unsigned)(number % g.x), (unsigned)(number / g.x % g.y), (unsigned)(number / g.x / g.y)};
    b->rank = rank, b->cluster = cluster;
    b->shared = new_window();
    b->dynamic_bytes = launched.shared;
    b->end = SHARED_BASE + b->dynamic_bytes;
    memset(b->shared, 0xFF, SHARED_WINDOW < b->end + 65536 ? SHARED_WINDOW : b->end + 65536);
    b->live = threads;
    b->warps.resize((threads + WARP - 1) / WARP);
    b->warpgroups.resize((threads + 127) / 128);
    for (int i = 0; i < threads; i++) {
        Fibre *f = new_fibre();
        f->block = b;
        f->thread = uint3{i % d.x, i / d.x % d.y, i / d.x / d.y};
        f->linear = i, f->warp = i / WARP, f->lane = i % WARP;
        b->warps[f->warp].live |= 1u << f->lane;
        b->fibres.push_back(f);
    }
    start_clocks(b);
    const int first = random_bit() ? threads / 2 / WARP * WARP : 0; /* the order of threads is nobody's promise */
    const bool backwards = random_bit();
    for (int i = 0; i < threads; i++) ready.push_back(b->fibres[((backwards ? threads - 1 - i : i) + first) % threads]);
    cluster->live += threads;
    resident.push_back(b);
    return b;
}

static void end_block(Block *b) {
    if (error.empty()) check_shared(b);
    for (Fibre *f : b->fibres) idle_fibres.push_back(f);
    idle_windows.push_back(b->shared);
    resident.erase(std::find(resident.begin(), resident.end(), b));
    Cluster *c = b->cluster;
    if (++c->ended < c->blocks.size()) return;
    for (Block *o : c->blocks) delete o;
    delete c;
}

static std::string refusal(const Launch &l) {
    const size_t threads = (size_t)l.block.x * l.block.y * l.block.z, blocks = (size_t)l.grid.x * l.grid.y * l.grid.z;
    if (!threads || threads > 1024) return "a block of " + std::to_string(threads) + " threads";
    if (!blocks || l.grid.y > 65535 || l.grid.z > 65535)
        return "a grid of " + std::to_string(l.grid.x) + "x" + std::to_string(l.grid.y) + "x" + std::to_string(l.grid.z);
    if (l.shared > SHARED_LIMIT) return std::to_string(l.shared) + " bytes of shared memory";
    if (l.cluster.y != 1 || l.cluster.z != 1 || l.grid.x % l.cluster.x) return "the cluster does not divide the grid";
    return "";
}

int launch(const Launch &l) {
    const std::string bad = refusal(l);
    if (!bad.empty()) {
        set_message(std::string(l.name) + " cannot be launched: " + bad);
        return 9; /* cudaErrorInvalidConfiguration */
    }
    launched = l;
    error.clear(), ready.clear(), pending.clear(), found_at.clear(), other_at.clear();
    fruitless = 0, stuck = false;
    const char *seed = getenv("EMULATOR_SEED");
    random_state = (seed ? atoi(seed) : 0) * 2654435761u + 12345 + ++launches * 40503u; /* each launch another order */
    catch_signals(true);
    const int threads = l.block.x * l.block.y * l.block.z, cluster = l.cluster.x;
    const int each = std::max(1, std::min(2, std::min<int>(2048 / threads, 228 * 1024 / (l.shared + 1024))));
    const size_t blocks = (size_t)l.grid.x * l.grid.y * l.grid.z;
    const size_t room = l.together ? blocks : MULTIPROCESSORS * each;
    size_t started = 0;
    while (error.empty()) {
        while (started < blocks && resident.size() + cluster <= std::max<size_t>(room, cluster)) {
            Cluster *c = new Cluster();
            for (int rank = 0; rank < cluster; rank++) c->blocks.push_back(start_block(started++, rank, c));
        }
        if (resident.empty()) break;
        if (stuck || (ready.empty() && !finish_one())) {
            error = deadlock();
            break;
        }
        if (ready.empty()) continue;
        current = ready.front();
        ready.pop_front();
        emulator_switch(&scheduler_sp, current->sp);
        Fibre *last = current;
        current = nullptr;
        if (last->done && last->block->live == 0) end_block(last->block);
    }
    while (error.empty() && finish_one()) {}
    current = nullptr;
    while (!resident.empty()) {
        end_block(resident.back());
    }
    catch_signals(false);
    if (error.empty()) return 0;
    const std::string other = source_lines(other_at);
    set_message(error + source_lines(found_at) + (other.empty() ? "" : ", the other" + other));
    return 719; /* cudaErrorLaunchFailure */
}

} // namespace emulator
