// What the attention kernels share: rows of heads as operands of fp32 products. Queries are taken a block of rows at a
// time, and only a block's scores exist at any time.
#pragma once

#include "reduce.h"
#include "rows.h"
#include "tile.h"
#include "transpose.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

constexpr int64_t kBlockRows = 64;
// Steps along the inner dimension that one chain of additions takes: bounds its rounding, and 128 rows of a panel fit
// L1.
constexpr int64_t kChain = 128;
static_assert(sum_lanes % kPanelColumns == 0, "rows of scores are whole panels and whole groups of lanes");

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t whole_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }
inline int64_t score_width(int64_t keys) { return (keys + sum_lanes - 1) / sum_lanes * sum_lanes; }
// One cache line more than the width: columns of a power of two would meet in a few sets of the L1 cache.
inline int64_t score_stride(int64_t keys) { return score_width(keys) + 16; }

// Query rows of a block: what 2^17 scores (of the 1 MiB that L2 holds, a half) allow.
inline int64_t block_rows(int64_t rows, int64_t keys) {
    const int64_t fitting = (int64_t{1} << 17) / score_stride(keys);
    return smaller(smaller(rows, kBlockRows), fitting < kTileRows ? kTileRows : fitting);
}

// Hands out pieces of a thread's scratch; without a base it only counts, so that one function measures and divides.
class Pieces {
public:
    explicit Pieces(float* base = nullptr) : base_(base) {}
    float* take(int64_t floats) {
        const int64_t first = used_;
        used_ += (floats + 15) / 16 * 16;
        return base_ ? base_ + first : nullptr;
    }
    int64_t used() const { return used_; }

private:
    float* base_;
    int64_t used_ = 0;
};

// ---- operands -------------------------------------------------------------------------------------------------------

// The rows of one head of one sample: row t begins at first + t * stride, in elements.
struct HeadRows {
    const View* view;
    int64_t first, stride;
    int64_t at(int64_t t) const { return first + t * stride; }
};

// Head `head` of sample b of [B, T, heads, d].
inline HeadRows head_rows(const View& view, int64_t b, int64_t head) {
    return {&view, b * view.stride[0] + head * view.stride[2], view.stride[1]};
}

// mask: bool [B, tokens] or absent
inline void check_mask(const View& mask, int64_t batch, int64_t tokens) {
    if (!mask.present()) return;
    check_shape(mask, {batch, tokens});
    check_dtype(mask, Dtype::u8);
}

// The tokens that a sample's mask shows, in order, or all. What is hidden is left out of every product.
class Visible {
public:
    Visible(Pieces& pieces, int64_t tokens) : found_(reinterpret_cast<int32_t*>(pieces.take(tokens))) {}

    void find(const View& mask, int64_t sample, int64_t tokens) {
        all_ = !mask.present();
        count_ = all_ ? tokens : 0;
        if (all_) return;
        const uint8_t* shown = mask.as<const uint8_t>() + sample * mask.stride[0];
        for (int64_t t = 0; t < tokens; ++t)
            if (shown[t * mask.last_stride]) found_[count_++] = static_cast<int32_t>(t);
    }
    int64_t count() const { return count_; }
    int64_t token(int64_t i) const { return all_ ? i : found_[i]; }

private:
    int32_t* found_;
    int64_t count_ = 0;
    bool all_ = true;
};

// Queries are negated where the scale is negative, so that the largest product is the largest score.
inline float sign_of(float scale) { return scale < 0 ? -1.0f : 1.0f; }

// The right operand of a product: panels of kPanelColumns columns.
struct Panels {
    const float* data;
    int64_t step_stride, panel_stride;
};

inline Panels transposed_panels(const float* data, int64_t dim) { return {data, kPanelColumns, dim * kPanelColumns}; }
inline Panels row_panels(const float* data, int64_t dim) { return {data, whole_panels(dim), kPanelColumns}; }

// factor * row as fp32, zeros behind it up to whole_panels(dim)
inline void load_padded(const HeadRows& rows, int64_t t, int64_t dim, float factor, float* out) {
    const float* row = load_row(*rows.view, rows.at(t), dim, out);
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) out[c] = factor * row[c];
    for (int64_t c = dim; c < whole_panels(dim); ++c) out[c] = 0;
}

inline void load_rows(const HeadRows& rows, int64_t first, int64_t count, int64_t dim, float factor, float* out) {
    for (int64_t i = 0; i < count; ++i) load_padded(rows, first + i, dim, factor, out + i * whole_panels(dim));
}

inline void load_rows(const HeadRows& rows, const Visible& visible, int64_t dim, float* out) {
    for (int64_t i = 0; i < visible.count(); ++i)
        load_padded(rows, visible.token(i), dim, 1.0f, out + i * whole_panels(dim));
}

// factor * row to the place of row t; row is scratch.
inline void store_scaled(const HeadRows& target, int64_t t, int64_t dim, float factor, float* row) {
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) row[c] *= factor;
    store_row(*target.view, target.at(t), dim, row);
}

// The rows as columns of panels, zeros behind the last, up to score_width. buffer: kLanes rows.
inline void load_transposed(const HeadRows& rows, const Visible& visible, int64_t dim, float* out, float* buffer) {
    for (int64_t first = 0; first < score_width(visible.count()); first += kLanes) {
        const int64_t left = visible.count() - first, count = left < 0 ? 0 : smaller(left, kLanes);
        const uint32_t* columns[kLanes];
        for (int64_t i = 0; i < count; ++i) {
            const float* row = load_row(*rows.view, rows.at(visible.token(first + i)), dim, buffer + i * dim);
            columns[i] = reinterpret_cast<const uint32_t*>(row);
        }
        float* panel = out + first / kPanelColumns * dim * kPanelColumns + first % kPanelColumns;
        transpose_columns(columns, count, dim, reinterpret_cast<uint32_t*>(panel));
    }
}

// c[rows, columns] (+)= a b over `steps`; whole panels are written. No steps write zeros.
inline void product(int64_t rows, int64_t steps, int64_t columns, const float* a, int64_t row_stride,
                    int64_t column_stride, Panels b, float* c, int64_t c_stride, bool accumulate) {
    for (int64_t panel = 0; panel * kPanelColumns < columns; ++panel) {
        int64_t step = 0;
        do {
            const TileRows<float> left{a + step * column_stride, row_stride, column_stride, kTileRows * row_stride};
            const float* right = b.data + panel * b.panel_stride + step * b.step_stride;
            tiles<Fp32>(rows, smaller(kChain, steps - step), left, right, b.step_stride, c + panel * kPanelColumns,
                        c_stride, accumulate || step > 0, Prefetch{reinterpret_cast<const char*>(right), 0});
            step += kChain;
        } while (step < steps);
    }
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
