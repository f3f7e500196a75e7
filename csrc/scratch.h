// Working memory of one call: a 64-byte aligned block of floats per thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace blip3o_fast {

class Scratch {
public:
    Scratch(int threads, int64_t floats) : per_thread_((floats + 15) / 16 * 16) {
        const size_t bytes = static_cast<size_t>(per_thread_) * sizeof(float) * static_cast<size_t>(threads);
        block_ = std::malloc(bytes + 64);
        if (!block_) throw std::bad_alloc();
        const auto address = reinterpret_cast<uintptr_t>(block_);
        first_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
    }
    ~Scratch() { std::free(block_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    float* of(int thread) const { return first_ + per_thread_ * thread; }

private:
    int64_t per_thread_;
    void* block_;
    float* first_;
};

}  // namespace blip3o_fast
