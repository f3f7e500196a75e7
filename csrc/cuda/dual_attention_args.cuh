// What the kernels of `dual_attention` are given, one argument to each.
#pragma once

#include "common.cuh"

namespace blip3o_fast {

// A tensor [B, tokens, heads, head_dim] with unit last stride.
struct HeadsTensor {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t batch = 0, token = 0, head = 0;  // strides

    __device__ int64_t at(int64_t b, int64_t h) const { return b * batch + h * head; }
};

struct DualAttentionArgs {
    HeadsTensor qkq, v1, k2, v2;           // q1, k1 and q2 are the heads of qkq, in this order
    const void* gate = nullptr;            // [heads]
    Dtype gate_dtype = Dtype::f32;
    const uint8_t* mask = nullptr;         // [B, context] or null
    int64_t mask_batch = 0, mask_token = 0;
    HeadsTensor out, dout;                 // [B, tokens, heads, head_dim]
    HeadsTensor dqkq, dv1, dk2, dv2;
    float* gate_sums = nullptr;            // [B * tiles of 16 queries, heads]: sum(dout * P2 v2)
    float* statistics = nullptr;           // [6, B, heads, tokens]: maximum, reciprocal sum, sum(P * dP); own, cross
    int64_t statistic = 0;                 // elements of one of the six
    int batch = 0, tokens = 0, context = 0, heads = 0, key_heads = 0, head_dim = 0;
    float scale1 = 0, scale2 = 0;          // of the scores
    float slope1 = 0, slope2 = 0;          // of their gradients: 0 where there is one key, whose softmax is 1

    __device__ int group() const { return heads / key_heads; }
    __device__ float gate_of(int head) const { return tanhf(load_float(gate, gate_dtype, head)); }
    __device__ const uint8_t* mask_of(int sample) const {
        return mask == nullptr ? nullptr : mask + sample * mask_batch;
    }
};

constexpr float log2e = 1.4426950408889634f;

// Tiles: 64 tokens, 64 of context, heads of 64, all but the gate in bf16 or all in fp16, rows aligned to 16 bytes.
void launch_tile_forward(const Launcher& launcher, const DualAttentionArgs& args);
void launch_tile_backward(const Launcher& launcher, const DualAttentionArgs& args);
void launch_any_forward(const Launcher& launcher, const DualAttentionArgs& args);
void launch_any_backward(const Launcher& launcher, const DualAttentionArgs& args);

}  // namespace blip3o_fast
