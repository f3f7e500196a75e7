// An operand of a product, [free, K] or [K, free], as the words that an arithmetic of tile.h multiplies.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"
#include "tile.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// free: the index that is not summed over. A step along K is one word: a float, or two bf16.
struct Operand {
    const View& view;
    int64_t free, depth, free_stride, depth_stride;
    bool pairs;

    int64_t steps() const { return pairs ? (depth + 1) / 2 : depth; }
    // K or the free index is the one that lies closer together.
    bool depth_is_contiguous() const { return depth_stride == 1 || (free_stride != 1 && depth_stride < free_stride); }

    // Words of one free index along K: where they lie if they are words there, else in buffer.
    const uint32_t* along(int64_t index, int64_t step, int64_t steps, uint32_t* buffer) const {
        const int64_t offset = index * free_stride;
        if (!pairs)
            return reinterpret_cast<const uint32_t*>(load_row(view, offset + step * depth_stride, steps, depth_stride,
                                                              reinterpret_cast<float*>(buffer)));
        const int64_t k = 2 * step, halves = depth - k < 2 * steps ? depth - k : 2 * steps;
        const uint16_t* source = view.as<const uint16_t>() + offset + k * depth_stride;
        auto* target = reinterpret_cast<uint16_t*>(buffer);
        if (depth_stride == 1) {
            if (halves == 2 * steps && reinterpret_cast<uintptr_t>(source) % 4 == 0)
                return reinterpret_cast<const uint32_t*>(source);
            std::memcpy(target, source, static_cast<size_t>(halves) * 2);
        } else {
            for (int64_t i = 0; i < halves; ++i) target[i] = source[i * depth_stride];
        }
        if (halves < 2 * steps) target[halves] = 0;
        return buffer;
    }

    // Words of one step, of `count` free indices from `index` on.
    const uint32_t* across(int64_t step, int64_t index, int64_t count, uint32_t* buffer) const {
        const int64_t offset = index * free_stride;
        if (!pairs)
            return reinterpret_cast<const uint32_t*>(load_row(view, offset + step * depth_stride, count, free_stride,
                                                              reinterpret_cast<float*>(buffer)));
        const uint16_t* first = view.as<const uint16_t>() + offset + 2 * step * depth_stride;
        const bool has_second = 2 * step + 1 < depth;
        const uint16_t* second = has_second ? first + depth_stride : first;
        const uint32_t mask = has_second ? 0xffffu : 0;
        if (free_stride == 1) {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) buffer[i] = first[i] | (second[i] & mask) << 16;
        } else {
            for (int64_t i = 0; i < count; ++i)
                buffer[i] = first[i * free_stride] | (second[i * free_stride] & mask) << 16;
        }
        return buffer;
    }

    // Asks for part `part` of `parts` of what steps [step, step + steps) of `count` free indices lie in.
    void prefetch(int64_t index, int64_t count, int64_t step, int64_t steps, int64_t part, int64_t parts) const {
        const bool runs_along = depth_is_contiguous();
        if ((runs_along ? depth_stride : free_stride) != 1) return;  // every element has a line of its own
        const int64_t depth_step = pairs ? 2 : 1, size = item_size(view.dtype);
        const int64_t runs = runs_along ? count : steps * depth_step;
        const int64_t run_bytes = (runs_along ? steps * depth_step : count) * size;
        const int64_t run_stride = (runs_along ? free_stride : depth_stride) * size;
        const char* first = view.at(index * free_stride + step * depth_step * depth_stride);
        for (int64_t run = runs * part / parts; run < runs * (part + 1) / parts; ++run)
            for (int64_t byte = 0; byte < run_bytes; byte += 64)
                __builtin_prefetch(first + run * run_stride + byte, 0, 2);
    }
};

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
