// Rows of any dtype and stride, read into fp32 and written with one rounding (to nearest, ties to even; NaN stays NaN).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "view.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace blip3o_fast {
namespace BLIP3O_ISA {

inline float bf16_to_float(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float f16_to_float(uint16_t h) {
    const uint32_t magnitude = (h & 0x7fffu) << 13, sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    float f;
    if (magnitude >= 0x0f800000u) {  // infinity, NaN
        const uint32_t bits = magnitude + 0x70000000u;
        std::memcpy(&f, &bits, 4);
    } else {  // 2^112 restores the exponent, of subnormal numbers too
        std::memcpy(&f, &magnitude, 4);
        f *= 5.192296858534827628530496329220096e33f;
    }
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t float_to_f16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (bits < 0x38800000u) {                         // subnormal: 2^-24 is one unit, which adding 0.5 rounds to
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return sign | static_cast<uint16_t>(bits - 0x3f000000u);
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1u);
    return sign | static_cast<uint16_t>(bits >> 13);
}

inline void f16_row_to_float(const uint16_t* x, float* y, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
    for (; i < n; ++i) y[i] = f16_to_float(x[i]);
}

inline void float_row_to_f16(const float* x, uint16_t* y, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) y[i] = float_to_f16(x[i]);
}

inline float load_element(const View& view, int64_t offset) {
    switch (view.dtype) {
        case Dtype::bf16: return bf16_to_float(view.as<const uint16_t>()[offset]);
        case Dtype::f16: return f16_to_float(view.as<const uint16_t>()[offset]);
        default: return view.as<const float>()[offset];
    }
}

// The n elements from `offset` on, `stride` apart, as floats: where they lie if they are, else in buffer.
inline const float* load_row(const View& view, int64_t offset, int64_t n, int64_t stride, float* buffer) {
    if (stride != 1) {
        for (int64_t i = 0; i < n; ++i) buffer[i] = load_element(view, offset + i * stride);
        return buffer;
    }
    if (view.dtype == Dtype::f32) return view.as<const float>() + offset;
    const uint16_t* x = view.as<const uint16_t>() + offset;
    if (view.dtype == Dtype::f16) {
        f16_row_to_float(x, buffer, n);
        return buffer;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = bf16_to_float(x[i]);
    return buffer;
}

// The n elements from `offset` on along the last dimension.
inline const float* load_row(const View& view, int64_t offset, int64_t n, float* buffer) {
    return load_row(view, offset, n, view.last_stride, buffer);
}

// Where to compute a row that store_row will write: in place if it holds floats, else in buffer.
inline float* row_target(const View& view, int64_t offset, float* buffer) {
    return view.dtype == Dtype::f32 ? view.as<float>() + offset : buffer;
}

// n floats to contiguous elements from `offset` on; nothing to do where they were computed in place.
inline void store_row(const View& view, int64_t offset, int64_t n, const float* row) {
    if (view.dtype == Dtype::f32) {
        float* y = view.as<float>() + offset;
        if (y != row) std::memcpy(y, row, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    uint16_t* y = view.as<uint16_t>() + offset;
    if (view.dtype == Dtype::f16) {
        float_row_to_f16(row, y, n);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = float_to_bf16(row[i]);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
