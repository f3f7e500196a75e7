// Columns that lie along K turned into rows of a panel, without leaving the registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "tile.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// A word of any type: floats are moved as they are. A copy, because a cast from uint32_t* to a may_alias type is none.
inline uint32_t word_at(const uint32_t* column, int64_t step) {
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(column) + 4 * step, 4);
    return word;
}

// out[step * kPanelColumns + i] = columns[i][step] for i < kLanes and kLanes steps
inline void transpose_square(const uint32_t* const* columns, int64_t step, uint32_t* out) {
#if defined(__AVX512F__)
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(columns[i] + step);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: steps j, j + 4, j + 8, j + 12 of columns i .. i + 3
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
        const __m512i high = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
        const __m512i high_odd = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
        _mm512_storeu_si512(out + j * kPanelColumns, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(out + (j + 4) * kPanelColumns, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
        _mm512_storeu_si512(out + (j + 8) * kPanelColumns, _mm512_shuffle_i32x4(low, high, 0xdd));
        _mm512_storeu_si512(out + (j + 12) * kPanelColumns, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
    }
#elif defined(__AVX2__)
    __m256i r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns[i] + step));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // r[i + j]: steps j and j + 4 of columns i .. i + 3
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j * kPanelColumns),
                            _mm256_permute2x128_si256(r[j], r[j + 4], 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (j + 4) * kPanelColumns),
                            _mm256_permute2x128_si256(r[j], r[j + 4], 0x31));
    }
#else
    for (int64_t s = 0; s < kLanes; ++s)
        for (int64_t i = 0; i < kLanes; ++i) out[s * kPanelColumns + i] = word_at(columns[i], step + s);
#endif
}

// The same for any number of columns up to kLanes, zeros in the other lanes, and any number of steps.
inline void transpose_columns(const uint32_t* const* columns, int64_t count, int64_t steps, uint32_t* out) {
    int64_t step = 0;
    if (count == kLanes)
        for (; step + kLanes <= steps; step += kLanes) transpose_square(columns, step, out + step * kPanelColumns);
    for (; step < steps; ++step)
        for (int64_t i = 0; i < kLanes; ++i) out[step * kPanelColumns + i] = i < count ? word_at(columns[i], step) : 0;
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
