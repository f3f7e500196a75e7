// Rotary embedding of neighbouring pairs: a pair (a, b) turns into (a cos - b sin, a sin + b cos).
#pragma once

#include "vectors.h"
#include "view.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// One token's angles, spread so that y = z * cos + (z with neighbours swapped) * sin; sin has the sign of its place.
// The opposite turn is z * cos - (swapped z) * sin.
struct Turn {
    float* cos;  // head_dim floats each
    float* sin;

    void load(const View& rope, int64_t token) const {
        const float* row = rope.as<const float>() + token * rope.stride[0];
        const int64_t pair = rope.stride[1], imaginary = rope.stride[2];
        for (int64_t i = 0; i < rope.size[1]; ++i) {
            const float c = row[i * pair], s = row[i * pair + imaginary];
            cos[2 * i] = cos[2 * i + 1] = c;
            sin[2 * i] = -s;
            sin[2 * i + 1] = s;
        }
    }
};

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
