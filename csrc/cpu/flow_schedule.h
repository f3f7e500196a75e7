// The probability path's coefficients, as blip3o_fast/ops/_flow_schedule.py writes them down; in fp64.
#pragma once

#include <cmath>

#include "refuse.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

struct Schedule {
    double sigma_min, sigma_max;
    bool cosine;
};

// x_sigma = alpha * data + scale * noise, and the path's velocity is d_alpha * data + d_scale * noise.
struct Path {
    double alpha, scale, d_alpha, d_scale;
};

inline Path path_at(float sigma, const Schedule& schedule) {
    constexpr double pi = 3.14159265358979323846;
    const double level = sigma, span = schedule.sigma_max - schedule.sigma_min;
    if (!schedule.cosine) return {1.0 - level, schedule.sigma_min + span * level, -1.0, span};
    const double turn = pi * level, half_turn = pi / 2.0 * level;
    return {(1.0 + std::cos(turn)) / 2.0, schedule.sigma_min + span * std::sin(half_turn), -pi / 2.0 * std::sin(turn),
            span * pi / 2.0 * std::cos(half_turn)};
}

// sigma: fp32 [B]
inline void check_sigma(const View& sigma, int64_t batch) {
    check_shape(sigma, {batch});
    check_dtype(sigma, Dtype::f32);
}

// seed: int64 [2] = (seed, offset), given where noise is not.
inline void check_seed(const View& seed, const View& noise) {
    if (seed.present() == noise.present()) refuse_tensor(seed, "given where noise is not, and absent where it is");
    if (!seed.present()) return;
    check_shape(seed, {2});
    check_dtype(seed, Dtype::i64);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
