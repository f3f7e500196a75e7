// Sums over the rows of a matrix: chunks of rows are summed in fp32, by whoever has the rows in the cache, and the
// chunks meet in fp64 in their order. The chunks follow from the number of rows alone: no sum depends on the threads.
#pragma once

#include "parallel.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

struct RowChunks {
    int64_t rows, size, count;

    // 16 rows or more, such that the chunks' sums stay below an eighth of the matrix, and at most 128 chunks
    explicit RowChunks(int64_t n) : rows(n), size(n > 16 * 128 ? (n + 127) / 128 : 16), count((n + size - 1) / size) {}

    int64_t begin(int64_t chunk) const { return chunk * size; }
    int64_t end(int64_t chunk) const { return rows < (chunk + 1) * size ? rows : (chunk + 1) * size; }
};

// store(kind, first, n, sums) for n columns from `first` on, of partial [chunks, kinds, columns] summed over chunks.
template <class Store>
inline void sum_chunks(const Run& run, const float* partial, int64_t chunks, int64_t kinds, int64_t columns,
                       Store store) {
    constexpr int64_t width = 64;
    const int64_t blocks = (columns + width - 1) / width;
    parallel_for(run, kinds * blocks, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t kind = i / blocks, first = i % blocks * width;
            const int64_t n = columns - first < width ? columns - first : width;
            double total[width] = {};
            float sums[width];
            for (int64_t c = 0; c < chunks; ++c) {
                const float* row = partial + (c * kinds + kind) * columns + first;
#pragma omp simd
                for (int64_t j = 0; j < n; ++j) total[j] += row[j];
            }
            for (int64_t j = 0; j < n; ++j) sums[j] = static_cast<float>(total[j]);
            store(kind, first, n, sums);
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
