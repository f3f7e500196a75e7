// Symmetric int8 with 127 levels on either side of zero, one scale a row: x = scale * q to half a step.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace blip3o_fast {
namespace BLIP3O_ISA {

struct RowScale {
    float scale, inverse;
};

// NaN and infinity in the row come out as such in the scale, and with it in whatever is multiplied by it.
inline RowScale row_scale(const float* x, int64_t n) {
    int32_t largest = 0;  // the bits of |x| are ordered like |x|, with NaN on top
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = largest > bits ? largest : bits;
    }
    float peak;
    std::memcpy(&peak, &largest, 4);
    return {peak / 127.0f, peak > 1e-36f ? 127.0f / peak : 0.0f};  // below, 127 / peak would overflow: all zeros
}

// To the nearest level, ties to even.
inline int32_t quantised(float x, float inverse) {
    float level = __builtin_rintf(x * inverse);
    level = level > -127.0f ? level : -127.0f;
    level = level < 127.0f ? level : 127.0f;
    return static_cast<int32_t>(level);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
