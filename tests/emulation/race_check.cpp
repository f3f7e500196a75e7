// Shared memory and the races on it. The kernels are compiled with -fsanitize=thread, which calls a function before
// every access to memory; these are the functions, and the sanitizer's own library is not linked.
//
// Of every byte we remember who wrote it last and who has read it since. Two accesses of different threads, one of them
// a write, need a barrier between them: __syncthreads, or __syncwarp within a warp. Nothing else orders memory.
#include "race_check.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "cuda_emulation.h"

namespace emulation {

namespace {

constexpr int nobody = 0, several = -1;  // else the thread's or warp's number, from 1 on

struct Access {
    uint32_t block_epoch, warp_epoch;
    int16_t thread, warp;
};

struct Byte {
    Access written, read;
};

// All of shared memory lies here: first the dynamic kind, then that of every kernel that has run.
constexpr size_t most_dynamic = 256 * 1024, all_bytes = 8 * 1024 * 1024;

struct Memory {
    unsigned char* begin = static_cast<unsigned char*>(pages(all_bytes));
    Byte* history = static_cast<Byte*>(pages(all_bytes * sizeof(Byte)));
    size_t dynamic = 0, used = most_dynamic;
    uint64_t block = 0;
    uint32_t block_epoch = 1;
    uint32_t warp_epoch[32] = {};

    size_t offset(const void* address) const {
        return static_cast<size_t>(static_cast<const unsigned char*>(address) - begin);
    }
};

Memory memory;

bool is_ordered(const Access& before, int thread) {
    const int warp = thread / 32;
    if (before.thread == nobody || before.thread == thread + 1 || before.block_epoch < memory.block_epoch) return true;
    return before.warp == warp + 1 && before.warp_epoch < memory.warp_epoch[warp];
}

void report(size_t at, const char* first, const Access& before, const char* second) {
    char who[32] = "several threads", text[200];
    if (before.thread > 0) std::snprintf(who, sizeof who, "thread %d", before.thread - 1);
    std::snprintf(text, sizeof text,
                  "a race on %s shared memory: %s by %s, then %s by thread %d, with no barrier between",
                  at < most_dynamic ? "dynamic" : "static", first, who, second, thread());
    fail(text);
}

void note(const void* address, size_t bytes, bool write) {
    const size_t first = memory.offset(address);
    if (first >= memory.used) return;
    const int self = thread(), warp = self / 32;
    const Access now = {memory.block_epoch, memory.warp_epoch[warp], static_cast<int16_t>(self + 1),
                        static_cast<int16_t>(warp + 1)};
    for (size_t at = first; at < first + bytes && at < memory.used; ++at) {
        Byte& byte = memory.history[at];
        if (!is_ordered(byte.written, self)) report(at, "written", byte.written, write ? "written" : "read");
        if (write) {
            if (!is_ordered(byte.read, self)) report(at, "read", byte.read, "written");
            byte.written = now;
            byte.read = {};
        } else if (is_ordered(byte.read, self)) {
            byte.read = now;
        } else {
            byte.read.thread = several;
            if (byte.read.warp != now.warp) byte.read.warp = several;
        }
    }
}

template <size_t bytes>
void aligned(const void* address, bool write) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a misaligned access to memory");
    note(address, bytes, write);
}

}  // namespace

void* pages(size_t bytes) {
    void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw std::runtime_error("no memory for the emulation");
    return made;
}

void set_dynamic(size_t bytes) {
    if (bytes > most_dynamic) throw std::runtime_error("more dynamic shared memory than any GPU has");
    memory.dynamic = bytes;
}

void* dynamic_shared() { return memory.begin; }

void* SharedPlace::of_block(size_t bytes) {
    if (place == nullptr) {
        const size_t begin = (memory.used + 127) / 128 * 128;
        if (begin + bytes > all_bytes) fail("the emulation's shared memory is used up");
        memory.used = begin + bytes;
        place = memory.begin + begin;
    }
    if (block != memory.block) {
        block = memory.block;
        std::memset(place, 0xff, bytes);
    }
    return place;
}

void begin_block() {
    ++memory.block;
    ++memory.block_epoch;
    std::memset(memory.begin, 0xff, memory.dynamic);
}

void block_is_ordered() { ++memory.block_epoch; }

void warp_is_ordered(int warp) { ++memory.warp_epoch[warp]; }

void note_write(const void* address, size_t bytes) { note(address, bytes, true); }

}  // namespace emulation

// ---- what the compiler calls ----

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define BLIP3O_ACCESS(bytes)                                                                     \
    void __tsan_read##bytes(void* address) { emulation::aligned<bytes>(address, false); }        \
    void __tsan_write##bytes(void* address) { emulation::aligned<bytes>(address, true); }        \
    void __tsan_unaligned_read##bytes(void* address) { emulation::note(address, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* address) { emulation::note(address, bytes, true); }
BLIP3O_ACCESS(1)
BLIP3O_ACCESS(2)
BLIP3O_ACCESS(4)
BLIP3O_ACCESS(8)
BLIP3O_ACCESS(16)
#undef BLIP3O_ACCESS

void __tsan_read_range(void* address, long bytes) { emulation::note(address, static_cast<size_t>(bytes), false); }
void __tsan_write_range(void* address, long bytes) { emulation::note(address, static_cast<size_t>(bytes), true); }

}  // extern "C"
