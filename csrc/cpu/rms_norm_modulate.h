// rms_norm_modulate on a CPU. The formula and its backward stand in blip3o_fast/ops/rms_norm_modulate.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// x, y [B, T, D], y contiguous; weight [D]; scale [B, D] or absent; rstd [B, T] fp32.
BLIP3O_KERNEL(rms_norm_modulate_fwd, const View& x, const View& weight, const View& scale, const View& y,
              const View& rstd, double eps)

// dy, x, dx [B, T, D]; dweight [D]; dscale [B, D] contiguous, absent with scale.
BLIP3O_KERNEL(rms_norm_modulate_bwd, const View& dy, const View& x, const View& weight, const View& scale,
              const View& rstd, const View& dx, const View& dweight, const View& dscale)

}  // namespace blip3o_fast
