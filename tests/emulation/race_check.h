// What the scheduler tells the checks of shared memory.
#pragma once

#include <cstddef>

namespace emulation {

void* pages(size_t bytes);  // zero, and real memory only where they are touched
void set_dynamic(size_t bytes);  // of the blocks that come
void begin_block();              // shared memory becomes NaN
void block_is_ordered();         // __syncthreads: what was, was before what comes
void warp_is_ordered(int warp);  // __syncwarp
void note_write(const void* address, size_t bytes);
int thread();  // the one that runs

}  // namespace emulation
