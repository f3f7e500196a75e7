// Attention of any lengths and dtypes in fp32 arithmetic: a block owns 16 rows and walks over 16 others at a time.
//
// Eight neighbouring threads share an owned row: two of the 16 scores each, and then every eighth four of the row's
// head_dim numbers. What they hand to each other stays within their warp.
#pragma once

#include "dual_attention_args.cuh"

namespace blip3o_fast {

constexpr int any_rows = 16;
constexpr int any_threads = 128;
constexpr int any_head_dim = 128;
constexpr int any_fours = any_head_dim / 4;
constexpr int own_fours = any_fours / 8;

// Four more than a row has, so that neighbouring rows start in different banks.
using Rows = float4[any_rows][any_fours + 1];
using Weights = float4[any_rows][any_rows / 4 + 1];

// The thread's share of an owned row's head_dim numbers.
using RowShare = float4[own_fours];

__device__ inline int own_row() { return threadIdx.x / 8; }
__device__ inline int own_column() { return threadIdx.x % 8; }

// One of the two attentions of a sample and query head.
struct AnySide {
    HeadsTensor queries, keys, values;
    int query_head, key_head, value_head;
    const uint8_t* mask;
    int64_t mask_token;
    int length;  // keys
    float score, slope;

    __device__ bool sees(int key) const { return key < length && (mask == nullptr || mask[key * mask_token] != 0); }
};

__device__ inline AnySide any_side(const DualAttentionArgs& args, bool cross, int sample, int head) {
    const int key_head = head / args.group();
    if (cross)
        return {args.qkq, args.k2, args.v2, args.heads + args.key_heads + head, key_head, key_head,
                args.mask_of(sample), args.mask_token, args.context, args.scale2 * log2e, args.slope2};
    return {args.qkq, args.qkq, args.v1, head, args.heads + key_head, key_head,
            nullptr, 0, args.tokens, args.scale1 * log2e, args.slope1};
}

// Rows first.. of one head as fp32; zero beyond `rows` and, up to a multiple of four, beyond head_dim.
__device__ inline void load_rows(Rows& tile, const HeadsTensor& x, int sample, int head, int first, int rows,
                                 int head_dim) {
    const int row = first + own_row();
    const int64_t at = x.at(sample, head) + row * x.token;
#pragma unroll
    for (int j = 0; j < own_fours; ++j) {
        const int four = own_column() + 8 * j, rest = head_dim - four * 4;
        if (rest > 0) tile[own_row()][four] = load_four(x.data, x.dtype, at + four * 4, row < rows ? rest : 0);
    }
}

__device__ inline void store_row(const HeadsTensor& x, int sample, int head, int row, const RowShare& share,
                                 float factor, int head_dim) {
    const int64_t at = x.at(sample, head) + row * x.token;
#pragma unroll
    for (int j = 0; j < own_fours; ++j) {
        const int column = (own_column() + 8 * j) * 4;
        const float4 s = share[j];
        if (column < head_dim)
            store_four(x.data, x.dtype, at + column, {s.x * factor, s.y * factor, s.z * factor, s.w * factor},
                       head_dim - column);
    }
}

// Products of the owned row with rows own_column() and own_column() + 8 of the others.
__device__ inline void dot_rows(float (&result)[2], const Rows& own, const Rows& others, int head_dim) {
    float4 sums[2] = {};
    for (int four = 0; four * 4 < head_dim; ++four) {
        const float4 a = own[own_row()][four];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 b = others[own_column() + 8 * i][four];
            sums[i].x += a.x * b.x;
            sums[i].y += a.y * b.y;
            sums[i].z += a.z * b.z;
            sums[i].w += a.w * b.w;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) result[i] = (sums[i].x + sums[i].y) + (sums[i].z + sums[i].w);
}

// share += sum over the others of weight * other, with the weights that the eight threads of the row have computed.
__device__ inline void add_rows(RowShare& share, Weights& weights, const float (&own)[2], const Rows& others,
                                int head_dim) {
    auto* row = reinterpret_cast<float*>(weights[own_row()]);
    __syncwarp();  // the row's last weights have been read
    row[own_column()] = own[0];
    row[own_column() + 8] = own[1];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < own_fours; ++j) {
        const int four = own_column() + 8 * j;
        if (four * 4 >= head_dim) continue;
        // added apart: a long sum that takes up every product loses low bits each time
        float4 part = {0.0f, 0.0f, 0.0f, 0.0f};
        const auto add = [&](float weight, int other) {
            const float4 x = others[other][four];
            part.x += weight * x.x;
            part.y += weight * x.y;
            part.z += weight * x.z;
            part.w += weight * x.w;
        };
#pragma unroll
        for (int i = 0; i < any_rows / 4; ++i) {
            const float4 weight = weights[own_row()][i];
            add(weight.x, 4 * i);
            add(weight.y, 4 * i + 1);
            add(weight.z, 4 * i + 2);
            add(weight.w, 4 * i + 3);
        }
        share[j].x += part.x;
        share[j].y += part.y;
        share[j].z += part.z;
        share[j].w += part.w;
    }
}

__device__ inline void scale_share(RowShare& share, float factor) {
#pragma unroll
    for (int j = 0; j < own_fours; ++j) {
        share[j].x *= factor;
        share[j].y *= factor;
        share[j].z *= factor;
        share[j].w *= factor;
    }
}

// Sum and maximum over the eight threads of a row.
__device__ inline float own_row_sum(float x) {
    for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(whole_warp, x, step);
    return x;
}

__device__ inline float own_row_max(float x) {
    for (int step = 1; step < 8; step *= 2) x = fmaxf(x, __shfl_xor_sync(whole_warp, x, step));
    return x;
}

// The softmax of a row whose scores come 16 at a time.
struct OnlineSoftmax {
    float largest = -INFINITY, total = 0.0f;

    __device__ float base() const { return largest == -INFINITY ? 0.0f : largest; }
    // a row that has seen something has exp2(0) in its sum
    __device__ float inverse() const { return 1.0f / fmaxf(total, 1.0f); }

    // From two scores to exp2(score - maximum); returns the factor for all that was summed up with the last maximum.
    __device__ float take(float (&scores)[2]) {
        const float before = largest;
        largest = fmaxf(before, own_row_max(fmaxf(scores[0], scores[1])));
        const float shrink = exp2f(before - base());
#pragma unroll
        for (int i = 0; i < 2; ++i) scores[i] = exp2f(scores[i] - base());
        total = total * shrink + own_row_sum(scores[0] + scores[1]);
        return shrink;
    }
};

// Scores of the owned query with keys first + own_column() and first + own_column() + 8; -inf where unseen.
__device__ inline void scores_of(float (&scores)[2], const AnySide& side, const Rows& q, const Rows& k, int first,
                                 int head_dim) {
    dot_rows(scores, q, k, head_dim);
#pragma unroll
    for (int i = 0; i < 2; ++i)
        scores[i] = side.sees(first + own_column() + 8 * i) ? scores[i] * side.score : -INFINITY;
}

}  // namespace blip3o_fast
