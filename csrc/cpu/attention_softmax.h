// Whole-row softmax of a block of scores, and its backward. Each pass leaves one vector of partial results per row;
// those of kLanes rows are transposed and meet lane by lane, which costs a row less than to add up its own lanes.
#pragma once

#include "attention_tiles.h"
#include "math.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

// Partial results of kLanes rows.
struct RowLanes {
    float row[kLanes][kLanes] = {};

    // combine(first, other) of the lanes of each row
    template <class T, class Combine>
    void meet(T* results, Combine combine) const {
        const uint32_t* columns[kLanes];
        uint32_t turned[kLanes * kPanelColumns];
        float values[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) columns[r] = reinterpret_cast<const uint32_t*>(row[r]);
        transpose_square(columns, 0, turned);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            std::memcpy(values, turned + lane * kPanelColumns, sizeof values);
#pragma omp simd
            for (int64_t r = 0; r < kLanes; ++r)
                results[r] = lane == 0 ? static_cast<T>(values[r]) : combine(results[r], static_cast<T>(values[r]));
        }
    }
    // In fp64, as exact as can be.
    void sums(double* results) const {
        meet(results, [](double a, double b) { return a + b; });
    }
    void maxima(float* results) const {
        meet(results, [](float a, float b) { return b > a ? b : a; });
    }
};

// lanes[kLanes] = partial sums of term(i) over 0 <= i < width. term must inline: a lambda over raw pointers.
template <class Term>
inline void lane_sums(int64_t width, float* lanes, Term term) {
    float sums[sum_lanes] = {};
    for (int64_t i = 0; i < width; i += sum_lanes) {
#pragma omp simd
        for (int j = 0; j < sum_lanes; ++j) sums[j] += term(i + j);
    }
#pragma omp simd
    for (int j = 0; j < kLanes; ++j)
        lanes[j] = (sums[j] + sums[j + kLanes]) + (sums[j + 2 * kLanes] + sums[j + 3 * kLanes]);
}

inline void lane_maxima(const float* row, int64_t width, float* lanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = row[j];
    for (int64_t i = kLanes; i < width; i += kLanes) {
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) lanes[j] = row[i + j] > lanes[j] ? row[i + j] : lanes[j];
    }
}

// exp_f for x <= 0, where one power of two is enough; at least 2^-126.
inline float exp_of_negative(float x) {
    const Reduced d = reduce_by_ln2(x < -87.3f ? -87.3f : x);
    return (1.0f + (d.r + d.r * d.r * exp_tail(d.r))) * power_of_two(d.n);
}

// Up to kLanes rows of products q k become exp(scale * (product - largest of the row)), tiny behind the last of the
// keys >= 1; inverse = 1 / their sums. scale >= 0 meets differences: neither q nor a score is rounded for its sake.
inline void exponentials(float* scores, int64_t rows, int64_t keys, float scale, float* inverse) {
    const int64_t width = score_width(keys), stride = score_stride(keys);
    // even with a scale of zero, what lies behind the last key counts nothing
    const float factor = scale > 1e-30f ? scale : 1e-30f;
    RowLanes lanes;
    float largest[kLanes];
    double sums[kLanes];
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = keys; i < width; ++i) scores[r * stride + i] = -3.4e38f;
        lane_maxima(scores + r * stride, width, lanes.row[r]);
    }
    lanes.maxima(largest);
    for (int64_t r = 0; r < rows; ++r) {
        float *row = scores + r * stride, maximum = largest[r];
        lane_sums(width, lanes.row[r],
                  [=](int64_t i) { return row[i] = exp_of_negative(factor * (row[i] - maximum)); });
    }
    lanes.sums(sums);
    for (int64_t r = 0; r < rows; ++r) inverse[r] = static_cast<float>(1.0 / sums[r]);
}

// Up to kLanes rows: products q k become weight * P, and dp becomes weight * P * (dP - sum(P * dP)), the sum over a
// row's keys. Returns all rows' sums.
inline double scores_backward(float* scores, float* dp, int64_t rows, int64_t keys, float scale, float weight) {
    const int64_t width = score_width(keys), stride = score_stride(keys);
    RowLanes lanes;
    float inverse[kLanes];
    double sums[kLanes], total = 0;
    exponentials(scores, rows, keys, scale, inverse);
    for (int64_t r = 0; r < rows; ++r) {
        const float *e = scores + r * stride, *d = dp + r * stride;
        lane_sums(width, lanes.row[r], [=](int64_t i) { return e[i] * d[i]; });
    }
    lanes.sums(sums);
    for (int64_t r = 0; r < rows; ++r) {
        const double sum = sums[r] * inverse[r];
        const float mean = static_cast<float>(sum), factor = weight * inverse[r];
        float *p = scores + r * stride, *ds = dp + r * stride;
        total += sum;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            p[i] *= factor;
            ds[i] = p[i] * (ds[i] - mean);
        }
    }
    return total;
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
