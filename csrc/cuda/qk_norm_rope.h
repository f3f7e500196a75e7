// The CUDA kernels of `qk_norm_rope`. A call serves up to three neighbouring groups of heads of those that x has; one
// that is not there has 0 heads, one without a norm neither weight nor bias.
#pragma once

#include "launch.h"
#include "view.h"

namespace blip3o_fast {

// The most columns that a group can have.
constexpr int64_t qk_norm_rope_columns = 8192;

// x [B, T, C] with unit last stride, rope fp32 [T, head_dim/2, 2] or absent, y [B, T, C/head_dim, head_dim],
// mean and rstd fp32 [B, T, groups]. first_group and first_head: how many groups and heads stand before these three.
void qk_norm_rope_fwd(const Launcher& launcher, const View& x, const View& weight0, const View& weight1,
                      const View& weight2, const View& bias0, const View& bias1, const View& bias2, const View& rope,
                      const View& y, const View& mean, const View& rstd, int64_t heads0, int64_t heads1,
                      int64_t heads2, int64_t first_group, int64_t first_head, int64_t head_dim, double eps);

// dy [B, T, heads, head_dim] whose heads are neighbours in memory, dx [B, T, C]. partial fp32 [chunks, 2, C] or absent:
// a row per chunk of ceil(B * T / chunks) tokens, the sums over them for dweight and for dbias.
void qk_norm_rope_bwd(const Launcher& launcher, const View& dy, const View& x, const View& weight0,
                      const View& weight1, const View& weight2, const View& rope, const View& mean, const View& rstd,
                      const View& dx, const View& partial, int64_t heads0, int64_t heads1, int64_t heads2,
                      int64_t first_group, int64_t first_head, int64_t head_dim);

// daffine [2, C] = partial summed over its chunks, in a fixed order.
void qk_norm_rope_bwd_finish(const Launcher& launcher, const View& partial, const View& daffine);

}  // namespace blip3o_fast
