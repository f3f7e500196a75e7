// The CUDA kernels of `flow_matching_loss`; its formula and backward stand in blip3o_fast/ops/flow_matching_loss.py.
#pragma once

#include "launch.h"
#include "view.h"

namespace blip3o_fast {

// pred, data, noise [B, T, C]; sigma [B] fp32; seed int64 [2] where noise is absent; loss [], metrics [7] (METRICS of
// the Python file, in its order) and dpred [B, T, C] fp32; dpred may be absent. Scratch: partial fp32 [blocks, 8], the
// blocks share the tokens.
void flow_matching_loss_fwd(const Launcher& launcher, const View& pred, const View& data, const View& sigma,
                            const View& noise, const View& seed, const View& loss, const View& metrics,
                            const View& dpred, const View& partial, bool epsilon, double sigma_min, double sigma_max,
                            bool cosine, double regularization_weight);

// scaled = dloss [] * dpred; dpred fp32; scaled has its shape.
void flow_matching_loss_bwd(const Launcher& launcher, const View& dloss, const View& dpred, const View& scaled);

}  // namespace blip3o_fast
