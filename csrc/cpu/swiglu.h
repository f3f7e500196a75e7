// swiglu on a CPU. The formula and its backward stand in blip3o_fast/ops/swiglu.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// gate_up [..., 2F]; y [..., F] contiguous.
BLIP3O_KERNEL(swiglu_fwd, const View& gate_up, const View& y)

// dy [..., F]; gate_up [..., 2F]; dgate_up of the same shape, contiguous.
BLIP3O_KERNEL(swiglu_bwd, const View& dy, const View& gate_up, const View& dgate_up)

}  // namespace blip3o_fast
