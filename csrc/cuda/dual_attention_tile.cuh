// Tiles of 64 x 64 half-precision numbers in shared memory, and their products by four warps of 16 rows each.
//
// A row is eight chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8), so that the eight rows of a matrix
// that `load_matrices` reads, and the chunks of one row, lie in different banks.
#pragma once

#include "mma.cuh"

namespace blip3o_fast {

constexpr int tile_size = 64;
constexpr int tile_threads = 128;
constexpr int tile_chunks = tile_size * tile_size / 8;

// 64 columns of a warp's 16 rows, as eight fragments side by side.
using Accumulator = float[8][4];
// The same as the left operand of a product: rounded, four fragments of 16 columns.
using Operand = uint32_t[4][4];

__device__ inline int lane_of_thread() { return threadIdx.x % 32; }
__device__ inline int first_row_of_warp() { return threadIdx.x / 32 * 16; }

__device__ inline int chunk_at(int row, int chunk) { return row * 8 + (chunk ^ (row & 7)); }

// Starts the copy of 64 rows that are `stride` numbers apart.
__device__ inline void fetch_tile(uint4* tile, const uint16_t* from, int64_t stride) {
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8, step = tile_threads / 8;
    tile += chunk_at(row, chunk);
    from += row * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < tile_size / step; ++i) copy_16_bytes(tile + i * step * 8, from + i * step * stride);
}

// The warp's own rows of a tile, 16 columns of them, as a left operand.
__device__ inline void load_left(uint32_t (&a)[4], const uint4* tile, int columns) {
    const int lane = lane_of_thread();
    load_matrices(a, tile + chunk_at(first_row_of_warp() + lane % 16, 2 * columns + lane / 16));
}

// The same of the transposed tile: the warp's own 16 columns, 16 rows of them.
__device__ inline void load_left_transposed(uint32_t (&a)[4], const uint4* tile, int rows) {
    const int lane = lane_of_thread(), matrix = lane / 8;
    const int row = 16 * rows + lane % 8 + matrix / 2 * 8;
    load_matrices_transposed(a, tile + chunk_at(row, first_row_of_warp() / 8 + matrix % 2));
}

// d += a * tile, 16 of the tile's rows
template <Dtype T>
__device__ inline void add_product(Accumulator& d, const uint32_t (&a)[4], const uint4* tile, int rows) {
    const int lane = lane_of_thread();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        uint32_t b[4];
        load_matrices_transposed(b, tile + chunk_at(16 * rows + lane % 16, 2 * pair + lane / 16));
        mma<T>(d[2 * pair], a, b[0], b[1]);
        mma<T>(d[2 * pair + 1], a, b[2], b[3]);
    }
}

// d += a * transposed tile, 16 of the tile's columns
template <Dtype T>
__device__ inline void add_product_transposed(Accumulator& d, const uint32_t (&a)[4], const uint4* tile, int columns) {
    const int lane = lane_of_thread();
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        uint32_t b[4];
        load_matrices(b, tile + chunk_at(16 * pair + lane % 8 + lane / 16 * 8, 2 * columns + lane / 8 % 2));
        mma<T>(d[2 * pair], a, b[0], b[1]);
        mma<T>(d[2 * pair + 1], a, b[2], b[3]);
    }
}

// The warp's rows of left * transposed right.
template <Dtype T>
__device__ inline void multiply_transposed(Accumulator& d, const uint4* left, const uint4* right) {
#pragma unroll
    for (int columns = 0; columns < 4; ++columns) {
        uint32_t a[4];
        load_left(a, left, columns);
        add_product_transposed<T>(d, a, right, columns);
    }
}

// d += left * right, the warp's rows given
template <Dtype T>
__device__ inline void multiply(Accumulator& d, const Operand& left, const uint4* right) {
#pragma unroll
    for (int rows = 0; rows < 4; ++rows) add_product<T>(d, left[rows], right, rows);
}

// d += transposed left * right, the warp's 16 columns of left
template <Dtype T>
__device__ inline void multiply_left_transposed(Accumulator& d, const uint4* left, const uint4* right) {
#pragma unroll
    for (int rows = 0; rows < 4; ++rows) {
        uint32_t a[4];
        load_left_transposed(a, left, rows);
        add_product<T>(d, a, right, rows);
    }
}

// The products' results, times a factor, as the left operand of the next product.
template <Dtype T>
__device__ inline void round_to_operand(Operand& a, const Accumulator& d, float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float(&from)[4] = d[2 * i + half];
            a[i][2 * half] = pack<T>(from[0] * factor, from[1] * factor);
            a[i][2 * half + 1] = pack<T>(from[2] * factor, from[3] * factor);
        }
    }
}

// Puts the warp's rows into a tile.
__device__ inline void store_operand(uint4* tile, const Operand& a) {
    const int lane = lane_of_thread(), row = first_row_of_warp() + lane / 4;
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
        reinterpret_cast<uint32_t*>(tile + chunk_at(row, chunk))[lane % 4] = a[chunk / 2][chunk % 2 * 2];
        reinterpret_cast<uint32_t*>(tile + chunk_at(row + 8, chunk))[lane % 4] = a[chunk / 2][chunk % 2 * 2 + 1];
    }
}

// Writes the warp's rows to memory, by way of its rows of a tile that no other warp reads or writes meanwhile.
template <Dtype T>
__device__ inline void store_rows(uint16_t* to, int64_t stride, uint4* tile, const Accumulator& d, float factor) {
    Operand rounded;
    round_to_operand<T>(rounded, d, factor);
    store_operand(tile, rounded);
    __syncwarp();
    const int lane = lane_of_thread();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = first_row_of_warp() + 4 * i + lane / 8, chunk = lane % 8;
        *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) = tile[chunk_at(row, chunk)];
    }
    __syncwarp();
}

// Which of the thread's 16 columns may be seen, a bit for each; mask: 64 bytes `stride` apart, or null.
__device__ inline uint32_t visible_columns(const uint8_t* mask, int64_t stride) {
    if (mask == nullptr) return 0xffff;
    uint32_t visible = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int column = i / 2 * 8 + lane_of_thread() % 4 * 2 + i % 2;
        visible |= (mask[column * stride] != 0 ? 1u : 0u) << i;
    }
    return visible;
}

// Sum and maximum over the four lanes that hold a row.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(whole_warp, x, 1);
    return x + __shfl_xor_sync(whole_warp, x, 2);
}

__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(whole_warp, x, 1));
    return fmaxf(x, __shfl_xor_sync(whole_warp, x, 2));
}

// From products q k^T to exp2(score * product - row maximum), and the reciprocals of the row sums of the thread's two
// rows; 0 and 1 where a row sees nothing.
__device__ inline void exponentials(Accumulator& s, float (&inverse)[2], float score, uint32_t visible) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float& value = s[i / 2][2 * row + i % 2];
            value = (visible >> i & 1) != 0 ? value * score : -INFINITY;
            largest = fmaxf(largest, value);
        }
        largest = row_max(largest);
        if (largest == -INFINITY) largest = 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float& value = s[i / 2][2 * row + i % 2];
            value = exp2f(value - largest);
            sum += value;
        }
        // a row that sees something has exp2(0) in its sum
        inverse[row] = 1.0f / fmaxf(row_sum(sum), 1.0f);
    }
}

__device__ inline void scale_rows(Accumulator& d, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) d[i][j] *= factor[j / 2];
}

}  // namespace blip3o_fast
