#include "rms_norm_modulate.h"

#include "modulation.h"
#include "rows.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

void check(const View& x, const View& weight, const View& scale, const View& rstd) {
    check_rank(x, 3);
    check_float(x);
    check_shape(weight, {x.size[2]});
    check_float(weight);
    if (scale.present()) {
        check_shape(scale, {x.size[0], x.size[2]});
        check_float(scale);
    }
    check_shape(rstd, {x.size[0], x.size[1]});
    check_dtype(rstd, Dtype::f32);
    check_contiguous(rstd);
}

// dx of one row; product += dy * xhat
void row_backward(const float* dy, const float* x, const float* factor, float rstd, float* dx, float* product,
                  int64_t dim) {
    const double dot = sum_over_row(dim, [=](int64_t i) { return dy[i] * factor[i] * x[i]; });
    const float mean = static_cast<float>(dot * rstd / static_cast<double>(dim));
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        const float xhat = x[i] * rstd;
        product[i] += dy[i] * xhat;
        dx[i] = rstd * (dy[i] * factor[i] - xhat * mean);
    }
}

}  // namespace

void rms_norm_modulate_fwd(const Run& run, const View& x, const View& weight, const View& scale, const View& y,
                           const View& rstd, double eps) {
    check(x, weight, scale, rstd);
    check_shape(y, {x.size[0], x.size[1], x.size[2]});
    check_float(y);
    check_contiguous(y);
    const int64_t tokens = x.size[1], dim = x.size[2];
    Scratch scratch(run.threads, 4 * dim);
    parallel_for(run, x.size[0] * tokens, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const float* factor = nullptr;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens;
            if (row == begin || (t == 0 && scale.present())) factor = sample_factor(weight, scale, b, buffer);
            const float* in = load_row(x, b * x.stride[0] + t * x.stride[1], dim, buffer + 2 * dim);
            float* out = row_target(y, row * dim, buffer + 3 * dim);
            const float r = row_rstd(in, dim, eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] = in[i] * r * factor[i];
            store_row(y, row * dim, dim, out);
            rstd.as<float>()[row] = r;
        }
    });
}

void rms_norm_modulate_bwd(const Run& run, const View& dy, const View& x, const View& weight, const View& scale,
                           const View& rstd, const View& dx, const View& dweight, const View& dscale) {
    check(x, weight, scale, rstd);
    const int64_t batch = x.size[0], tokens = x.size[1], dim = x.size[2];
    for (const View* v : {&dy, &dx}) {
        check_shape(*v, {batch, tokens, dim});
        check_float(*v);
    }
    check_contiguous(dx);
    check_shape(dweight, {dim});
    check_float(dweight);
    check_contiguous(dweight);
    if (scale.present()) {
        check_shape(dscale, {batch, dim});
        check_float(dscale);
        check_contiguous(dscale);
    }
    const int64_t chunks = batch * chunks_per_sample(tokens);
    Scratch scratch(run.threads, 5 * dim), products(1, chunks * dim);
    parallel_for(run, chunks, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        for (int64_t c = begin; c < end; ++c) {
            const Chunk chunk = chunk_at(c, tokens);
            const float* factor = sample_factor(weight, scale, chunk.sample, buffer);
            float* product = products.of(0) + c * dim;
            std::memset(product, 0, static_cast<size_t>(dim) * sizeof(float));
            for (int64_t t = chunk.first; t < chunk.first + chunk.count; ++t) {
                const int64_t row = chunk.sample * tokens + t;
                const float* in = load_row(x, chunk.sample * x.stride[0] + t * x.stride[1], dim, buffer + 2 * dim);
                const float* up = load_row(dy, chunk.sample * dy.stride[0] + t * dy.stride[1], dim, buffer + 3 * dim);
                float* out = row_target(dx, row * dim, buffer + 4 * dim);
                row_backward(up, in, factor, rstd.as<const float>()[row], out, product, dim);
                store_row(dx, row * dim, dim, out);
            }
        }
    });
    reduce_modulation(run, products.of(0), weight, scale, dweight, dscale, batch, tokens);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
