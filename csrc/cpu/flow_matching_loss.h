// flow_matching_loss on a CPU. The formula and its backward stand in blip3o_fast/ops/flow_matching_loss.py.
#pragma once

#include "run.h"

namespace blip3o_fast {

// pred, data, noise [B, T, C]; sigma [B] fp32; seed int64 [2] where noise is absent; loss [], metrics [7] (METRICS of the
// Python file, in its order), dpred [B, T, C] fp32 contiguous; dpred may be absent.
BLIP3O_KERNEL(flow_matching_loss_fwd, const View& pred, const View& data, const View& sigma, const View& noise,
              const View& seed, const View& loss, const View& metrics, const View& dpred, bool epsilon,
              double sigma_min, double sigma_max, bool cosine, double regularization_weight)

// scaled = dloss [] * dpred, both fp32; scaled has dpred's shape and is contiguous.
BLIP3O_KERNEL(flow_matching_loss_bwd, const View& dloss, const View& dpred, const View& scaled)

}  // namespace blip3o_fast
