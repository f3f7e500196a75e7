// The counter-based normals of blip3o_fast/ops/_philox.py: its words bit for bit, each normal within 2 ulp of the
// formula's exact value.
//
// A quadruple's four words lie in two lanes: (w0, w2) of one vector make the radii, (w1, w3) of another the angles, and
// lane j's normals are neighbours. Nothing counts on a fused multiply-add: where a product must be exact, its factors
// have few enough bits. The polynomials are minimax fits; relative to their functions they err by 2.3e-8 (the
// logarithm, halved by the root), 5.4e-9 (sine) and 1e-10 (cosine).
#pragma once

#include <cmath>

#include "vectors.h"
#include "view.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace blip3o_fast {
namespace BLIP3O_ISA {

constexpr int64_t quads_per_vector = vector_floats / 2;
constexpr int64_t normals_per_vector = 2 * vector_floats;

// The key and the upper half of the counter: one sample's own.
struct Stream {
    uint32_t s_low, s_high, k_low, k_high;
};

inline Stream sample_stream(const View& seed, int64_t row) {
    const int64_t* pair = seed.as<const int64_t>();
    const auto key = static_cast<uint64_t>(pair[0]);
    const uint64_t sample = static_cast<uint64_t>(pair[seed.stride[0]]) + static_cast<uint64_t>(row);
    return {static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), static_cast<uint32_t>(key),
            static_cast<uint32_t>(key >> 32)};
}

// The 64-bit products of the lower 32 bits of each lane.
inline LongVector multiply_lower(LongVector a, uint32_t b) {
#if defined(__AVX512F__)
    // the masked form of a full mask: GCC 12 warns of an uninitialised operand inside the plain one
    return (LongVector)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (LongVector)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (LongVector)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

struct Words {
    WordVector radius, angle;
};

// Philox-4x32-10. Of each 64-bit lane only the lower half counts until the end.
inline Words philox(LongVector quad, const Stream& stream) {
    const LongVector zero = {}, lower = zero + 0xffffffffu;
    LongVector c0 = quad, c1 = quad >> 32, c2 = zero + stream.s_low, c3 = zero + stream.s_high;
    uint32_t k0 = stream.k_low, k1 = stream.k_high;
    for (int round = 0; round < 10; ++round) {
        const LongVector first = multiply_lower(c0, 0xD2511F53u), second = multiply_lower(c2, 0xCD9E8D57u);
        c0 = (second >> 32) ^ c1 ^ (zero + k0);
        c2 = (first >> 32) ^ c3 ^ (zero + k1);
        c1 = second;
        c3 = first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {(WordVector)((c0 & lower) | c2 << 32), (WordVector)((c1 & lower) | c3 << 32)};
}

// unit times the float in (0, 1] of a word, rounded as one conversion does: the halves are exact.
inline FloatVector uniform(WordVector word, float unit) {
    const FloatVector high = __builtin_convertvector((IntVector)(word >> 16), FloatVector);
    const FloatVector low = __builtin_convertvector((IntVector)(word & 0xffffu), FloatVector);
    return (high * 65536.0f + low) * (unit * 0x1p-32f) + unit * 0x1p-33f;
}

// x without the bits below its `bits` leading ones.
template <int bits>
inline FloatVector leading(FloatVector x) {
    return (FloatVector)((IntVector)x & -(1 << (24 - bits)));
}

// A number as high + rest, closer than one float can say.
struct Split {
    FloatVector high, rest;
};

// -2 ln(u) of a positive normal float, |rest| < high / 4: u = m * 2^e with m in [2/3, 4/3), g = 2 - 2m (exact), and
// -2 ln(m) = g + g^2 / 4 + g^3 * q(g).
inline Split minus_two_log(FloatVector u) {
    const IntVector bits = (IntVector)u, exponent = (bits - 0x3F2AAAAB) & -0x800000;
    const FloatVector m = (FloatVector)(bits - exponent);
    const FloatVector e = __builtin_convertvector(exponent, FloatVector);  // times 2^23
    const FloatVector g = 2.0f - 2.0f * m;
    FloatVector q = 5.8712764e-4f * g + 1.1914487e-3f;
    q = q * g + 2.1488252e-3f;
    q = q * g + 5.1406375e-3f;
    q = q * g + 1.2518656e-2f;
    q = q * g + 3.125645e-2f;
    q = q * g + 8.333188e-2f;
    const FloatVector square = g * g;
    // -2 ln 2 in two parts, of which the first has 9 bits: its multiples are exact
    return {e * (-1.38671875f * 0x1p-23f) + g, square * 0.25f + ((square * g) * q + e * (4.2438888e-4f * 0x1p-23f))};
}

struct Root {
    FloatVector head;  // 12 bits
    FloatVector rest;
};

// One step of Newton's from the float's root: head's square is exact, and neither the root nor its square is ever
// rounded to one float. The root of 0 is 0.
inline Root root_of(Split x) {
    const FloatVector square = x.high + x.rest;
    float lanes[vector_floats];
    store_vector(lanes, square);
#pragma omp simd
    for (int64_t j = 0; j < vector_floats; ++j) lanes[j] = 1.0f / std::sqrt(lanes[j] < 1e-30f ? 1e-30f : lanes[j]);
    const FloatVector inverse = load_vector(lanes), head = leading<12>(square * inverse), half = inverse * 0.5f;
    FloatVector more = ((x.high - head * head) + x.rest) * half;
    more += more * (more * half);
    return {head, more};
}

// x right angles, in (0, 4]: the nearest whole number, whose two lowest bits count, and of what is left, in
// [-1/2, 1/2], the sine as head (12 bits) + rest and the cosine as 1 - versed.
struct Angle {
    IntVector quarters;
    FloatVector sin_head, sin_rest, versed;
};

inline Angle angle_of(FloatVector x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the nearest whole number
    const FloatVector shifted = x + magic, left = x - (shifted - magic), z = left * left;
    FloatVector p = -4.5920415e-3f * z + 7.9676785e-2f;
    p = p * z - 6.459632e-1f;
    p = p * z + 7.079632e-2f;
    // pi / 2 = 1.5 + p(0), and 1.5 has 2 bits
    const FloatVector first = leading<10>(left);
    FloatVector q = -9.0353604e-4f * z + 2.086012e-2f;
    q = q * z - 2.5366923e-1f;
    q = q * z + 2.3370054e-1f;
    return {(IntVector)shifted, first * 1.5f, (left - first) * 1.5f + left * p, z * q + z};
}

// out: the normals r cos, r sin of each lane in turn, normals_per_vector of them.
inline void box_muller(const Words& words, float* out) {
    const Root r = root_of(minus_two_log(uniform(words.radius, 1.0f)));
    const Angle a = angle_of(uniform(words.angle, 4.0f));
    const FloatVector whole = r.head + r.rest;
    const IntVector c = (IntVector)(r.head + (r.rest - whole * a.versed));
    const IntVector s = (IntVector)(r.head * a.sin_head + (whole * a.sin_rest + r.rest * a.sin_head));
    // turned by the quarters: they change places where the number is odd, and signs
    const IntVector odd = -(a.quarters & 1), sign = IntVector{} + INT32_MIN;
    const IntVector sin = ((s & ~odd) | (c & odd)) ^ (a.quarters << 30 & sign);
    const IntVector cos = ((c & ~odd) | (s & odd)) ^ ((a.quarters + 1) << 30 & sign);
    float lanes[2][vector_floats];
    store_vector(lanes[0], (FloatVector)cos);
    store_vector(lanes[1], (FloatVector)sin);
#pragma omp simd
    for (int64_t j = 0; j < vector_floats; ++j) {
        out[2 * j] = lanes[0][j];
        out[2 * j + 1] = lanes[1][j];
    }
}

// Floats that the buffer of n normals must hold.
constexpr int64_t normals_room(int64_t n) { return n + 3 + normals_per_vector; }

// The normals of n elements of a sample from the element-th on, in buffer.
inline const float* normals(const Stream& stream, int64_t element, int64_t n, float* buffer) {
    LongVector quad;
    for (int64_t j = 0; j < quads_per_vector; ++j) quad[j] = static_cast<uint64_t>(element / 4 + j);
    const int64_t skipped = element % 4;
    for (int64_t i = 0; i < skipped + n; i += normals_per_vector) {
        box_muller(philox(quad, stream), buffer + i);
        quad += static_cast<uint64_t>(quads_per_vector);
    }
    return buffer + skipped;
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
