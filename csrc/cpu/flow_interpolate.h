// flow_interpolate on a CPU. The formula and its backward stand in blip3o_fast/ops/flow_interpolate.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// data, noise, x_t [B, ...] of one shape, x_t contiguous; sigma [B] fp32; seed int64 [2] where noise is absent.
BLIP3O_KERNEL(flow_interpolate_fwd, const View& data, const View& sigma, const View& noise, const View& seed,
              const View& x_t, double sigma_min, double sigma_max, bool cosine)

// dy, ddata, dnoise [B, ...] of one shape, the gradients contiguous; dnoise may be absent.
BLIP3O_KERNEL(flow_interpolate_bwd, const View& dy, const View& sigma, const View& ddata, const View& dnoise,
              double sigma_min, double sigma_max, bool cosine)

}  // namespace blip3o_fast
