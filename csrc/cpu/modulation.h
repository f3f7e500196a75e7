// What the modulated norms share: the factor of a sample, and the sums over rows that its gradients need.
#pragma once

#include "parallel.h"
#include "reduce.h"
#include "rows.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// Rows of [B, T, D] whose products are summed before they meet those of other chunks. A number of the shape alone: the
// sums do not depend on the threads.
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

inline float row_rstd(const float* x, int64_t dim, double eps) {
    const double squares = sum_over_row(dim, [=](int64_t i) { return x[i] * x[i]; });
    return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(dim) + eps));
}

// weight * (1 + scale) of one sample; buffer holds 2 D floats, the first D of which are the result's.
inline const float* sample_factor(const View& weight, const View& scale, int64_t sample, float* buffer) {
    const int64_t dim = weight.size[0];
    if (!scale.present()) return load_row(weight, 0, dim, buffer);
    const float* s = load_row(scale, sample * scale.stride[0], dim, buffer + dim);
    if (weight.dtype == Dtype::f32 && weight.last_stride == 1) {
        const float* w = weight.as<const float>();
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) buffer[i] = w[i] * (1.0f + s[i]);
    } else {
        load_row(weight, 0, dim, buffer);
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) buffer[i] *= 1.0f + s[i];
    }
    return buffer;
}

// From the chunks' sums p [chunks, D] of dy * xhat, in the order of the chunks:
//   dscale [B, D] = weight * sum of the sample's;  dweight [D] = sum over samples of (1 + scale) * sum of the sample's
inline void reduce_modulation(const Run& run, const float* p, const View& weight, const View& scale,
                              const View& dweight, const View& dscale, int64_t batch, int64_t tokens) {
    const int64_t dim = weight.size[0], per_sample = chunks_per_sample(tokens);
    constexpr int64_t columns = 64;
    parallel_for(run, (dim + columns - 1) / columns, [&](int64_t begin, int64_t end, int) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * columns, n = dim - first < columns ? dim - first : columns;
            double total[columns] = {};
            float w[columns], s[columns], out[columns];
            const float* weights = load_row(weight, first * weight.stride[0], n, weight.stride[0], w);
            for (int64_t b = 0; b < batch; ++b) {
                double sum[columns] = {};
                for (int64_t c = 0; c < per_sample; ++c) {
                    const float* row = p + (b * per_sample + c) * dim + first;
#pragma omp simd
                    for (int64_t i = 0; i < n; ++i) sum[i] += row[i];
                }
                if (!scale.present()) {
                    for (int64_t i = 0; i < n; ++i) total[i] += sum[i];
                    continue;
                }
                const float* scales = load_row(scale, b * scale.stride[0] + first * scale.stride[1], n,
                                               scale.stride[1], s);
                for (int64_t i = 0; i < n; ++i) {
                    total[i] += sum[i] * (1.0 + scales[i]);
                    out[i] = static_cast<float>(sum[i] * weights[i]);
                }
                store_row(dscale, b * dim + first, n, out);
            }
            for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(total[i]);
            store_row(dweight, first, n, out);
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
