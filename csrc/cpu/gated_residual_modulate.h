// gated_residual_modulate on a CPU. The formula and its backward stand in blip3o_fast/ops/gated_residual_modulate.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// x, y, h, n [B, T, D], h and n contiguous; gate, next_scale [B, D], next_scale may be absent; weight, next_weight [D];
// rstd_y, rstd_h [B, T] fp32.
BLIP3O_KERNEL(gated_residual_modulate_fwd, const View& x, const View& y, const View& gate, const View& weight,
              const View& next_weight, const View& next_scale, const View& h, const View& n, const View& rstd_y,
              const View& rstd_h, double eps)

// The gradients are contiguous and of their inputs' shapes; dnext_scale is absent with next_scale.
BLIP3O_KERNEL(gated_residual_modulate_bwd, const View& dh, const View& dn, const View& y, const View& h,
              const View& gate, const View& weight, const View& next_weight, const View& next_scale,
              const View& rstd_y, const View& rstd_h, const View& dx, const View& dy, const View& dgate,
              const View& dweight, const View& dnext_weight, const View& dnext_scale)

}  // namespace blip3o_fast
