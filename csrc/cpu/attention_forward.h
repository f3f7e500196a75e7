// The forward of one attention, a block of query rows at a time.
#pragma once

#include "attention_softmax.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// The visible keys and values of one head, and what a block of its queries attends to.
class Attention {
public:
    Attention(Pieces& pieces, int64_t tokens, int64_t dim, int64_t rows)
        : tokens_(tokens),
          dim_(dim),
          width_(whole_panels(dim)),
          keys_(pieces.take(score_width(tokens) * dim)),
          values_(pieces.take(tokens * width_)),
          q_(pieces.take(rows * width_)),
          scores_(pieces.take(rows * score_stride(tokens))),
          result_(pieces.take(rows * width_)),
          inverse_(pieces.take(rows)),
          buffer_(pieces.take(kLanes * dim)),
          visible_(pieces, tokens) {}

    void load(const HeadRows& keys, const HeadRows& values, const View& mask, int64_t sample) {
        visible_.find(mask, sample, tokens_);
        load_transposed(keys, visible_, dim_, keys_, buffer_);
        load_rows(values, visible_, dim_, values_);
    }

    // Query rows first .. first + rows - 1: softmax(q k^T * scale) v, zero without keys.
    void attend(const HeadRows& queries, int64_t first, int64_t rows, float scale) {
        const int64_t count = visible_.count(), stride = score_stride(count);
        load_rows(queries, first, rows, dim_, sign_of(scale), q_);
        if (count > 0)
            product(rows, dim_, score_width(count), q_, width_, 1, transposed_panels(keys_, dim_), scores_, stride,
                    false);
        for (int64_t r = 0; r < rows && count > 0; r += kLanes)
            exponentials(scores_ + r * stride, smaller(kLanes, rows - r), count, std::fabs(scale), inverse_ + r);
        if (count == 0) std::memset(inverse_, 0, static_cast<size_t>(rows) * sizeof(float));
        product(rows, count, width_, scores_, stride, 1, row_panels(values_, dim_), result_, width_, false);
    }

    // The r-th of these rows is inverse(r) * row(r).
    float* row(int64_t r) const { return result_ + r * width_; }
    float inverse(int64_t r) const { return inverse_[r]; }

private:
    int64_t tokens_, dim_, width_;
    float *keys_, *values_, *q_, *scores_, *result_, *inverse_, *buffer_;
    Visible visible_;
};

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
