// c = a b on plain matrices, for the three products of a linear layer in training.
#pragma once

#include "run.h"

namespace blip3o_fast {

// a [M, K], b [K, N], c [M, N], each of any float dtype. a and b have any strides, so that
//   forward          y = x W^T     linear(x, W.T, y)
//   input gradient   dx = dy W     linear(dy, W, dx)
//   weight gradient  dW = dy^T x   linear(dy.T, x, dW)
// c has contiguous rows. Sums are fp32, and so are the products, but for two bf16 operands on avx512_bf16: vdpbf16ps.
BLIP3O_KERNEL(linear, const View& a, const View& b, const View& c)

}  // namespace blip3o_fast
