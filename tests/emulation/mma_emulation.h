// The functions of csrc/cuda/mma.cuh without their instructions; the fragments are described there.
#pragma once

#include <cstdint>
#include <cstring>

namespace blip3o_fast {

template <Dtype T>
inline uint32_t pack(float low, float high) {
    const auto round = T == Dtype::bf16 ? emulation::float_to_bf16 : emulation::float_to_f16;
    return uint32_t{round(low)} | uint32_t{round(high)} << 16;
}

template <Dtype T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t given[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto& slots = emulation::exchange(emulation::Collective::multiply, 0xffffffffu, given, sizeof given);
    emulation::multiply_fragments(d, slots, T == Dtype::bf16);
}

namespace emulated {

inline const uint16_t* row_of_lane(const emulation::Slots& slots, int lane) {
    const auto* row = emulation::of_lane<const uint16_t*>(slots, lane);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("a misaligned row of a matrix");
    return row;
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], const void* row) {
    const auto& slots = emulation::exchange(emulation::Collective::matrices, 0xffffffffu, &row, sizeof row);
    const int lane = emulation::lane();
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint16_t* numbers = emulated::row_of_lane(slots, matrix * 8 + lane / 4) + lane % 4 * 2;
        r[matrix] = uint32_t{numbers[0]} | uint32_t{numbers[1]} << 16;
    }
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    const auto& slots = emulation::exchange(emulation::Collective::matrices, 0xffffffffu, &row, sizeof row);
    const int lane = emulation::lane(), column = lane / 4, first = lane % 4 * 2;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint16_t low = emulated::row_of_lane(slots, matrix * 8 + first)[column];
        const uint16_t high = emulated::row_of_lane(slots, matrix * 8 + first + 1)[column];
        r[matrix] = uint32_t{low} | uint32_t{high} << 16;
    }
}

inline void copy_16_bytes(void* shared, const void* global) { emulation::copy_later(shared, global); }

inline void commit_copies() { emulation::commit_copies(); }

template <int pending>
inline void wait_for_copies() {
    emulation::wait_for_copies(pending);
}

}  // namespace blip3o_fast
