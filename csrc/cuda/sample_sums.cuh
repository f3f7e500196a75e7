// Adds up the partial sums that the backward of a modulated norm leaves behind, in a fixed order:
//
//     dweight = sum over samples of P_sample * weight_factor      [D]
//     dmod    = P_sample * mod_factor                             [B, D]
//
// where P_sample is the sum of the sample's rows of `partial` [B, chunks, D], and
//
//     scale:  weight_factor = 1 + mod        mod_factor = weight
//     gate:   weight_factor = tanh(mod)      mod_factor = weight * (1 - tanh(mod)^2)
//     none:   weight_factor = 1              there is no mod
#pragma once

#include "rows.cuh"

namespace blip3o_fast {

enum class Modulation : int { scale, gate, none };

struct SampleSums {
    const float* partial = nullptr;  // absent: nothing is to be added up
    Modulation kind = Modulation::none;
    Rows mod, weight, dmod, dweight;
};

inline SampleSums sums_of(const View& partial, Modulation kind, const View& mod, const View& weight, const View& dmod,
                          const View& dweight) {
    SampleSums sums;
    sums.partial = partial.as<const float>();
    sums.kind = kind;
    sums.mod = rows_of(mod);
    sums.weight = rows_of(weight);
    if (kind != Modulation::none) sums.dmod = rows_of(dmod);
    sums.dweight = rows_of(dweight);
    return sums;
}

// One launch for both; the second may be {}.
void launch_sample_sums(const Launcher& launcher, const Shape& shape, const SampleSums& first,
                        const SampleSums& second);

}  // namespace blip3o_fast
