// Counter-based normals: Philox-4x32-10 and Box-Muller, as blip3o_fast/ops/_philox.py specifies them.
//
// The words are that module's bit for bit; a normal is within 2 ulp of the formula's exact value. Logarithm, sine and
// cosine are written out, as in kernels/_philox.py: CUDA's own are not close enough together with what follows them, or
// reduce their argument through local memory. Where a product must be exact its factors have few enough bits, so that
// nothing depends on whether it is fused with an addition. The polynomials are minimax fits.
#pragma once

#include "common.cuh"

namespace blip3o_fast {

struct Words {
    uint32_t a, b, c, d;
};

__device__ inline Words philox(Words counter, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t{counter.a} * 0xD2511F53u, second = uint64_t{counter.c} * 0xCD9E8D57u;
        counter = {static_cast<uint32_t>(second >> 32) ^ counter.b ^ key0, static_cast<uint32_t>(second),
                   static_cast<uint32_t>(first >> 32) ^ counter.d ^ key1, static_cast<uint32_t>(first)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// `unit`, a power of two, times the fp32 in (0, 1] of a word.
__device__ inline float uniform(uint32_t word, float unit) {
    return static_cast<float>(word) * (unit * 0x1p-32f) + unit * 0x1p-33f;
}

// x without the bits below its `bits` leading ones.
template <int bits>
__device__ inline float leading(float x) {
    return __uint_as_float(__float_as_uint(x) & ~0u << (24 - bits));
}

// -2 ln(u) of a positive normal number as high + rest, |rest| < high / 4: closer than one fp32 can say.
// u = m * 2^e with m in [2/3, 4/3), g = 2 - 2m (exact), and -2 ln(m) = g + g^2 / 4 + g^3 * q(g).
__device__ inline void minus_two_log(float u, float& high, float& rest) {
    const uint32_t bits = __float_as_uint(u), exponent = (bits - 0x3F2AAAABu) & 0xff800000u;
    const float m = __uint_as_float(bits - exponent);
    const auto e = static_cast<float>(static_cast<int32_t>(exponent));  // times 2^23
    const float g = 2.0f - 2.0f * m;
    float q = 5.8712764e-4f * g + 1.1914487e-3f;
    q = q * g + 2.1488252e-3f;
    q = q * g + 5.1406375e-3f;
    q = q * g + 1.2518656e-2f;
    q = q * g + 3.125645e-2f;
    q = q * g + 8.333188e-2f;
    const float square = g * g;
    // -2 ln 2 in two parts, of which the first has 9 bits: its multiples are exact
    high = e * (-1.38671875f * 0x1p-23f) + g;
    rest = square * 0.25f + ((square * g) * q + e * (4.2438888e-4f * 0x1p-23f));
}

// An angle of x right angles: `turns` is the nearest integer, and what is left of x, in [-1/2, 1/2] and exact below
// 2^22, has the sine head + rest, where head has 12 bits, and the cosine 1 - versed.
struct Angle {
    uint32_t turns;  // of which the two lowest bits count
    float head, rest, versed;
};

__device__ inline Angle right_angles(float x) {
    constexpr float rounds = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
    const float shifted = x + rounds, left = x - (shifted - rounds), z = left * left;
    float p = -4.5920415e-3f * z + 7.9676785e-2f;
    p = p * z - 6.459632e-1f;
    p = p * z + 7.079632e-2f;
    // pi / 2 = 1.5 + p(0), and 1.5 has 2 bits
    const float first = leading<10>(left);
    float q = -9.0353604e-4f * z + 2.086012e-2f;
    q = q * z - 2.5366923e-1f;
    q = q * z + 2.3370054e-1f;
    return {__float_as_uint(shifted), first * 1.5f, (left - first) * 1.5f + left * p, z * q + z};
}

// Two standard normals of two words: r cos(2 pi u_b) and r sin(2 pi u_b), r = sqrt(-2 ln u_a).
__device__ inline void box_muller(uint32_t word_a, uint32_t word_b, float& first, float& second) {
    float high, rest;
    minus_two_log(uniform(word_a, 1.0f), high, rest);
    // One step of Newton's from the approximate root, r = root + more: root's square is exact, and neither r nor r^2
    // is ever rounded to one fp32. u = 1 gives r = 0.
    const float square = high + rest, inverse = rsqrtf(fmaxf(square, 1e-30f));
    const float root = leading<12>(square * inverse), half = inverse * 0.5f;
    float more = ((high - root * root) + rest) * half;
    more += more * (more * half);
    const float r = root + more;
    const Angle angle = right_angles(uniform(word_b, 4.0f));
    const float cos = root + (more - r * angle.versed);
    const float sin = root * angle.head + (r * angle.rest + more * angle.head);
    const bool odd = (angle.turns & 1) != 0;
    const uint32_t sign_of_sin = angle.turns << 30 & 0x80000000u, sign_of_cos = (angle.turns + 1) << 30 & 0x80000000u;
    first = __uint_as_float(__float_as_uint(odd ? sin : cos) ^ sign_of_cos);
    second = __uint_as_float(__float_as_uint(odd ? cos : sin) ^ sign_of_sin);
}

// The normals of one sample of a batch.
struct Stream {
    uint32_t sample0, sample1, key0, key1;

    // seed = (seed, offset)
    __device__ Stream(int64_t seed, int64_t offset, int64_t row)
        : sample0(static_cast<uint32_t>(offset + row)),
          sample1(static_cast<uint32_t>(static_cast<uint64_t>(offset + row) >> 32)),
          key0(static_cast<uint32_t>(seed)),
          key1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}

    __device__ Words words(int64_t quad) const {
        return philox({static_cast<uint32_t>(quad), static_cast<uint32_t>(static_cast<uint64_t>(quad) >> 32), sample0,
                       sample1},
                      key0, key1);
    }

    // Elements 4 * quad ... 4 * quad + 3.
    __device__ void four(int64_t quad, float& n0, float& n1, float& n2, float& n3) const {
        const Words w = words(quad);
        box_muller(w.a, w.b, n0, n1);
        box_muller(w.c, w.d, n2, n3);
    }

    __device__ float one(int64_t element) const {
        const Words w = words(element >> 2);
        const bool second = (element & 2) != 0;
        float even, odd;
        box_muller(second ? w.c : w.a, second ? w.d : w.b, even, odd);
        return (element & 1) != 0 ? odd : even;
    }
};

}  // namespace blip3o_fast
