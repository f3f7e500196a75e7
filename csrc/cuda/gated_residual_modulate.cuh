// What the kernels of `gated_residual_modulate` are given.
#pragma once

#include "rows.cuh"

namespace blip3o_fast {

struct GatedForward {
    Rows x, y, gate, weight, next_weight, next_scale, h, n;
    float *rstd_y, *rstd_h;
};

struct GatedBackward {
    Rows dh, dn, y, h, gate, weight, next_weight, next_scale, dx, dy;
    const float *rstd_y, *rstd_h;
    float *p, *r;  // [B, chunks, D]: the sums over a block's tokens of e * yhat and of dn * hhat
};

void launch_gated_backward(const Launcher& launcher, const GatedBackward& args, const Shape& shape);

}  // namespace blip3o_fast
