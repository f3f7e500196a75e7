// What the modulated norms share: their checks, and the two factors that a sample's rows are multiplied by, with their
// gradients. A factor is made once for each sample that a thread meets.
#pragma once

#include "chunk_sums.h"
#include "math.h"
#include "reduce.h"
#include "rows.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// ---- checks ----

inline void check_input(const View& view, std::initializer_list<int64_t> sizes) {
    check_shape(view, sizes);
    check_float(view);
}

inline void check_output(const View& view, std::initializer_list<int64_t> sizes) {
    check_input(view, sizes);
    check_contiguous(view);
}

// A mean or rstd per row, fp32.
inline void check_statistic(const View& view, int64_t batch, int64_t tokens) {
    check_shape(view, {batch, tokens});
    check_dtype(view, Dtype::f32);
    check_contiguous(view);
}

// ---- rows of [B, T, D] ----

inline int64_t row_offset(const View& view, int64_t sample, int64_t token) {
    return sample * view.stride[0] + token * view.stride[1];
}

inline float row_rstd(const float* x, int64_t dim, double eps) {
    const double squares = sum_over_row(dim, [=](int64_t i) { return x[i] * x[i]; });
    return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(dim) + eps));
}

// The backward of one row of y = x * rstd * factor: dx, and sum += dy * xhat.
inline void rms_row_backward(const float* dy, const float* x, const float* factor, float rstd, float* dx, float* sum,
                             int64_t dim) {
    const double dot = sum_over_row(dim, [=](int64_t i) { return dy[i] * factor[i] * x[i]; });
    const float mean = static_cast<float>(dot * rstd / static_cast<double>(dim));
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        const float xhat = x[i] * rstd;
        sum[i] += dy[i] * xhat;
        dx[i] = rstd * (dy[i] * factor[i] - xhat * mean);
    }
}

// Of all rows, with the sums of each chunk's; factor(sample, buffer of 2 D floats) as below.
template <class Factor>
void rms_rows_backward(const Run& run, const View& dy, const View& x, const View& rstd, const View& dx, float* sums,
                       Factor factor) {
    const int64_t tokens = x.size[1], dim = x.size[2];
    Scratch scratch(run.threads, 5 * dim);
    parallel_for(run, x.size[0] * chunks_per_sample(tokens), [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const float* f = nullptr;
        for (int64_t c = begin; c < end; ++c) {
            const Chunk chunk = chunk_at(c, tokens);
            if (c == begin || chunk.first == 0) f = factor(chunk.sample, buffer);
            float* sum = sums + c * dim;
            std::memset(sum, 0, static_cast<size_t>(dim) * sizeof(float));
            for (int64_t t = chunk.first; t < chunk.first + chunk.count; ++t) {
                const int64_t row = chunk.sample * tokens + t;
                const float* in = load_row(x, row_offset(x, chunk.sample, t), dim, buffer + 2 * dim);
                const float* up = load_row(dy, row_offset(dy, chunk.sample, t), dim, buffer + 3 * dim);
                float* out = row_target(dx, row * dim, buffer + 4 * dim);
                rms_row_backward(up, in, f, rstd.as<const float>()[row], out, sum, dim);
                store_row(dx, row * dim, dim, out);
            }
        }
    });
}

// ---- weight * (1 + scale): weight [D], scale [B, D] or absent ----

// Of one sample; buffer holds 2 D floats, the first D of which are the result's.
inline const float* scale_factor(const View& weight, const View& scale, int64_t sample, float* buffer) {
    const int64_t dim = weight.size[0];
    const float* w = load_row(weight, 0, dim, buffer);
    if (!scale.present()) return w;
    const float* s = load_row(scale, sample * scale.stride[0], dim, buffer + dim);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) buffer[i] = w[i] * (1.0f + s[i]);
    return buffer;
}

// From the chunks' sums of dy * xhat, p in all of a sample:
//   dscale [B, D] = p * weight;  dweight [D] = sum over samples of p * (1 + scale)
inline void reduce_scale_gradients(const Run& run, const float* sums, const View& weight, const View& scale,
                                   const View& dweight, const View& dscale, int64_t batch, int64_t tokens) {
    const int64_t dim = weight.size[0], per_sample = chunks_per_sample(tokens);
    if (!scale.present()) {  // all rows are one sample's
        reduce_chunks(run, sums, 1, batch * per_sample, dim, dweight,
                      [](const Columns& columns, int64_t, const double* sum, double* total) {
                          for (int64_t i = 0; i < columns.count; ++i) total[i] = sum[i];
                      });
        return;
    }
    const auto use = [&](const Columns& columns, int64_t sample, const double* sum, double* total) {
        float w_buffer[Columns::most], s_buffer[Columns::most], out[Columns::most];
        const float* w = columns.load(weight, 0, w_buffer);
        const float* s = columns.load(scale, sample, s_buffer);
#pragma omp simd
        for (int64_t i = 0; i < columns.count; ++i) {
            total[i] += sum[i] * (1.0 + s[i]);
            out[i] = static_cast<float>(sum[i] * w[i]);
        }
        columns.store(dscale, sample, out);
    };
    reduce_chunks(run, sums, batch, per_sample, dim, dweight, use);
}

// ---- weight * tanh(gate): weight [D], gate [B, D] ----

// Of one sample; buffer as above.
inline const float* gate_factor(const View& weight, const View& gate, int64_t sample, float* buffer) {
    const int64_t dim = weight.size[0];
    const float* w = load_row(weight, 0, dim, buffer);
    const float* g = load_row(gate, sample * gate.stride[0], dim, buffer + dim);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) buffer[i] = w[i] * tanh_f(g[i]);
    return buffer;
}

// From the chunks' sums of dh * yhat, p in all of a sample, with t = tanh(gate):
//   dgate [B, D] = p * weight * (1 - t^2);  dweight [D] = sum over samples of p * t
inline void reduce_gate_gradients(const Run& run, const float* sums, const View& weight, const View& gate,
                                  const View& dweight, const View& dgate, int64_t batch, int64_t tokens) {
    const auto use = [&](const Columns& columns, int64_t sample, const double* sum, double* total) {
        float w_buffer[Columns::most], g_buffer[Columns::most], out[Columns::most];
        const float* w = columns.load(weight, 0, w_buffer);
        const float* g = columns.load(gate, sample, g_buffer);
#pragma omp simd
        for (int64_t i = 0; i < columns.count; ++i) {
            const float t = tanh_f(g[i]);
            total[i] += sum[i] * t;
            out[i] = static_cast<float>(sum[i]) * w[i] * ((1.0f - t) * (1.0f + t));
        }
        columns.store(dgate, sample, out);
    };
    reduce_chunks(run, sums, batch, chunks_per_sample(tokens), weight.size[0], dweight, use);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
