// ode_step on a CPU. The formula and its backward stand in blip3o_fast/ops/ode_step.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// x, v_cond, v_uncond, y of one shape, y contiguous; guidance, dsigma fp32 without dimensions. v_uncond and guidance are
// both given or both absent.
BLIP3O_KERNEL(ode_step_fwd, const View& x, const View& v_cond, const View& v_uncond, const View& guidance,
              const View& dsigma, const View& y)

// dy, dv_cond, dv_uncond of one shape, the gradients contiguous; dv_uncond absent with guidance.
BLIP3O_KERNEL(ode_step_bwd, const View& dy, const View& guidance, const View& dsigma, const View& dv_cond,
              const View& dv_uncond)

}  // namespace blip3o_fast
