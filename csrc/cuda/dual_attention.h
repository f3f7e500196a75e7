// The CUDA kernels of `dual_attention`. qkq [B, T, H+K+H, d], v1 [B, T, K, d], k2 and v2 [B, L, K, d], gate [H],
// mask uint8 [B, L] or absent; d is at most 128 and has unit stride, everything may be of any floating dtype.
#pragma once

#include "launch.h"
#include "view.h"

namespace blip3o_fast {

// out [B, T, H*d].
void dual_attention_fwd(const Launcher& launcher, const View& qkq, const View& v1, const View& k2, const View& v2,
                        const View& gate, const View& mask, const View& out, double scale);

// Fills the gradients; scratch: gate_sums fp32 [B * ceil(T / 16), H], statistics fp32 [6, B, H, T].
void dual_attention_bwd(const Launcher& launcher, const View& dout, const View& qkq, const View& v1, const View& k2,
                        const View& v2, const View& gate, const View& mask, const View& dqkq, const View& dv1,
                        const View& dk2, const View& dv2, const View& dgate, const View& gate_sums,
                        const View& statistics, double scale);

}  // namespace blip3o_fast
