// Conversions of half precision, to the nearest with ties to even, and the product that tensor cores compute.
#include "cuda_emulation.h"

namespace emulation {

float f16_to_float(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 0x1p-24f;  // exact
        return sign != 0 ? -value : value;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_f16(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
    if (magnitude < 0x38800000u) {
        // below 2^-14: adding 0.5 leaves the multiples of 2^-24 in the low bits, rounded by the addition
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | rounded >> 13);
}

uint16_t float_to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// d += a * b of one lane, whose row is lane / 4 and whose pair of columns begins at 2 * (lane % 4): the fragments of
// m16n8k16 in the PTX manual, a's four registers and then b's two. Products are exact in fp32, and they are added up in
// fp32, one after the other.
void multiply_fragments(float* d, const Slots& a_and_b, bool is_bf16) {
    const auto widen = [&](uint32_t pair, int half) {
        const auto bits = static_cast<uint16_t>(pair >> (16 * half));
        return is_bf16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : f16_to_float(bits);
    };
    const int row = lane() / 4, column = lane() % 4 * 2;
    for (int k = 0; k < 16; ++k) {
        const int quarter = k % 8 / 2, half = k % 2, right = k / 8;
        uint32_t left[2], above[2];
        for (int i = 0; i < 2; ++i) {
            std::memcpy(&left[i], a_and_b.lane[row * 4 + quarter] + 4 * (i + 2 * right), 4);
            std::memcpy(&above[i], a_and_b.lane[(column + i) * 4 + quarter] + 4 * (4 + right), 4);
        }
        for (int i = 0; i < 4; ++i) d[i] += widen(left[i / 2], half) * widen(above[i % 2], half);
    }
}

}  // namespace emulation
