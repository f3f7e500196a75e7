// Large memory that is used again: for gradients, which every training step frees and asks for anew.
//
// The C library maps every block above 32 MB anew, and the first touch of a page is a fault: a third of the time of a
// weight's gradient of 70 MB, 256 rows deep, and several times that where a virtual machine has handed the page back to
// its host. So a block that is given back is kept, and the next of its size gets it with its pages. Meanwhile the system
// may take the pages where memory is short (MADV_FREE). Pages are of 2 MB where there are such.
#pragma once

#include <cstdint>

namespace blip3o_fast {

class LargeBlock {
public:
    // Throws std::invalid_argument for no bytes, std::bad_alloc. The content is whatever lay there.
    explicit LargeBlock(int64_t bytes);
    ~LargeBlock();
    LargeBlock(const LargeBlock&) = delete;
    LargeBlock& operator=(const LargeBlock&) = delete;

    void* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

private:
    int64_t bytes_;
    void* data_;
};

// Of all threads.
struct LargeBlocks {
    int64_t in_use, kept;  // bytes
};
LargeBlocks large_blocks();

}  // namespace blip3o_fast
