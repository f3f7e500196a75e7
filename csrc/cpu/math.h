// Elementary functions without branches and calls, so that loops over them are vectorised. Errors are those of fp32
// arithmetic: at most 3 ulp each, tested through the ops (tests/ops/test_swiglu.py, tests/ops/test_gated_residual.py).
// NaN gives NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace blip3o_fast {
namespace BLIP3O_ISA {

// For n in [-126, 127]; 0 for -127, infinity for 128, anything for others, which come of NaN.
inline float power_of_two(int32_t n) {
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

// (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2: the polynomial whose error in e^r, relative, has the least maximum: 2^-28
inline float exp_tail(float r) {
    float p = 0.001382005f;
    p = p * r + 0.008368683f;
    p = p * r + 0.041668274f;
    p = p * r + 0.16666521f;
    return p * r + 0.49999994f;
}

// 0 below -87.7, infinity above 88.3. The argument is cut off at both ends in one comparison: two would leave paths
// with known results, for which GCC takes the body of a vectorised loop apart.
inline float exp_f(float x) {
    float a = std::fabs(x);
    a = a > 88.8f ? 88.8f : a;
    const Reduced d = reduce_by_ln2(std::copysign(a, x));
    const float scale = power_of_two(d.n < -127 ? -127 : d.n);
    return (1.0f + (d.r + d.r * d.r * exp_tail(d.r))) * scale;
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
