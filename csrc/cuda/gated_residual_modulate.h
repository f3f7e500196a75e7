// The CUDA kernels of `gated_residual_modulate`; its formula and backward stand in
// blip3o_fast/ops/gated_residual_modulate.py.
#pragma once

#include "launch.h"
#include "view.h"

namespace blip3o_fast {

// x and y [B, T, D], gate and next_scale (or absent) [B, D], weight and next_weight [D]; h and n [B, T, D], h of x's
// dtype; rstd_y and rstd_h [B, T] fp32.
void gated_residual_modulate_fwd(const Launcher& launcher, const View& x, const View& y, const View& gate,
                                 const View& weight, const View& next_weight, const View& next_scale, const View& h,
                                 const View& n, const View& rstd_y, const View& rstd_h, double eps);

// Fills the gradients; scratch: p and r fp32 [B, chunks, D], as in rms_norm_modulate.h.
void gated_residual_modulate_bwd(const Launcher& launcher, const View& dh, const View& dn, const View& y,
                                 const View& h, const View& gate, const View& weight, const View& next_weight,
                                 const View& next_scale, const View& rstd_y, const View& rstd_h, const View& dx,
                                 const View& dy, const View& dgate, const View& dweight, const View& dnext_weight,
                                 const View& dnext_scale, const View& p, const View& r);

}  // namespace blip3o_fast
