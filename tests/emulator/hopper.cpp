/* See hopper.h. */
#include "hopper.h"

/* ---- tensor maps ---- */

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *dims,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    const uint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    bool good = rank >= 1 && rank <= 5 && (uintptr_t)address % 16 == 0 && (uintptr_t)map % 64 == 0;
    for (uint32_t i = 0; good && i < rank; i++)
        good = dims[i] >= 1 && dims[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && element_strides[i] == 1 &&
               (i + 1 == rank || (strides[i] % 16 == 0 && strides[i] < 1ull << 40));
    const uint32_t line = good ? box[0] * element : 0;
    if (!good || line % 16 || (swizzle && line > 16u << swizzle)) {
        emulator::set_message("cuTensorMapEncodeTiled: invalid value");
        return CUDA_ERROR_INVALID_VALUE;
    }
    *map = CUtensorMap();
    map->address = (char *)address;
    for (uint32_t i = 0; i < rank; i++) {
        map->dims[i] = dims[i], map->box[i] = box[i];
        if (i + 1 < rank) map->strides[i] = strides[i];
    }
    map->rank = rank, map->element = element, map->swizzle = swizzle, map->is_float = element == 4;
    return CUDA_SUCCESS;
}

namespace ptx {

static const uint32_t OFFSET = (1u << RANK_SHIFT) - 1;

/* Within 128, 64, 32 bytes, 16-byte slots are permuted by bits of the address above. swizzle: 3, 2, 1 (0: none). */
static uint32_t swizzled(uint32_t address, int swizzle) { return address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4); }

/* What is known to those who have waited at an mbarrier. */
static Clock &clock_of(const void *barrier) {
    for (Block *b : current->block->cluster->blocks)
        if ((char *)barrier >= b->shared && (char *)barrier < b->shared + SHARED_WINDOW) {
            for (auto &[known, clock] : b->mbarriers)
                if (known == barrier) return clock;
            b->mbarriers.push_back({(char *)barrier, Clock()});
            return b->mbarriers.back().second;
        }
    abort();
}

/* ---- barriers in shared memory: their state is in their 8 bytes ---- */

struct State {
    uint64_t pending : 20, count : 20, phase : 1, known : 1;
    int64_t bytes : 22; /* expected less arrived */
};
static_assert(sizeof(State) == 8, "");

static State *state(uint32_t barrier) {
    State *s = (State *)shared_pointer(barrier, 8, 8);
    if (!s->known || s->count == 0 || s->count == 0xFFFFF) fail("the mbarrier at %#x is not initialised", barrier & OFFSET);
    return s;
}

static void finish_phase(State *s) {
    if (s->pending || s->bytes) return;
    s->phase ^= 1;
    s->pending = s->count;
}

void mbarrier_init(uint32_t barrier, uint32_t count) {
    if (count == 0 || count >= 0xFFFFF) fail("mbarrier.init with %u arrivals", count);
    State s = {};
    s.pending = s.count = count, s.known = 1;
    memcpy(shared_pointer(barrier, 8, 8), &s, 8);
}

void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) { state(barrier)->bytes += bytes; }

void mbarrier_arrive(uint32_t barrier, uint32_t count) {
    State *s = state(barrier);
    if (s->pending < count) fail("mbarrier at %#x: more arrivals than the %d of a phase", barrier & OFFSET, (int)s->count);
    if (checking_races) release_to(clock_of(s));
    s->pending -= count;
    finish_phase(s);
}

bool mbarrier_passed(uint32_t barrier, uint32_t parity) {
    State *s = state(barrier);
    if (s->phase == (parity & 1)) finish_one();
    if (s->phase != (parity & 1)) {
        if (checking_races) acquire_from(current, clock_of(s));
        return true;
    }
    uint64_t bits;
    memcpy(&bits, s, 8);
    spin(s, bits, parity & 1 ? "mbarrier, parity 1" : "mbarrier, parity 0");
    return false;
}

static void arrived(State *s, int bytes) {
    s->bytes -= bytes;
    finish_phase(s);
}

/* ---- TMA ---- */

/* The box at `at`, line by line: where each line lies in memory (how many bytes of it from its begin are inside the tensor, and
 * from where on), and where in shared memory. */
template <class Line>
static void lines(const CUtensorMap &map, const int *at, Line line) {
    int index[5] = {};
    uint32_t offset = 0;
    const uint32_t bytes = map.box[0] * map.element;
    for (;;) {
        bool inside = true;
        char *p = map.address;
        for (int i = 1; i < map.rank; i++) {
            const int64_t x = (int64_t)at[i] + index[i];
            inside = inside && x >= 0 && x < map.dims[i];
            p += x * (int64_t)map.strides[i - 1];
        }
        const int64_t first = inside ? std::max<int64_t>(0, -(int64_t)at[0]) : map.box[0];
        const int64_t last = inside ? std::min<int64_t>(map.box[0], (int64_t)map.dims[0] - at[0]) : 0;
        line(p + (int64_t)at[0] * map.element, (uint32_t)(first * map.element), (uint32_t)(std::max(first, last) * map.element), offset);
        offset += bytes;
        int i = 1;
        while (i < map.rank && ++index[i] == map.box[i]) index[i++] = 0;
        if (i >= map.rank) return;
    }
}

static uint32_t box_bytes(const CUtensorMap &map) {
    uint32_t bytes = map.element;
    for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
    return bytes;
}

static void check(const CUtensorMap *map, int rank, const char *what) {
    if ((uintptr_t)map % 64 || map->rank != rank) fail("%s: no tensor map of %d dimensions", what, rank);
}

void tma_load_boxes(uint32_t to, const CUtensorMap *map, const int *at, int rank, uint32_t barrier, uint32_t blocks) {
    check(map, rank, "TMA load");
    std::vector<uint32_t> targets;
    for (uint32_t r = 0; r < 16; r++)
        if (blocks >> r & 1) targets.push_back(r << RANK_SHIFT);
    if (!blocks) targets.push_back(to & ~OFFSET);
    const CUtensorMap m = *map;
    const uint32_t bytes = box_bytes(m);
    const std::vector<int> start(at, at + rank);
    for (uint32_t target : targets) {
        char *box = shared_pointer(target | (to & OFFSET), bytes, 128);
        State *s = state(blocks ? target | (barrier & OFFSET) : barrier);
        memset(box, 0xFF, bytes);
        touch(box, bytes, true, __builtin_return_address(0));
        if (checking_races) join(clock_of(s), current->clock);
        later([=] {
            const uint32_t first = to & OFFSET;
            lines(m, start.data(), [&](const char *from, uint32_t begin, uint32_t end, uint32_t offset) {
                const uint32_t size = m.box[0] * m.element;
                char line[1024];
                memset(line, 0, size);
                if (end > begin) memcpy(line + begin, from + begin, end - begin);
                for (uint32_t i = 0; i < size; i += 16)
                    memcpy(box + (int)(swizzled(first + offset + i, m.swizzle) - first), line + i, std::min(16u, size - i));
            });
            arrived(s, bytes);
        });
    }
}

void bulk_load(uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier) {
    if (bytes % 16 || from % 16) fail("a bulk copy of %u bytes from %#lx: must be multiples of 16", bytes, (unsigned long)from);
    char *p = shared_pointer(to, bytes, 16);
    State *s = state(barrier);
    memset(p, 0xFF, bytes);
    touch(p, bytes, true, __builtin_return_address(0));
    if (checking_races) join(clock_of(s), current->clock);
    later([=] {
        memcpy(p, (const void *)from, bytes);
        arrived(s, bytes);
    });
}

template <class T>
static void add(char *to, const char *from, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes; i += sizeof(T)) *(T *)(to + i) = (T)((float)*(T *)(to + i) + (float)*(const T *)(from + i));
}

/* `read` takes the bytes out of shared memory, `write` brings them to where they shall be. */
static void bulk_store(Action read, Action write) {
    Fibre *f = current;
    if (f->stores.empty() || f->stores.back().committed) f->stores.push_back(StoreGroup());
    f->stores.back().reads.push_back(read);
    f->stores.back().writes.push_back(write);
}

void tma_store_box(const CUtensorMap *map, const int *at, int rank, uint32_t from, bool adds) {
    check(map, rank, "TMA store");
    const CUtensorMap m = *map;
    const std::vector<int> start(at, at + rank);
    const uint32_t first = from & OFFSET;
    auto bytes = std::make_shared<std::vector<char>>(box_bytes(m));
    const char *box = shared_pointer(from, bytes->size(), 128);
    bulk_store(
        [=] {
            touch(box, bytes->size(), false);
            for (uint32_t i = 0; i < bytes->size(); i += 16)
                memcpy(bytes->data() + i, box + (int)(swizzled(first + i, m.swizzle) - first), 16);
        },
        [=] {
            lines(m, start.data(), [&](char *to, uint32_t begin, uint32_t end, uint32_t offset) {
                if (end <= begin) return;
                const char *line = bytes->data() + offset;
                if (!adds) memcpy(to + begin, line + begin, end - begin);
                else if (m.is_float) add<float>(to + begin, line + begin, end - begin);
                else add<__nv_bfloat16>(to + begin, line + begin, end - begin);
            });
        });
}

void bulk_store_bytes(uint64_t to, uint32_t from, uint32_t size, bool adds) {
    if (size % 16 || to % 16) fail("a bulk copy of %u bytes to %#lx: must be multiples of 16", size, (unsigned long)to);
    const char *p = shared_pointer(from, size, 16);
    auto bytes = std::make_shared<std::vector<char>>(size);
    bulk_store([=] { touch(p, size, false), memcpy(bytes->data(), p, size); },
               [=] {
                   if (adds) add<float>((char *)to, bytes->data(), size);
                   else memcpy((char *)to, bytes->data(), size);
               });
}

void bulk_commit(void) {
    Fibre *f = current;
    if (f->stores.empty() || f->stores.back().committed) f->stores.push_back(StoreGroup());
    f->stores.back().committed = true;
}

void bulk_wait(int pending, bool only_read) {
    Fibre *f = current;
    int committed = 0;
    for (StoreGroup &g : f->stores) committed += g.committed;
    for (int i = 0; i < committed - pending; i++) {
        StoreGroup &g = f->stores[only_read ? i : 0];
        for (Action &read : g.reads) read();
        g.reads.clear();
        if (only_read) continue;
        for (Action &write : g.writes) write();
        f->stores.pop_front();
    }
}

/* ---- wgmma ---- */

/* (mn, k): the 16 k of `size` rows or columns, as the descriptor says where they lie. */
static void gather(uint64_t descriptor, bool mn_major, int size, uint16_t (*to)[16]) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int kind = descriptor >> 62, swizzle = 4 - kind; /* 1: 128 bytes */
    if (kind == 0) fail("wgmma: operands that are not swizzled are not emulated");
    const uint32_t line = 16u << swizzle, rank = current->block->rank << RANK_SHIFT;
    if (start & (line * 8 - 1) & ~(line - 1)) fail("wgmma: a matrix must begin at the first line of a swizzled atom (%#x)", start);
    for (int i = 0; i < size * 2; i++) { /* pieces of 16 bytes: 8 k of one row, or 8 rows of one k */
        const int mn = mn_major ? i / 16 * 8 : i / 2, k = mn_major ? i % 16 : i % 2 * 8;
        const uint32_t offset = mn_major ? mn / (line / 2) * leading + mn % (line / 2) * 2 + k / 8 * stride + k % 8 * line
                                         : mn / 8 * stride + mn % 8 * line + k * 2;
        uint16_t piece[8];
        const char *from = shared_pointer(rank | swizzled(start + offset, swizzle), 16, 16);
        touch(from, 16, false);
        memcpy(piece, from, 16);
        for (int j = 0; j < 8; j++) (mn_major ? to[mn + j][k] : to[mn][k + j]) = piece[j];
    }
}

struct Operands { uint16_t a[64][16], b[256][16]; };

static void operands(const Wgmma &w, Operands *o) {
    if (!w.in_registers) gather(w.a_matrix, w.a_mn, 64, o->a);
    gather(w.b_matrix, w.b_mn, w.n, o->b);
}

static void multiply(const Wgmma &w, const Operands &o, float *const *d) {
    float b[16][256];
    for (int n = 0; n < w.n; n++)
        for (int k = 0; k < 16; k++) b[k][n] = bits_of<float>((uint32_t)o.b[n][k] << 16);
    for (int row = 0; row < 64; row++) {
        float sum[256] = {};
        for (int k = 0; k < 16; k++) {
            const float a = bits_of<float>((uint32_t)o.a[row][k] << 16);
            for (int n = 0; n < w.n; n++) sum[n] += a * b[k][n];
        }
        for (int n = 0; n < w.n; n += 2) {
            float *to = d[row / 16 * 32 + row % 8 * 4 + n % 8 / 2] + n / 8 * 4 + row % 16 / 8 * 2;
            to[0] = w.accumulate ? to[0] + sum[n] : sum[n], to[1] = w.accumulate ? to[1] + sum[n + 1] : sum[n + 1];
        }
    }
}

void wgmma_issue(Wgmma *mine) {
    warpgroup_collective([](void **args) {
        const Wgmma w = *(Wgmma *)args[0];
        std::vector<float *> d;
        auto o = std::make_shared<Operands>();
        operands(w, o.get());
        for (int t = 0; t < 128; t++) {
            const Wgmma &other = *(Wgmma *)args[t];
            if (other.a_matrix != w.a_matrix || other.b_matrix != w.b_matrix || other.n != w.n || other.accumulate != w.accumulate)
                fail("wgmma: threads of the warpgroup have different descriptors");
            d.push_back(other.d);
            for (int i = 0; w.in_registers && i < 4; i++) {
                uint16_t *to = &o->a[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][t % 4 * 2 + i / 2 * 8];
                to[0] = other.a[i], to[1] = other.a[i] >> 16;
            }
        }
        current->block->warpgroups[current->linear / 128].products.push_back([=] {
            auto now = std::make_shared<Operands>(*o);
            operands(w, now.get());
            if (memcmp(now->a, o->a, sizeof o->a) || memcmp(now->b, o->b, w.n * sizeof o->b[0]))
                fail("wgmma: its operands in shared memory changed before it was done (not yet arrived, or overwritten too early)");
            multiply(w, *o, d.data());
        });
    }, "wgmma", mine);
}

void wgmma_commit(void) {
    warpgroup_collective([](void **) {
        Warpgroup &g = current->block->warpgroups[current->linear / 128];
        g.groups.push_back(std::move(g.products));
        g.products.clear();
    }, "wgmma.commit_group", nullptr);
}

void wgmma_wait(int pending) {
    warpgroup_collective([](void **args) {
        Warpgroup &g = current->block->warpgroups[current->linear / 128];
        for (; g.groups.size() > (size_t) * (int *)args[0]; g.groups.pop_front())
            for (Action &product : g.groups.front()) product();
    }, "wgmma.wait_group", &pending);
}

} // namespace ptx
