// layer_norm_modulate on a CPU. The formula and its backward stand in blip3o_fast/ops/layer_norm_modulate.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// x, y [B, T, D], y contiguous; scale [B, D]; mean, rstd [B, T] fp32.
BLIP3O_KERNEL(layer_norm_modulate_fwd, const View& x, const View& scale, const View& y, const View& mean,
              const View& rstd, double eps)

// dy, x, dx [B, T, D]; dscale [B, D]; dx and dscale contiguous.
BLIP3O_KERNEL(layer_norm_modulate_bwd, const View& dy, const View& x, const View& scale, const View& mean,
              const View& rstd, const View& dx, const View& dscale)

}  // namespace blip3o_fast
