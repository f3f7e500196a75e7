#include "rms_norm_modulate.h"

#include <cmath>
#include <vector>

#include "clones.h"

namespace blip3o_fast {

namespace {

// weight * (1 + scale) of one sample
BLIP3O_CLONES void sample_factor(const float* weight, const float* scale, float* factor, int64_t dim) {
    for (int64_t i = 0; i < dim; ++i) factor[i] = scale ? weight[i] * (1.0f + scale[i]) : weight[i];
}

BLIP3O_CLONES float row_forward(const float* x, const float* factor, float* y, int64_t dim, float eps) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
    const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) y[i] = x[i] * rstd * factor[i];
    return rstd;
}

// Adds dy * xhat to product, the sample's accumulator for dscale and dweight.
BLIP3O_CLONES void row_backward(const float* dy, const float* x, const float* factor, float rstd, float* dx,
                                float* product, int64_t dim) {
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < dim; ++i) dot += dy[i] * factor[i] * (x[i] * rstd);
    const float mean = dot / static_cast<float>(dim);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        const float xhat = x[i] * rstd;
        dx[i] = rstd * (dy[i] * factor[i] - xhat * mean);
        product[i] += dy[i] * xhat;
    }
}

}  // namespace

void rms_norm_modulate_fwd(const float* x, const float* weight, const float* scale, float* y, float* rstd,
                           Rows rows, int64_t scale_stride, float eps) {
    std::vector<float> factor(rows.dim);
    for (int64_t b = 0; b < rows.batch; ++b) {
        sample_factor(weight, scale ? scale + b * scale_stride : nullptr, factor.data(), rows.dim);
        for (int64_t t = 0; t < rows.tokens; ++t) {
            const int64_t row = b * rows.tokens + t;
            rstd[row] = row_forward(x + b * rows.batch_stride + t * rows.token_stride, factor.data(),
                                    y + row * rows.dim, rows.dim, eps);
        }
    }
}

void rms_norm_modulate_bwd(const float* dy, const float* x, const float* weight, const float* scale,
                           const float* rstd, float* dx, float* dweight, float* dscale, Rows dy_rows, Rows x_rows,
                           int64_t scale_stride) {
    const int64_t dim = x_rows.dim;
    std::vector<float> factor(dim), product(dim);
    std::vector<double> total(dim, 0.0);  // over all samples: batch can be large, and this is D adds per sample
    for (int64_t b = 0; b < x_rows.batch; ++b) {
        const float* scale_row = scale ? scale + b * scale_stride : nullptr;
        sample_factor(weight, scale_row, factor.data(), dim);
        product.assign(dim, 0.0f);
        for (int64_t t = 0; t < x_rows.tokens; ++t) {
            const int64_t row = b * x_rows.tokens + t;
            row_backward(dy + b * dy_rows.batch_stride + t * dy_rows.token_stride,
                         x + b * x_rows.batch_stride + t * x_rows.token_stride, factor.data(), rstd[row],
                         dx + row * dim, product.data(), dim);
        }
        for (int64_t i = 0; i < dim; ++i) {
            total[i] += static_cast<double>(product[i]) * (scale ? 1.0 + scale_row[i] : 1.0);
            if (dscale) dscale[b * dim + i] = product[i] * weight[i];
        }
    }
    for (int64_t i = 0; i < dim; ++i) dweight[i] = static_cast<float>(total[i]);
}

}  // namespace blip3o_fast
