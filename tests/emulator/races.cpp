/* Finds accesses to shared memory by two threads, one of them a write, with nothing between them that makes one wait for the
 * other: whatever the order in which the emulator happened to run them.
 *
 * g++ -fsanitize=thread calls a function at each access; here they are, in the place of the library that usually has them. Each
 * thread has a clock that counts its synchronisations, and knows up to which count of each other thread everything has happened
 * before (vector clocks); each two bytes of shared memory know who wrote and who read them last, and at which count. */
#include "runtime.h"
#include <string.h>
#include <algorithm>

namespace emulator {

bool checking_races;

struct Access {
    uint32_t clock; /* of that thread then; 0: none */
    uint32_t thread;
    const void *at; /* in the code */
};
struct Cell { Access write, reads[2]; };
struct Shadow { std::vector<Cell> cells; };

static uint32_t number(const Fibre *f) { return f->block->rank * (uint32_t)f->block->fibres.size() + f->linear; }

void start_clocks(Block *b) {
    if (!checking_races) return;
    b->shadow = std::make_shared<Shadow>();
    for (Fibre *f : b->fibres) {
        f->clock.assign(launched.cluster.x * b->fibres.size(), 0);
        f->clock[number(f)] = 1;
    }
}

void join(Clock &to, const Clock &from) {
    to.resize(std::max(to.size(), from.size()));
    for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

void tick(Fibre *f) {
    if (checking_races) f->clock[number(f)]++;
}

void release_to(Clock &clock) {
    if (!checking_races) return;
    join(clock, current->clock);
    tick(current);
}

void acquire_from(Fibre *f, const Clock &clock) {
    if (checking_races) join(f->clock, clock);
}

static void race(const Access &other, bool wrote, bool writes, uint32_t offset) {
    other_at = {(char *)other.at - 1};
    const unsigned threads = current->block->fibres.size();
    fail("a race: it %s shared memory at %u, thread %u%s %s it, and neither waits for the other", writes ? "writes" : "reads",
         offset - SHARED_BASE, other.thread % threads, other.thread / threads != (unsigned)current->block->rank ? " of another block" : "",
         wrote ? "wrote" : "read");
}

static bool before(const Access &a) { return a.clock <= current->clock[a.thread]; }

static void access(const void *p, size_t bytes, bool writes, const void *at) {
    Block *b = nullptr;
    for (Block *mate : current->block->cluster->blocks)
        if ((const char *)p >= mate->shared && (const char *)p < mate->shared + SHARED_WINDOW) b = mate;
    if (!b) return;
    const uint32_t offset = (const char *)p - b->shared, me = number(current);
    if (b->shadow->cells.size() < (offset + bytes + 1) / 2) b->shadow->cells.resize((b->end + 4096) / 2);
    const Access mine = {current->clock[me], me, at};
    for (uint32_t i = offset / 2; i < (offset + bytes + 1) / 2; i++) {
        Cell &c = b->shadow->cells[i];
        if (!before(c.write)) race(c.write, true, writes, offset);
        if (!writes) {
            Access &slot = c.reads[c.reads[0].thread != me && !before(c.reads[0])];
            slot = mine;
            continue;
        }
        for (Access &read : c.reads) {
            if (!before(read)) race(read, false, writes, offset);
            read.clock = 0;
        }
        c.write = mine;
    }
}

void touch(const void *p, size_t bytes, bool writes, const void *at) {
    if (checking_races && current) access(p, bytes, writes, at);
}

} // namespace emulator

using namespace emulator;

extern "C" {
void __tsan_init(void) { checking_races = true; }
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
#define ACCESS(name, bytes, writes) \
    void __tsan_##name(void *p) { if (current) access(p, bytes, writes, __builtin_return_address(0)); }
#define ACCESSES(bytes) \
    ACCESS(read##bytes, bytes, false) ACCESS(write##bytes, bytes, true) \
    ACCESS(unaligned_read##bytes, bytes, false) ACCESS(unaligned_write##bytes, bytes, true)
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
void __tsan_read_range(void *p, size_t n) { if (current) access(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void *p, size_t n) { if (current) access(p, n, true, __builtin_return_address(0)); }
}
