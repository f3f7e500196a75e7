// How the norms over a row divide it among the threads of a block.
//
// Eight neighbouring columns belong to a thread. Rows of up to `held_width` columns stay in its registers (`held`); of
// longer ones each thread walks over its columns, and reads them again where it needs them again.
#pragma once

#include "common.cuh"

namespace blip3o_fast {

constexpr int most_row_threads = 512;
constexpr int held_width = most_row_threads * 8;
constexpr int most_width = 16384;

// [B, T, D] of unit last stride; for [B, D] and [D] the other strides are 0.
struct Rows {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t sample = 0, token = 0;

    __device__ int64_t at(int64_t of_sample, int64_t of_token) const { return of_sample * sample + of_token * token; }
};

// An absent tensor has no data.
inline Rows rows_of(const View& view) {
    Rows rows;
    if (!view.present()) return rows;
    rows.data = view.data;
    rows.dtype = view.dtype;
    if (view.rank >= 2) rows.sample = view.stride[0];
    if (view.rank == 3) rows.token = view.stride[1];
    return rows;
}

// What a block does: `rows` tokens of one sample, `chunks` blocks per sample.
struct Shape {
    int64_t batch;
    int tokens, width, rows, chunks;
};

// The tokens of a block, and this thread's columns.
struct Share {
    int64_t sample;
    int first, end;     // tokens
    int column, step;   // its first column, and how far it is to the next ones

    __device__ Share(const Shape& shape, bool held)
        : sample(blockIdx.x / shape.chunks),
          first(static_cast<int>(blockIdx.x % shape.chunks) * shape.rows),
          end(min(first + shape.rows, shape.tokens)),
          column(static_cast<int>(threadIdx.x) * 8),
          step(held ? shape.width : static_cast<int>(blockDim.x) * 8) {}
};

// to = weight * (1 + scale); scale may be absent
__device__ inline void load_factor(float (&to)[8], const Rows& weight, const Rows& scale, int64_t sample, int column,
                                   int count) {
    load_eight(to, weight.data, weight.dtype, column, count);
    if (scale.data == nullptr) return;
    float factor[8];
    load_eight(factor, scale.data, scale.dtype, scale.at(sample, 0) + column, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] *= 1.0f + factor[i];
}

// to = weight * tanh(gate)
__device__ inline void load_gated(float (&to)[8], const Rows& weight, const Rows& gate, int64_t sample, int column,
                                  int count) {
    float factor[8];
    load_eight(to, weight.data, weight.dtype, column, count);
    load_eight(factor, gate.data, gate.dtype, gate.at(sample, 0) + column, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] *= tanhf(factor[i]);
}

inline int row_threads(int width) {
    return width >= held_width ? most_row_threads : (width + 255) / 256 * 32;
}

// x [B, T, D]; `chunks` blocks per sample share its tokens.
inline Shape shape_of(const View& x, int64_t chunks) {
    check_rank(x, 3);
    const int64_t tokens = x.size[1], width = x.size[2], limit = int64_t{1} << 31;
    if (width < 1 || width > most_width) refuse(x, "of 1 to " + std::to_string(most_width) + " columns");
    if (tokens >= limit / 2 || x.size[0] * tokens >= limit) refuse(x, "of fewer tokens");
    if (chunks < (tokens > 0 ? 1 : 0) || chunks > tokens) refuse(x, "of at least one token per block");
    const int64_t rows = chunks > 0 ? (tokens + chunks - 1) / chunks : 0;
    return {x.size[0], static_cast<int>(tokens), static_cast<int>(width), static_cast<int>(rows),
            static_cast<int>(chunks)};
}

// Blocks per sample that keep a GPU busy and yet use what they have read of weight and scale for several tokens.
inline int64_t busy_chunks(const View& x) {
    check_rank(x, 3);
    const int64_t tokens = x.size[1], all = x.size[0] * tokens;
    const int64_t rows = all >= 8192 ? 8 : all >= 4096 ? 4 : all >= 2048 ? 2 : 1;
    return (tokens + rows - 1) / rows;
}

}  // namespace blip3o_fast
