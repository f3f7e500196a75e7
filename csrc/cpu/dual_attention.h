// dual_attention on a CPU. The formula and its backward stand in blip3o_fast/ops/dual_attention.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// qkq [B, T, H+K+H, d]; v1 [B, T, K, d]; k2, v2 [B, L, K, d]; gate [H]; mask bool [B, L] or absent;
// out [B, T, H*d], contiguous. scale is the self-attention's.
BLIP3O_KERNEL(dual_attention_fwd, const View& qkq, const View& v1, const View& k2, const View& v2, const View& gate,
              const View& mask, double scale, const View& out)

// dout like out, of any strides; the gradients contiguous.
BLIP3O_KERNEL(dual_attention_bwd, const View& dout, const View& qkq, const View& v1, const View& k2, const View& v2,
              const View& gate, const View& mask, double scale, const View& dqkq, const View& dv1, const View& dk2,
              const View& dv2, const View& dgate)

}  // namespace blip3o_fast
