// The backward of `dual_attention_tile.cu`. A block of four warps per sample, key head and attention (own or cross),
// which adds up the query heads of its key head in their order:
//
//     P = softmax(q k^T * score)    dP = dout v^T           a warp's 16 queries, in registers
//     dq = dS k                     dS = P * (dP - sum(P * dP))
//     dv = P^T dout                 dk = dS^T q             a warp's 16 keys, P and dS of all queries in shared memory
//
// Gates are applied in fp32: a product of a small gate and P may have no half-precision digits left. What a group adds
// up is weighted by gate / largest gate of the group, which leaves digits to all that matters in the sum.
#include "dual_attention_args.cuh"
#include "dual_attention_tile.cuh"

namespace blip3o_fast {

namespace {

// One of the two attentions of a sample and key head.
struct Side {
    const uint16_t *q, *k, *v, *dout;  // of the group's first query head
    uint16_t *dq, *dk, *dv;
    int64_t q_token, k_token, v_token, dq_token, dk_token, dv_token;
    float score, slope;
};

__device__ Side own_side(const DualAttentionArgs& args, int sample, int key_head) {
    const int head = key_head * args.group(), key = args.heads + key_head;
    return {static_cast<const uint16_t*>(args.qkq.data) + args.qkq.at(sample, head),
            static_cast<const uint16_t*>(args.qkq.data) + args.qkq.at(sample, key),
            static_cast<const uint16_t*>(args.v1.data) + args.v1.at(sample, key_head),
            static_cast<const uint16_t*>(args.dout.data) + args.dout.at(sample, head),
            static_cast<uint16_t*>(args.dqkq.data) + args.dqkq.at(sample, head),
            static_cast<uint16_t*>(args.dqkq.data) + args.dqkq.at(sample, key),
            static_cast<uint16_t*>(args.dv1.data) + args.dv1.at(sample, key_head),
            args.qkq.token, args.qkq.token, args.v1.token, args.dqkq.token, args.dqkq.token, args.dv1.token,
            args.scale1 * log2e, args.slope1};
}

__device__ Side cross_side(const DualAttentionArgs& args, int sample, int key_head) {
    const int head = key_head * args.group(), query = args.heads + args.key_heads + head;
    return {static_cast<const uint16_t*>(args.qkq.data) + args.qkq.at(sample, query),
            static_cast<const uint16_t*>(args.k2.data) + args.k2.at(sample, key_head),
            static_cast<const uint16_t*>(args.v2.data) + args.v2.at(sample, key_head),
            static_cast<const uint16_t*>(args.dout.data) + args.dout.at(sample, head),
            static_cast<uint16_t*>(args.dqkq.data) + args.dqkq.at(sample, query),
            static_cast<uint16_t*>(args.dk2.data) + args.dk2.at(sample, key_head),
            static_cast<uint16_t*>(args.dv2.data) + args.dv2.at(sample, key_head),
            args.qkq.token, args.k2.token, args.v2.token, args.dqkq.token, args.dk2.token, args.dv2.token,
            args.scale2 * log2e, args.slope2};
}

// From s = q k^T to P, and from dp to dS = P * (dP - sum(P * dP)); returns the sum over the warp's rows of sum(P * dP).
__device__ float softmax_gradient(Accumulator& s, Accumulator& dp, float score, uint32_t visible) {
    float inverse[2], deltas = 0.0f;
    exponentials(s, inverse, score, visible);
    scale_rows(s, inverse);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float delta = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) delta += s[i / 2][2 * row + i % 2] * dp[i / 2][2 * row + i % 2];
        delta = row_sum(delta);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float& value = dp[i / 2][2 * row + i % 2];
            value = s[i / 2][2 * row + i % 2] * (value - delta);
        }
        deltas += delta;
    }
    // the four lanes of a row all hold its sum: add up the eight lanes that hold different rows
    for (int step = 4; step < 32; step *= 2) deltas += __shfl_xor_sync(whole_warp, deltas, step);
    return deltas;
}

template <Dtype T, bool grouped>
__global__ void __launch_bounds__(tile_threads, grouped ? 2 : 3)
    dual_attention_tile_backward(const DualAttentionArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ uint4 q[tile_chunks], k[tile_chunks], v[tile_chunks], dout[tile_chunks];
    __shared__ uint4 probabilities[tile_chunks], slopes[tile_chunks];
    const bool gated = blockIdx.x % 2 != 0;
    const int key_head = blockIdx.x / 2 % args.key_heads, sample = blockIdx.x / 2 / args.key_heads;
    const int group = grouped ? args.group() : 1, first = key_head * group;
    const Side side = gated ? cross_side(args, sample, key_head) : own_side(args, sample, key_head);
    fetch_tile(k, side.k, side.k_token);
    fetch_tile(v, side.v, side.v_token);
    const uint32_t visible = gated ? visible_columns(args.mask_of(sample), args.mask_token) : 0xffff;
    float factor = 1.0f;
    if (gated) {
        factor = args.gate_of(first);
        if (grouped) {
            factor = fabsf(factor);
            for (int member = 1; member < group; ++member) factor = fmaxf(factor, fabsf(args.gate_of(first + member)));
        }
    }
    Accumulator dk = {}, dv = {};
    for (int member = 0; member < group; ++member) {
        const int64_t dout_head = member * args.dout.head, q_head = member * args.qkq.head;
        fetch_tile(q, side.q + q_head, side.q_token);
        fetch_tile(dout, side.dout + dout_head, args.dout.token);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        const float gate = gated ? args.gate_of(first + member) : 1.0f;
        Accumulator p = {}, ds = {};
        multiply_transposed<T>(p, q, k);
        multiply_transposed<T>(ds, dout, v);
        const float deltas = softmax_gradient(p, ds, side.score, visible);
        if (gated && lane_of_thread() == 0) {
            const int warp = threadIdx.x / 32;
            args.gate_sums[(int64_t{sample} * 4 + warp) * args.heads + first + member] = deltas;
        }
        const float share = grouped && gated ? (factor > 0.0f ? gate / factor : 0.0f) : 1.0f;
        Operand rounded;
        round_to_operand<T>(rounded, p, share);
        store_operand(probabilities, rounded);
        {
            round_to_operand<T>(rounded, ds, 1.0f);
            Accumulator dq = {};
            multiply<T>(dq, rounded, k);
            // by way of the warp's own rows, which dS takes next
            store_rows<T>(side.dq + member * args.dqkq.head, side.dq_token, slopes, dq, side.slope * gate);
        }
        if (grouped) round_to_operand<T>(rounded, ds, share);
        store_operand(slopes, rounded);
        __syncthreads();
        multiply_left_transposed<T>(dv, probabilities, dout);
        multiply_left_transposed<T>(dk, slopes, q);
        __syncthreads();
    }
    store_rows<T>(side.dk, side.dk_token, slopes, dk, side.slope * factor);
    store_rows<T>(side.dv, side.dv_token, probabilities, dv, factor);
}

template <Dtype T>
void launch(const Launcher& launcher, const DualAttentionArgs& args) {
    const int64_t blocks = int64_t{args.batch} * args.key_heads * 2;
    if (args.heads == args.key_heads)
        launcher(dual_attention_tile_backward<T, false>, blocks, tile_threads, args);
    else
        launcher(dual_attention_tile_backward<T, true>, blocks, tile_threads, args);
}

}  // namespace

void launch_tile_backward(const Launcher& launcher, const DualAttentionArgs& args) {
    if (args.qkq.dtype == Dtype::bf16)
        launch<Dtype::bf16>(launcher, args);
    else
        launch<Dtype::f16>(launcher, args);
}

}  // namespace blip3o_fast
