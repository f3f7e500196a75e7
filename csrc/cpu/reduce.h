// Sums over a row. Each of many lanes adds every lanes-th term in fp32, and the lanes meet in fp64, pairwise: as exact as a
// sum in fp64 for the widths of a network, in four vector registers.
#pragma once

#include <cstdint>

namespace blip3o_fast {
namespace BLIP3O_ISA {

constexpr int sum_lanes = BLIP3O_VECTOR_BYTES;  // floats of four vectors

template <int count>
struct LanesOf {
    float value[count];

    double sum() const {
        double total[count];
        for (int j = 0; j < count; ++j) total[j] = value[j];
        for (int width = count / 2; width > 0; width /= 2)
            for (int j = 0; j < width; ++j) total[j] += total[j + width];
        return total[0];
    }
};

using Lanes = LanesOf<sum_lanes>;

// The sum of term(i) over 0 <= i < n. term must inline: a lambda over raw pointers.
template <class Term>
inline double sum_over_row(int64_t n, Term term) {
    Lanes lanes = {};
    int64_t i = 0;
    for (; i + sum_lanes <= n; i += sum_lanes) {
#pragma omp simd
        for (int j = 0; j < sum_lanes; ++j) lanes.value[j] += term(i + j);
    }
    for (int j = 0; i < n; ++i, ++j) lanes.value[j] += term(i);
    return lanes.sum();
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
