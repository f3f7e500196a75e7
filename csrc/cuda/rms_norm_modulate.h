// The CUDA kernels of `rms_norm_modulate`; its formula and backward stand in blip3o_fast/ops/rms_norm_modulate.py.
#pragma once

#include "launch.h"
#include "view.h"

namespace blip3o_fast {

// x [B, T, D], weight [D], scale [B, D] or absent, y [B, T, D], rstd [B, T] fp32.
void rms_norm_modulate_fwd(const Launcher& launcher, const View& x, const View& weight, const View& scale,
                           const View& y, const View& rstd, double eps);

// Fills dx, dweight and, with a scale, dscale; scratch: partial fp32 [B, chunks, D], whose chunks of a sample's tokens
// are a block's each.
void rms_norm_modulate_bwd(const Launcher& launcher, const View& dy, const View& x, const View& weight,
                           const View& scale, const View& rstd, const View& dx, const View& dweight,
                           const View& dscale, const View& partial);

}  // namespace blip3o_fast
