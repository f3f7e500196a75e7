// Weights brought once into the layout that packed_linear reads (packed_layout.h).
#pragma once

#include "run.h"

namespace blip3o_fast {

// The bytes that the buffer of a weight [N, K] takes. mode: 0 float32, 1 bfloat16, 2 int8 with one scale a row of W.
BLIP3O_FUNCTION(int64_t, packed_size, int64_t N, int64_t K, int64_t mode, bool swiglu)

// w [n, K] becomes the columns first_column .. first_column + n of the N in packed (uint8 [packed_size], 64-byte
// aligned), so that several weights that read the same input share one buffer. swiglu: N = 2F, gate first, then up.
BLIP3O_KERNEL(pack_linear, const View& w, const View& packed, int64_t N, int64_t first_column, int64_t mode,
              bool swiglu)

}  // namespace blip3o_fast
