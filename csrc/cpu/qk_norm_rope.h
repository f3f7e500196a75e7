// qk_norm_rope on a CPU. The formula and its backward stand in blip3o_fast/ops/qk_norm_rope.py.
//
// One call does up to three groups of heads out of any number, heads0, heads1 and heads2 heads up to the first 0; the
// first of them is the first_group-th and begins with the first_head-th head. It writes what belongs to them.
#pragma once

#include "run.h"

namespace blip3o_fast {

// x [B, T, heads * d]; weight, bias [heads of the group * d] or absent, both; rope [T, d / 2, 2] fp32 or absent;
// y [B, T, heads, d] contiguous; mean, rstd [B, T, groups] fp32, 0 and 1 for a group without a norm.
BLIP3O_KERNEL(qk_norm_rope_fwd, const View& x, const View& weight0, const View& bias0, const View& weight1,
              const View& bias1, const View& weight2, const View& bias2, const View& rope, const View& y,
              const View& mean, const View& rstd, int64_t heads0, int64_t heads1, int64_t heads2, int64_t first_group,
              int64_t first_head, int64_t head_dim, double eps)

// dy [B, T, heads, d]; dx [B, T, heads * d] contiguous; daffine [2, heads * d] contiguous, weights and then biases, zeros
// for a group without a norm, or absent where no group has one.
BLIP3O_KERNEL(qk_norm_rope_bwd, const View& dy, const View& x, const View& weight0, const View& weight1,
              const View& weight2, const View& rope, const View& mean, const View& rstd, const View& dx,
              const View& daffine, int64_t heads0, int64_t heads1, int64_t heads2, int64_t first_group,
              int64_t first_head, int64_t head_dim)

}  // namespace blip3o_fast
