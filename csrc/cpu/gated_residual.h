// gated_residual on a CPU. The formula and its backward stand in blip3o_fast/ops/gated_residual.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// x, y, h [B, T, D], h contiguous; gate [B, D]; weight [D]; rstd [B, T] fp32.
BLIP3O_KERNEL(gated_residual_fwd, const View& x, const View& y, const View& gate, const View& weight, const View& h,
              const View& rstd, double eps)

// dh, y, dy [B, T, D]; dgate [B, D]; dweight [D]. The gradient of x is dh.
BLIP3O_KERNEL(gated_residual_bwd, const View& dh, const View& y, const View& gate, const View& weight,
              const View& rstd, const View& dy, const View& dgate, const View& dweight)

}  // namespace blip3o_fast
