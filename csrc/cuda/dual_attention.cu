// The host's part of `dual_attention`: what is refused, which kernels run, and the kernel that finishes the gate.
#include "dual_attention.h"

#include <cmath>

#include "checks.h"
#include "dual_attention_args.cuh"

namespace blip3o_fast {

namespace {

constexpr int tile = 64, rows_per_gate_sum = 16;
constexpr unsigned gate_threads = 128;

// dgate = (1 - tanh(gate)^2) * sum over the rows of sums [rows, heads]: one block per head, in a fixed order.
__global__ void __launch_bounds__(gate_threads) dual_attention_gate(const float* sums, int64_t rows, int heads,
                                                                    const void* gate, Dtype gate_dtype, void* dgate,
                                                                    Dtype dgate_dtype) {
    pdl_wait();
    pdl_release();
    __shared__ float part[gate_threads];
    const int head = blockIdx.x;
    float sum = 0.0f;
    for (int64_t row = threadIdx.x; row < rows; row += gate_threads) sum += sums[row * heads + head];
    part[threadIdx.x] = sum;
    for (unsigned half = gate_threads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x != 0) return;
    // 1 - tanh^2 without its cancellation, from rest = 1 - |tanh|
    const float e = expf(-2.0f * fabsf(load_float(gate, gate_dtype, head)));
    const float rest = 2.0f * e / (1.0f + e);
    store_float(dgate, dgate_dtype, head, part[0] * (rest * (2.0f - rest)));
}

HeadsTensor heads_tensor(const View& view) {
    return {view.data, view.dtype, view.stride[0], view.stride[1], view.stride[2]};
}

// [B, tokens, heads * head_dim] as [B, tokens, heads, head_dim].
HeadsTensor heads_of_columns(const View& view, int64_t head_dim) {
    return {view.data, view.dtype, view.stride[0], view.stride[1], head_dim};
}

DualAttentionArgs checked(const View& qkq, const View& v1, const View& k2, const View& v2, const View& gate,
                          const View& mask, double scale) {
    check_rank(qkq, 4);
    check_rank(v1, 4);
    check_rank(k2, 4);
    check_rank(gate, 1);
    const int64_t batch = qkq.size[0], tokens = qkq.size[1], dim = qkq.size[3];
    const int64_t heads = gate.size[0], key_heads = v1.size[2], context = k2.size[1];
    if (key_heads < 1 || heads < 1 || heads % key_heads != 0)
        refuse(gate, "of a multiple of the " + std::to_string(key_heads) + " key heads");
    check_rows(qkq, {batch, tokens, 2 * heads + key_heads, dim});
    check_rows(v1, {batch, tokens, key_heads, dim});
    check_rows(k2, {batch, context, key_heads, dim});
    check_rows(v2, {batch, context, key_heads, dim});
    check_float(gate);
    check_contiguous(gate);
    if (dim < 1 || dim > 128) refuse(qkq, "of heads of 1 to 128");
    const int64_t limit = int64_t{1} << 31;
    for (const View* view : {&qkq, &k2})
        if (view->size[1] < 1 || view->size[1] >= limit / 2) refuse(*view, "of 1 to 2^30 tokens");
    if (batch >= limit || heads >= limit / 4 || batch * heads >= limit ||
        batch * heads * (tokens / 16 + context / 16 + 2) >= limit)
        refuse(qkq, "of fewer than 2^31 tiles");
    if (mask.present()) {
        check_shape(mask, {batch, context});
        check_dtype(mask, Dtype::u8);
    }
    DualAttentionArgs args;
    args.qkq = heads_tensor(qkq);
    args.v1 = heads_tensor(v1);
    args.k2 = heads_tensor(k2);
    args.v2 = heads_tensor(v2);
    args.gate = gate.data;
    args.gate_dtype = gate.dtype;
    if (mask.present()) {
        args.mask = mask.as<const uint8_t>();
        args.mask_batch = mask.stride[0];
        args.mask_token = mask.stride[1];
    }
    args.batch = static_cast<int>(batch);
    args.tokens = static_cast<int>(tokens);
    args.context = static_cast<int>(context);
    args.heads = static_cast<int>(heads);
    args.key_heads = static_cast<int>(key_heads);
    args.head_dim = static_cast<int>(dim);
    args.scale1 = static_cast<float>(scale);
    args.scale2 = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
    args.slope1 = tokens == 1 ? 0.0f : args.scale1;
    args.slope2 = context == 1 ? 0.0f : args.scale2;
    return args;
}

bool has_aligned_rows(const HeadsTensor& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % 8 == 0 && x.token % 8 == 0 && x.head % 8 == 0;
}

// Whether both attentions are one tile, and rows of all of these tensors can be read 16 bytes at a time.
bool is_tile(const DualAttentionArgs& args, std::initializer_list<HeadsTensor> tensors) {
    if (args.tokens != tile || args.context != tile || args.head_dim != tile || args.qkq.dtype == Dtype::f32)
        return false;
    for (const HeadsTensor& x : tensors)
        if (x.dtype != args.qkq.dtype || !has_aligned_rows(x)) return false;
    return true;
}

}  // namespace

void dual_attention_fwd(const Launcher& launcher, const View& qkq, const View& v1, const View& k2, const View& v2,
                        const View& gate, const View& mask, const View& out, double scale) {
    DualAttentionArgs args = checked(qkq, v1, k2, v2, gate, mask, scale);
    check_whole(out, {args.batch, args.tokens, int64_t{args.heads} * args.head_dim});
    if (args.batch == 0) return;
    args.out = heads_of_columns(out, args.head_dim);
    if (is_tile(args, {args.qkq, args.v1, args.k2, args.v2, args.out}))
        launch_tile_forward(launcher, args);
    else
        launch_any_forward(launcher, args);
}

void dual_attention_bwd(const Launcher& launcher, const View& dout, const View& qkq, const View& v1, const View& k2,
                        const View& v2, const View& gate, const View& mask, const View& dqkq, const View& dv1,
                        const View& dk2, const View& dv2, const View& dgate, const View& gate_sums,
                        const View& statistics, double scale) {
    DualAttentionArgs args = checked(qkq, v1, k2, v2, gate, mask, scale);
    const int64_t batch = args.batch, tokens = args.tokens, heads = args.heads, dim = args.head_dim;
    check_rows(dout, {batch, tokens, heads * dim});
    check_whole(dqkq, {batch, tokens, qkq.size[2], dim});
    check_whole(dv1, {batch, tokens, v1.size[2], dim});
    check_whole(dk2, {batch, k2.size[1], k2.size[2], dim});
    check_whole(dv2, {batch, v2.size[1], v2.size[2], dim});
    check_whole(dgate, {heads});
    const int64_t rows = batch * ((tokens + rows_per_gate_sum - 1) / rows_per_gate_sum);
    check_whole(gate_sums, {rows, heads});
    check_dtype(gate_sums, Dtype::f32);
    check_whole(statistics, {6, batch, heads, tokens});
    check_dtype(statistics, Dtype::f32);
    args.dout = heads_of_columns(dout, dim);
    args.dqkq = heads_tensor(dqkq);
    args.dv1 = heads_tensor(dv1);
    args.dk2 = heads_tensor(dk2);
    args.dv2 = heads_tensor(dv2);
    args.gate_sums = gate_sums.as<float>();
    args.statistics = statistics.as<float>();
    args.statistic = batch * heads * tokens;
    if (batch > 0) {
        if (is_tile(args, {args.qkq, args.v1, args.k2, args.v2, args.dout, args.dqkq, args.dv1, args.dk2, args.dv2}))
            launch_tile_backward(launcher, args);
        else
            launch_any_backward(launcher, args);
    }
    launcher(dual_attention_gate, heads, gate_threads, args.gate_sums, rows, args.heads, args.gate, args.gate_dtype,
             dgate.data, dgate.dtype);
}

}  // namespace blip3o_fast
