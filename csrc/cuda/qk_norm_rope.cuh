// What the kernels of `qk_norm_rope` share. A block owns the columns of one group of heads, eight neighbouring ones per
// thread, or two or four times eight.
#pragma once

#include "common.cuh"

namespace blip3o_fast {

constexpr int group_limit = 3;
constexpr int norm_threads = 256;

struct NormGroup {
    const void *weight = nullptr, *bias = nullptr;
    Dtype weight_dtype = Dtype::f32, bias_dtype = Dtype::f32;
    int first = 0, columns = 0;
};

struct NormRows {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t batch = 0, token = 0;  // strides
};

struct QkNormRopeArgs {
    NormGroup group0, group1, group2;
    int groups = 0, first_group = 0, all_groups = 0;
    NormRows x, y, dy, dx;
    const float* rope = nullptr;
    float *mean = nullptr, *rstd = nullptr, *partial = nullptr;
    int rows = 0, rows_of_chunk = 0;
    int tokens = 0, columns = 0, head_dim = 0;
    float eps = 0;

    __host__ __device__ NormGroup group(int i) const { return i == 0 ? group0 : i == 1 ? group1 : group2; }
};

// The columns of a group that belong to this thread: its vector i has `count` columns from `column` on, 0 at the end.
struct Columns {
    int column, count;

    __device__ Columns(const NormGroup& group, int i) : column((threadIdx.x + i * blockDim.x) * 8) {
        const int rest = group.columns - column;
        count = rest < 0 ? 0 : rest < 8 ? rest : 8;
    }
};

// (a, b) to (a cos - b sin, a sin + b cos) for the neighbours of eight columns from `column` on; direction -1: back.
__device__ inline void turn(float (&z)[8], const QkNormRopeArgs& args, int token, int column, float direction) {
    const int channel = column % args.head_dim;
    const float* angles = args.rope + int64_t{token} * args.head_dim;
    float own[8];
    if (args.head_dim % 8 == 0) {
        load_eight(own, angles, Dtype::f32, channel, 8);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) own[i] = angles[(channel + i) % args.head_dim];
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const float a = z[i], b = z[i + 1], cosine = own[i], sine = own[i + 1] * direction;
        z[i] = a * cosine - b * sine;
        z[i + 1] = a * sine + b * cosine;
    }
}

// Each sum over the block, in every thread. `scratch` may be used again after the next barrier but one.
template <int count>
__device__ inline void sum_over_block(float (&sums)[count], float (&scratch)[norm_threads / 32][count]) {
    warp_sums(sums);
    if (blockDim.x == 32) return;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32][i] = sums[i];
        sums[i] = 0.0f;
    }
    __syncthreads();
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp)
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] += scratch[warp][i];
}

// Vectors per thread for the widest group of a launch.
inline int vectors_of_thread(int columns) { return columns <= 2048 ? 1 : columns <= 4096 ? 2 : 4; }

inline int threads_of_block(int columns) {
    const int per_warp = 32 * 8 * vectors_of_thread(columns);
    return (columns + per_warp - 1) / per_warp * 32;
}

inline int widest_group(const QkNormRopeArgs& args) {
    const int first = args.group0.columns > args.group1.columns ? args.group0.columns : args.group1.columns;
    return first > args.group2.columns ? first : args.group2.columns;
}

void launch_norm_forward(const Launcher& launcher, const QkNormRopeArgs& args);
void launch_norm_backward(const Launcher& launcher, const QkNormRopeArgs& args, int64_t chunks);

}  // namespace blip3o_fast
