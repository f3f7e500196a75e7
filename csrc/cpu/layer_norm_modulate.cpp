#include "layer_norm_modulate.h"

#include "modulation.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

void check(const View& x, const View& scale, const View& mean, const View& rstd) {
    check_rank(x, 3);
    check_float(x);
    check_input(scale, {x.size[0], x.size[2]});
    check_statistic(mean, x.size[0], x.size[1]);
    check_statistic(rstd, x.size[0], x.size[1]);
}

// 1 + scale of one sample; buffer holds D floats.
const float* factor_of(const View& scale, int64_t sample, float* buffer) {
    const int64_t dim = scale.size[1];
    const float* s = load_row(scale, sample * scale.stride[0], dim, buffer);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) buffer[i] = 1.0f + s[i];
    return buffer;
}

float row_mean(const float* x, int64_t dim) {
    return static_cast<float>(sum_over_row(dim, [=](int64_t i) { return x[i]; }) / static_cast<double>(dim));
}

// Centred first: E[x^2] - mean^2 loses every digit where the mean is large.
float centred_rstd(const float* x, float mean, int64_t dim, double eps) {
    const double squares = sum_over_row(dim, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
    return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(dim) + eps));
}

// dx of one row; sum += dy * xhat
void row_backward(const float* dy, const float* x, const float* factor, float mean, float rstd, float* dx, float* sum,
                  int64_t dim) {
    const double count = static_cast<double>(dim);
    const double g_sum = sum_over_row(dim, [=](int64_t i) { return dy[i] * factor[i]; });
    const double dot = sum_over_row(dim, [=](int64_t i) { return dy[i] * factor[i] * (x[i] - mean); });
    const float g_mean = static_cast<float>(g_sum / count), projection = static_cast<float>(dot * rstd / count);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        const float xhat = (x[i] - mean) * rstd;
        sum[i] += dy[i] * xhat;
        dx[i] = rstd * ((dy[i] * factor[i] - g_mean) - xhat * projection);
    }
}

}  // namespace

void layer_norm_modulate_fwd(const Run& run, const View& x, const View& scale, const View& y, const View& mean,
                             const View& rstd, double eps) {
    check(x, scale, mean, rstd);
    const int64_t batch = x.size[0], tokens = x.size[1], dim = x.size[2];
    check_output(y, {batch, tokens, dim});
    Scratch scratch(run.threads, 3 * dim);
    parallel_for(run, batch * tokens, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const float* factor = nullptr;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens;
            if (row == begin || t == 0) factor = factor_of(scale, b, buffer);
            const float* in = load_row(x, row_offset(x, b, t), dim, buffer + dim);
            float* out = row_target(y, row * dim, buffer + 2 * dim);
            const float m = row_mean(in, dim), r = centred_rstd(in, m, dim, eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] = (in[i] - m) * r * factor[i];
            store_row(y, row * dim, dim, out);
            mean.as<float>()[row] = m;
            rstd.as<float>()[row] = r;
        }
    });
}

void layer_norm_modulate_bwd(const Run& run, const View& dy, const View& x, const View& scale, const View& mean,
                             const View& rstd, const View& dx, const View& dscale) {
    check(x, scale, mean, rstd);
    const int64_t batch = x.size[0], tokens = x.size[1], dim = x.size[2], per_sample = chunks_per_sample(tokens);
    check_input(dy, {batch, tokens, dim});
    check_output(dx, {batch, tokens, dim});
    check_output(dscale, {batch, dim});
    Scratch scratch(run.threads, 4 * dim), sums(1, batch * per_sample * dim);
    parallel_for(run, batch * per_sample, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const float* factor = nullptr;
        for (int64_t c = begin; c < end; ++c) {
            const Chunk chunk = chunk_at(c, tokens);
            const int64_t b = chunk.sample;
            if (c == begin || chunk.first == 0) factor = factor_of(scale, b, buffer);
            float* sum = sums.of(0) + c * dim;
            std::memset(sum, 0, static_cast<size_t>(dim) * sizeof(float));
            for (int64_t t = chunk.first; t < chunk.first + chunk.count; ++t) {
                const int64_t row = b * tokens + t;
                const float* in = load_row(x, row_offset(x, b, t), dim, buffer + dim);
                const float* up = load_row(dy, row_offset(dy, b, t), dim, buffer + 2 * dim);
                float* out = row_target(dx, row * dim, buffer + 3 * dim);
                row_backward(up, in, factor, mean.as<const float>()[row], rstd.as<const float>()[row], out, sum, dim);
                store_row(dx, row * dim, dim, out);
            }
        }
    });
    const auto use = [&](const Columns& columns, int64_t sample, const double* sum, double*) {
        float out[Columns::most];
        for (int64_t i = 0; i < columns.count; ++i) out[i] = static_cast<float>(sum[i]);
        columns.store(dscale, sample, out);
    };
    reduce_chunks(run, sums.of(0), batch, per_sample, dim, View{}, use);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
