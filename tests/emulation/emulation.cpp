// Runs a grid. What is checked, and ends the launch with an exception that says where:
//   - a barrier or a collective that not all threads reach, whatever they do instead
//   - a collective of less than a warp, or in which lanes do different things
//   - a kernel that does not wait for its predecessor (pdl_wait)
//   - races on shared memory and misaligned accesses (race_check.cpp)
// Shared memory is NaN when a block starts. The order of the threads is that of blip3o_emulation_order.
#include "cuda_emulation.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "race_check.h"

namespace emulation {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t stack_bytes = 128 * 1024;
constexpr int most_threads = 1024;

enum class State { ready, at_barrier, in_collective, done };

struct PendingCopy {
    void* shared;
    const void* global;
    int batch;
};

struct Thread {
    Fiber fiber;
    State state = State::ready;
    bool started = false;
    unsigned collectives = 0;  // begun so far; its parity chooses the slots
    int batch = 0;             // of copies, the one that is open
    std::vector<PendingCopy> copies;
};

struct Warp {
    Slots slots[2];
    Collective kind[2];
    unsigned arrived[2];
    unsigned completed;  // collectives
};

struct Machine {
    std::vector<Thread> threads = std::vector<Thread>(most_threads);
    std::vector<Warp> warps = std::vector<Warp>(most_threads / 32);
    unsigned char* stacks = nullptr;
    Fiber scheduler;
    Body body = nullptr;
    const void* arguments = nullptr;
    int count = 0, current = 0, waiting = 0, done = 0;
    unsigned barriers = 0;
    std::string problem;
    int order = 0;  // 0: ascending, -1: descending, else the seed of a shuffle
    std::mutex busy;
};

Machine& machine() {
    static Machine* const only = new Machine;
    return *only;
}

std::string where() {
    return "block " + std::to_string(block_index.x) + ", thread " + std::to_string(machine().current);
}

void to_scheduler() {
    Machine& m = machine();
    m.threads[m.current].fiber.switch_to(m.scheduler);
}

void thread_main() {
    Machine& m = machine();
    m.body(m.arguments);
    if (!m.threads[m.current].started) fail("the kernel does not begin with pdl_wait()");
    m.threads[m.current].state = State::done;
    ++m.done;
    to_scheduler();
}

bool can_run(const Machine& m, int thread) {
    const Thread& t = m.threads[thread];
    if (t.state == State::in_collective) return m.warps[thread / 32].completed >= t.collectives;
    return t.state == State::ready;
}

// What threads wait for that nobody will bring.
std::string deadlock(const Machine& m) {
    std::string text = "no thread can go on:";
    const char* names[] = {"ready", "at __syncthreads", "in a warp's collective", "ended"};
    for (State state : {State::at_barrier, State::in_collective, State::done}) {
        int number = 0, first = -1;
        for (int i = 0; i < m.count; ++i)
            if (m.threads[i].state == state && number++ == 0) first = i;
        if (number > 0)
            text += " " + std::to_string(number) + " " + names[static_cast<int>(state)] + " (thread " +
                    std::to_string(first) + (number > 1 ? ", ..." : "") + ")";
    }
    return text;
}

void run_block(Machine& m, std::vector<int>& order, std::mt19937& random) {
    begin_block();
    m.waiting = m.done = 0;
    for (int i = 0; i < m.count; ++i) {
        Thread& t = m.threads[i];
        t.state = State::ready;
        t.started = false;
        t.collectives = 0;
        t.batch = 0;
        t.copies.clear();
        t.fiber.prepare(m.stacks + i * stack_bytes, stack_bytes, thread_main);
    }
    for (int i = 0; i * 32 < m.count; ++i) m.warps[i].completed = m.warps[i].arrived[0] = m.warps[i].arrived[1] = 0;
    while (m.done < m.count) {
        if (m.order > 0) std::shuffle(order.begin(), order.end(), random);
        bool progress = false;
        for (int thread : order) {
            if (!can_run(m, thread)) continue;
            progress = true;
            m.current = thread;
            thread_index = {static_cast<unsigned>(thread), 0, 0};
            m.threads[thread].state = State::ready;
            m.scheduler.switch_to(m.threads[thread].fiber);
            if (!m.problem.empty()) throw std::runtime_error(m.problem);
        }
        if (!progress) throw std::runtime_error("block " + std::to_string(block_index.x) + ": " + deadlock(m));
    }
}

}  // namespace

void fail(const char* problem) {
    machine().problem = where() + ": " + problem;
    to_scheduler();
    __builtin_unreachable();
}

int lane() { return machine().current % 32; }

int thread() { return machine().current; }

void started() { machine().threads[machine().current].started = true; }

void barrier() {
    Machine& m = machine();
    if (++m.waiting < m.count) {
        m.threads[m.current].state = State::at_barrier;
        to_scheduler();
        return;
    }
    m.waiting = 0;
    for (int i = 0; i < m.count; ++i) m.threads[i].state = State::ready;
    block_is_ordered();
}

const Slots& exchange(Collective kind, unsigned mask, const void* value, size_t size) {
    Machine& m = machine();
    if (mask != 0xffffffffu) fail("a collective of less than a warp");
    if (m.current / 32 * 32 + 32 > m.count) fail("a collective in a warp that is not whole");
    Thread& t = m.threads[m.current];
    Warp& warp = m.warps[m.current / 32];
    const int side = t.collectives++ % 2;
    if (warp.arrived[side]++ == 0) warp.kind[side] = kind;
    if (warp.kind[side] != kind) fail("the lanes of a warp are in different collectives");
    if (size > 0) std::memcpy(warp.slots[side].lane[m.current % 32], value, size);
    if (warp.arrived[side] == 32) {
        // the other side's readers are done: all 32 lanes have come here since
        warp.arrived[side] = 0;
        ++warp.completed;
        if (kind == Collective::sync) warp_is_ordered(m.current / 32);
    } else {
        t.state = State::in_collective;
        to_scheduler();
    }
    return warp.slots[side];
}

void copy_later(void* shared, const void* global) {
    Machine& m = machine();
    Thread& t = m.threads[m.current];
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
        fail("a misaligned copy of 16 bytes");
    note_write(shared, 16);
    t.copies.push_back({shared, global, t.batch});
}

void commit_copies() { ++machine().threads[machine().current].batch; }

void wait_for_copies(int pending) {
    Thread& t = machine().threads[machine().current];
    std::vector<PendingCopy> left;
    for (const PendingCopy& copy : t.copies) {
        if (copy.batch < t.batch - pending) {
            note_write(copy.shared, 16);
            std::memcpy(copy.shared, copy.global, 16);
        } else {
            left.push_back(copy);
        }
    }
    t.copies = std::move(left);
}

void run(Body body, const void* arguments, int64_t blocks, int threads, size_t shared_bytes) {
    Machine& m = machine();
    const std::lock_guard<std::mutex> one_at_a_time(m.busy);
    if (m.stacks == nullptr) m.stacks = static_cast<unsigned char*>(pages(most_threads * stack_bytes));
    set_dynamic(shared_bytes);
    m.body = body;
    m.arguments = arguments;
    m.count = threads;
    m.problem.clear();
    block_size = {static_cast<unsigned>(threads), 1, 1};
    grid_size = {static_cast<unsigned>(blocks), 1, 1};
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    if (m.order < 0) std::reverse(order.begin(), order.end());
    std::mt19937 random(static_cast<unsigned>(m.order));
    for (int64_t i = 0; i < blocks; ++i) {
        block_index = {static_cast<unsigned>(m.order < 0 ? blocks - 1 - i : i), 0, 0};
        run_block(m, order, random);
    }
}

}  // namespace emulation

// 0: ascending, -1: descending, else the seed of a new order in every turn.
extern "C" __attribute__((visibility("default"))) void blip3o_emulation_order(int order) {
    emulation::machine().order = order;
}
