// A vector register of the instruction set as a C++ type, by the extension that GCC and Clang share.
#pragma once

#include <cstdint>

namespace blip3o_fast {
namespace BLIP3O_ISA {

typedef float FloatVector __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef uint32_t WordVector __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef uint64_t LongVector __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
// The same in memory, where nothing promises alignment or the element type.
typedef float FloatVectorInMemory __attribute__((vector_size(BLIP3O_VECTOR_BYTES), aligned(4), may_alias));

constexpr int64_t vector_floats = BLIP3O_VECTOR_BYTES / 4;

inline FloatVector load_vector(const float* p) { return *reinterpret_cast<const FloatVectorInMemory*>(p); }
inline void store_vector(float* p, FloatVector v) { *reinterpret_cast<FloatVectorInMemory*>(p) = v; }

inline FloatVector broadcast(float x) { return x - FloatVector{}; }  // x - 0 is x, -0 too

// (b, a) of every pair (a, b) of neighbours: half a turn of each 64 bits.
inline FloatVector swap_neighbours(FloatVector v) {
    const LongVector pairs = (LongVector)v;
    return (FloatVector)(pairs << 32 | pairs >> 32);
}

inline float sum_of(FloatVector v) {
    float lanes[vector_floats];
    store_vector(lanes, v);
    for (int64_t width = vector_floats / 2; width > 0; width /= 2)
        for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    return lanes[0];
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
