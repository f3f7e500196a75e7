// Tensors of one shape and any strides, walked in blocks that fit a buffer in the nearest cache.
#pragma once

#include <initializer_list>

#include "refuse.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

constexpr int64_t block_floats = 1024;  // a multiple of 4, so that blocks of noise begin with a quadruple

struct Block {
    int64_t row, first, n;  // n elements from `first` on of a row
};

class Blocks {
public:
    // The dimensions from `kept` on are one long row where every tensor is contiguous in them, else the last alone is.
    Blocks(std::initializer_list<const View*> views, int kept) {
        const View& shape = **views.begin();
        merged_ = true;
        for (const View* view : views) merged_ = merged_ && (!view->present() || contiguous_from(*view, kept));
        leading_ = merged_ ? kept : shape.rank - 1;
        for (int i = 0; i < shape.rank; ++i) {
            size_[i] = shape.size[i];
            (i < leading_ ? rows_ : length_) *= shape.size[i];
        }
        per_row_ = (length_ + block_floats - 1) / block_floats;
    }

    int64_t count() const { return rows_ * per_row_; }
    int64_t rows() const { return rows_; }
    int64_t length() const { return length_; }

    Block at(int64_t index) const {
        const int64_t first = index % per_row_ * block_floats;
        return {index / per_row_, first, length_ - first < block_floats ? length_ - first : block_floats};
    }

    // Elements between neighbours of a block, and from the tensor's first to the block's.
    int64_t step(const View& view) const { return merged_ ? 1 : view.last_stride; }

    int64_t offset(const View& view, const Block& block) const {
        int64_t row = block.row, offset = block.first * step(view);
        for (int i = leading_ - 1; i > 0; --i) {
            offset += row % size_[i] * view.stride[i];
            row /= size_[i];
        }
        return leading_ > 0 ? offset + row * view.stride[0] : offset;
    }

    // Of a contiguous tensor.
    int64_t place(const Block& block) const { return block.row * length_ + block.first; }

private:
    static bool contiguous_from(const View& view, int first) {
        int64_t expected = 1;
        for (int i = view.rank - 1; i >= first; --i) {
            if (view.size[i] != 1 && view.stride[i] != expected) return false;
            expected *= view.size[i];
        }
        return true;
    }

    bool merged_;
    int leading_;
    int64_t size_[max_rank] = {}, rows_ = 1, length_ = 1, per_row_;
};

// The same shape as another tensor's, and a floating dtype.
inline void check_like(const View& view, const View& other) {
    const int64_t* n = other.size;
    switch (other.rank) {
        case 0: check_shape(view, {}); break;
        case 1: check_shape(view, {n[0]}); break;
        case 2: check_shape(view, {n[0], n[1]}); break;
        case 3: check_shape(view, {n[0], n[1], n[2]}); break;
        case 4: check_shape(view, {n[0], n[1], n[2], n[3]}); break;
        case 5: check_shape(view, {n[0], n[1], n[2], n[3], n[4]}); break;
        default: check_shape(view, {n[0], n[1], n[2], n[3], n[4], n[5]});
    }
    check_float(view);
}

// A number in memory: fp32 without dimensions.
inline void check_number(const View& view) {
    check_rank(view, 0);
    check_dtype(view, Dtype::f32);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
