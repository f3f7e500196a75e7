// Sums over the rows of each sample, for the gradients of what a sample's rows share. Rows are summed in chunks, whose
// sums meet in a second step: a number of chunks that follows from the shape alone, so that threads change no bit.
#pragma once

#include "parallel.h"
#include "rows.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

constexpr int64_t chunk_rows = 16;

// One sample's rows first .. first + count, of which `chunk` is the number over all samples.
struct Chunk {
    int64_t sample, first, count;
};

inline int64_t chunks_per_sample(int64_t tokens) { return (tokens + chunk_rows - 1) / chunk_rows; }

inline Chunk chunk_at(int64_t chunk, int64_t tokens) {
    const int64_t per_sample = chunks_per_sample(tokens);
    const int64_t first = chunk % per_sample * chunk_rows;
    return {chunk / per_sample, first, tokens - first < chunk_rows ? tokens - first : chunk_rows};
}

// The second step works on some columns at a time.
struct Columns {
    static constexpr int64_t most = 64;
    int64_t first, count;

    // These columns of row `row` of [B, D], or of [D] whatever the row.
    const float* load(const View& view, int64_t row, float* buffer) const {
        const int64_t start = view.rank == 2 ? row * view.stride[0] : 0;
        return load_row(view, start + first * view.last_stride, count, buffer);
    }
    void store(const View& view, int64_t row, const float* values) const {
        const int64_t start = view.rank == 2 ? row * view.size[1] : 0;
        store_row(view, start + first, count, values);
    }
};

// The chunks' sums [samples * per_sample, dim], added up in their order in fp64. use(columns, sample, sum, total) makes
// the sample's gradient of sum and adds to total its part of the gradient that all samples share: `shared` [dim], which
// may be absent.
template <class Use>
void reduce_chunks(const Run& run, const float* sums, int64_t samples, int64_t per_sample, int64_t dim,
                   const View& shared, Use use) {
    parallel_for(run, (dim + Columns::most - 1) / Columns::most, [&](int64_t begin, int64_t end, int) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * Columns::most;
            const Columns columns{first, dim - first < Columns::most ? dim - first : Columns::most};
            double total[Columns::most] = {};
            for (int64_t sample = 0; sample < samples; ++sample) {
                double sum[Columns::most] = {};
                for (int64_t c = 0; c < per_sample; ++c) {
                    const float* row = sums + (sample * per_sample + c) * dim + first;
#pragma omp simd
                    for (int64_t i = 0; i < columns.count; ++i) sum[i] += row[i];
                }
                use(columns, sample, sum, total);
            }
            if (!shared.present()) continue;
            float out[Columns::most];
            for (int64_t i = 0; i < columns.count; ++i) out[i] = static_cast<float>(total[i]);
            columns.store(shared, 0, out);
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
