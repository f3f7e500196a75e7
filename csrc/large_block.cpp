#include "large_block.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace blip3o_fast {

namespace {

constexpr int64_t page = 2 << 20;
constexpr int64_t most_bytes = int64_t{1} << 47;  // more than a process can address

int64_t whole_pages(int64_t bytes) {
    if (bytes < 1) throw std::invalid_argument("bytes must be at least 1, got " + std::to_string(bytes));
    if (bytes > most_bytes) throw std::bad_alloc();
    return (bytes + page - 1) / page * page;
}

class Pool {
public:
    void* take(int64_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        void* data;
        const auto found = kept_.find(bytes);
        if (found != kept_.end()) {
            data = found->second;
            forget(found);
        } else {
            // Never more than there has been in use at one time: what other sizes left behind makes room.
            while (!kept_.empty() && in_use_ + kept_bytes_ + bytes > most_in_use_) drop(kept_.begin());
            data = std::aligned_alloc(page, static_cast<size_t>(bytes));
            if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
            madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
        }
        in_use_ += bytes;
        most_in_use_ = std::max(most_in_use_, in_use_);
        return data;
    }

    void give_back(void* data, int64_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        in_use_ -= bytes;
#if defined(__linux__) && defined(MADV_FREE)
        madvise(data, static_cast<size_t>(bytes), MADV_FREE);
#endif
        kept_.emplace(bytes, data);
        kept_bytes_ += bytes;
    }

    LargeBlocks state() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return {in_use_, kept_bytes_};
    }

private:
    using Kept = std::multimap<int64_t, void*>;

    void forget(Kept::iterator which) {
        kept_bytes_ -= which->first;
        kept_.erase(which);
    }

    void drop(Kept::iterator which) {
        std::free(which->second);
        forget(which);
    }

    std::mutex mutex_;
    Kept kept_;  // by size
    int64_t in_use_ = 0, most_in_use_ = 0, kept_bytes_ = 0;
};

// Never destroyed: a tensor may outlive everything else in the process.
Pool& pool() {
    static Pool* const made = new Pool;
    return *made;
}

}  // namespace

LargeBlock::LargeBlock(int64_t bytes) : bytes_(bytes), data_(pool().take(whole_pages(bytes))) {}

LargeBlock::~LargeBlock() { pool().give_back(data_, whole_pages(bytes_)); }

LargeBlocks large_blocks() { return pool().state(); }

}  // namespace blip3o_fast
