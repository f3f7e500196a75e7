// y = x W^T + bias with a weight that pack_linear has packed: every byte of it is read once, in the order it lies.
#pragma once

#include "run.h"

namespace blip3o_fast {

// x [M, K]; bias [N] or absent; y [M, N], or silu(gate) * up [M, N / 2] where the weight was packed with swiglu. x
// and y have any float dtype and any row stride. Arithmetic is fp32 with one rounding into y, except
//   bf16 weights, bf16 x, on avx512_bf16   products of two bf16 by vdpbf16ps, summed in fp32
//   int8 weights                           x is quantised row by row, the products are summed exactly as integers
BLIP3O_KERNEL(packed_linear, const View& x, const View& packed, const View& bias, const View& y)

}  // namespace blip3o_fast
