// flash_attention on a CPU. The formula and its backward stand in blip3o_fast/ops/flash_attention.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// q, out [B, Tq, H, d], out contiguous; k, v [B, Tk, K, d]; mask bool [B, Tk] or absent.
BLIP3O_KERNEL(flash_attention_fwd, const View& q, const View& k, const View& v, const View& mask, double scale,
              const View& out)

// dout like out, of any strides; dq, dk, dv contiguous.
BLIP3O_KERNEL(flash_attention_bwd, const View& dout, const View& q, const View& k, const View& v, const View& mask,
              double scale, const View& dq, const View& dk, const View& dv)

}  // namespace blip3o_fast
