// Which part of an output each thread computes: panels of columns, and chunks of rows where panels alone do not do.
#pragma once

#include <cstdint>

#include "run.h"
#include "tile.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// More rows than this and a chunk's C would crowd A and B out of a 1 MB L2.
constexpr int64_t kMaxChunkRows = 44 * kTileRows;
// Steps along K between two visits to C. The block of the panel, 64 KB with AVX-512, stays in L2 for all rows.
constexpr int64_t kBlockSteps = 256;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many threads parallel_for employs for n things.
inline int threads_for(const Run& run, int64_t n) { return static_cast<int>(n < run.threads ? n : run.threads); }

// Item i of `items` is panel i / chunks, rows from (i % chunks) * chunk_rows on.
struct GemmSplit {
    int64_t chunk_rows, chunks, items;

    GemmSplit(int64_t rows, int64_t panels, int threads) {
        chunks = ceil_div(rows, kMaxChunkRows);
        // A thread that waits for the others costs more than reading a panel twice does.
        const auto idle = [&] { return ceil_div(panels * chunks, threads) * threads * 10 > panels * chunks * 11; };
        while (idle() && 2 * chunks * kTileRows <= rows) chunks *= 2;
        chunk_rows = ceil_div(ceil_div(rows, chunks), kTileRows) * kTileRows;
        chunks = ceil_div(rows, chunk_rows);
        items = panels * chunks;
    }
};

// Blocks of equal size, so that the last is no stub.
// A short sum is cut too: its error grows with the length of its chains, and those of separate products are short.
inline int64_t block_steps(int64_t steps) {
    const int64_t quarter = ceil_div(steps, 4), least = 64;
    const int64_t longest = quarter < least ? least : quarter < kBlockSteps ? quarter : kBlockSteps;
    return ceil_div(steps, ceil_div(steps, longest));
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
