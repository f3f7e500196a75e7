// Elementary functions without branches and calls, so that loops over them are vectorised. Errors are those of fp32
// arithmetic: at most 3 ulp each (measured through the ops that use them: tests/ops/test_swiglu.py, test_gated_residual.py).
// NaN gives NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace blip3o_fast {
namespace BLIP3O_ISA {

inline float power_of_two(int32_t n) {  // n in [-126, 127]; anything for others, which come of NaN
    const uint32_t bits = (static_cast<uint32_t>(n) + 127u) << 23;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// x = n ln 2 + r with |r| <= ln(2) / 2: n as a whole number, r to 2 ulp of x.
struct Reduced {
    int32_t n;
    float r;
};

inline Reduced reduce_by_ln2(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    const float shifted = x * 1.44269504088896341f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts
    return {static_cast<int32_t>(n), r};
}

// (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2: Taylor's series, whose first missing term is below 2^-27
inline float exp_tail(float r) {
    float p = 1.0f / 40320.0f;
    p = p * r + 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    return p * r + 0.5f;
}

// Below -87.3 the result is at most the smallest normal number.
inline float exp_f(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 89.0f ? 89.0f : x;
    const Reduced d = reduce_by_ln2(x);
    const int32_t half = d.n >> 1;  // e^89 overflows to infinity in two steps, as 2^n would not in one
    return (1.0f + (d.r + d.r * d.r * exp_tail(d.r))) * power_of_two(half) * power_of_two(d.n - half);
}

inline float sigmoid_f(float x) { return 1.0f / (1.0f + exp_f(-x)); }

// (e^2a - 1) / (e^2a + 1) with e^2a - 1 computed as such: exact near zero, where gates begin.
inline float tanh_f(float x) {
    float a = std::fabs(x);
    a = a > 9.5f ? 9.5f : a;  // 1 to half an ulp
    const Reduced d = reduce_by_ln2(2.0f * a);
    const float scale = power_of_two(d.n);
    const float u = scale * (d.r + d.r * d.r * exp_tail(d.r)) + (scale - 1.0f);
    return std::copysign(u / (u + 2.0f), x);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
