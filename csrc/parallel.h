// parallel_for on the threads that the process has already: PyTorch's own OpenMP pool.
#pragma once

#include <cstdint>

#include "run.h"

namespace blip3o_fast {

// Calls body(data, share) for share = 0 .. shares - 1, on up to `shares` threads. Must not throw.
void run_shares(int shares, void (*body)(void*, int), void* data);

// The pool that run_shares uses: "GOMP_parallel of <library>" or "std::thread".
const char* pool_name();

// f(begin, end, thread) over contiguous shares of 0 .. n, at most one per thread of the run.
template <class F>
void parallel_for(const Run& run, int64_t n, F&& f) {
    if (n <= 0) return;
    const int shares = static_cast<int>(run.threads < n ? run.threads : n);
    if (shares <= 1) {
        f(int64_t{0}, n, 0);
        return;
    }
    struct Context {
        F& f;
        int64_t n;
        int shares;
    } context{f, n, shares};
    run_shares(
        shares,
        [](void* data, int share) {
            auto& c = *static_cast<Context*>(data);
            const int64_t begin = c.n * share / c.shares, end = c.n * (share + 1) / c.shares;
            if (begin < end) c.f(begin, end, share);
        },
        &context);
}

}  // namespace blip3o_fast
