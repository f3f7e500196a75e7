// rms_norm_modulate on a CPU, fp32. The formula and its backward stand in blip3o_fast/ops/rms_norm_modulate.py.
#pragma once
#include <cstdint>

namespace blip3o_fast {

// [B, T, D] with unit last stride; batch_stride and token_stride in elements.
struct Rows {
    int64_t batch, tokens, dim, batch_stride, token_stride;
};

// scale [B, D] with row stride scale_stride, or null; y [B, T, D] contiguous; rstd [B, T].
void rms_norm_modulate_fwd(const float* x, const float* weight, const float* scale, float* y, float* rstd,
                           Rows rows, int64_t scale_stride, float eps);

// dy is laid out by dy_rows, x by x_rows; dx contiguous; dweight [D]; dscale [B, D] contiguous, null with scale.
void rms_norm_modulate_bwd(const float* dy, const float* x, const float* weight, const float* scale,
                           const float* rstd, float* dx, float* dweight, float* dscale, Rows dy_rows, Rows x_rows,
                           int64_t scale_stride);

}  // namespace blip3o_fast
