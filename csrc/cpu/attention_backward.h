// The backward of one attention, a block of query rows at a time. Its formulas stand in
// blip3o_fast/ops/flash_attention.py.
#pragma once

#include "attention_softmax.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// The visible keys and values of one head and their gradients, summed over the queries of all heads that read it.
class AttentionGradient {
public:
    AttentionGradient(Pieces& pieces, int64_t tokens, int64_t dim, int64_t rows)
        : dim_(dim),
          width_(whole_panels(dim)),
          rows_(rows),
          keys_(pieces.take(tokens * width_)),
          dkeys_(pieces.take(tokens * width_)),
          dvalues_(pieces.take(tokens * width_)),
          keys_across_(pieces.take(score_width(tokens) * dim)),
          values_across_(pieces.take(score_width(tokens) * dim)),
          q_(pieces.take(rows * width_)),
          dout_(pieces.take(rows * width_)),
          dq_(pieces.take(rows * width_)),
          p_(pieces.take(rows * score_stride(tokens))),
          ds_(pieces.take(rows * score_stride(tokens))),
          buffer_(pieces.take(kLanes * dim)),
          visible_(pieces, tokens) {}

    void load(const HeadRows& keys, const HeadRows& values, const View& mask, int64_t sample, int64_t tokens) {
        tokens_ = tokens;
        visible_.find(mask, sample, tokens);
        load_rows(keys, visible_, dim_, keys_);
        load_transposed(keys, visible_, dim_, keys_across_, buffer_);
        load_transposed(values, visible_, dim_, values_across_, buffer_);
        const size_t bytes = static_cast<size_t>(visible_.count() * width_) * sizeof(float);
        std::memset(dkeys_, 0, bytes);
        std::memset(dvalues_, 0, bytes);
    }

    // All query rows of one head, whose output was added up with this weight: stores dq and takes them into the
    // gradients. Returns sum(P * dP) without the weight, which is the weight's gradient.
    double add(const HeadRows& q, const HeadRows& dout, int64_t queries, float scale, float weight,
               const HeadRows& dq) {
        double sum = 0;
        for (int64_t first = 0; first < queries; first += rows_) {
            const int64_t rows = smaller(rows_, queries - first);
            load_rows(q, first, rows, dim_, sign_of(scale), q_);
            load_rows(dout, first, rows, dim_, 1.0f, dout_);
            sum += add_block(rows, std::fabs(scale), weight);
            for (int64_t r = 0; r < rows; ++r) store_scaled(dq, first + r, dim_, scale, dq_ + r * width_);
        }
        return sum;
    }

    // Zero for the tokens that the mask hides. scale: the one of all rows that were added.
    void store(float scale, const HeadRows& dkeys, const HeadRows& dvalues) {
        std::memset(buffer_, 0, static_cast<size_t>(dim_) * sizeof(float));
        for (int64_t t = 0, i = 0; t < tokens_; ++t) {
            const bool shown = i < visible_.count() && visible_.token(i) == t;
            store_scaled(dkeys, t, dim_, std::fabs(scale), shown ? dkeys_ + i * width_ : buffer_);
            store_row(*dvalues.view, dvalues.at(t), dim_, shown ? dvalues_ + i * width_ : buffer_);
            i += shown;
        }
    }

private:
    // scale >= 0. Leaves dq_ without the scale, and dkeys_ with no more of it than the sign that q_ has.
    double add_block(int64_t rows, float scale, float weight) {
        const int64_t count = visible_.count(), across = score_width(count), stride = score_stride(count);
        double sum = 0;
        if (count > 0) {
            product(rows, dim_, across, q_, width_, 1, transposed_panels(keys_across_, dim_), p_, stride, false);
            product(rows, dim_, across, dout_, width_, 1, transposed_panels(values_across_, dim_), ds_, stride, false);
            for (int64_t r = 0; r < rows; r += kLanes) {
                float *p = p_ + r * stride, *ds = ds_ + r * stride;
                sum += scores_backward(p, ds, smaller(kLanes, rows - r), count, scale, weight);
            }
        }
        product(rows, count, width_, ds_, stride, 1, row_panels(keys_, dim_), dq_, width_, false);
        product(count, rows, width_, ds_, 1, stride, row_panels(q_, dim_), dkeys_, width_, true);
        product(count, rows, width_, p_, 1, stride, row_panels(dout_, dim_), dvalues_, width_, true);
        return sum;
    }

    int64_t dim_, width_, rows_, tokens_ = 0;
    float *keys_, *dkeys_, *dvalues_, *keys_across_, *values_across_, *q_, *dout_, *dq_, *p_, *ds_, *buffer_;
    Visible visible_;
};

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
