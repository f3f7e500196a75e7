// `dual_attention` of any lengths and dtypes: a block per sample, head and 16 queries, see `dual_attention_any.cuh`.
#include "dual_attention_any.cuh"

namespace blip3o_fast {

namespace {

__global__ void __launch_bounds__(any_threads, 3) dual_attention_any_forward(const DualAttentionArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ Rows q, k, v;
    __shared__ Weights weights;
    const int tiles = (args.tokens + any_rows - 1) / any_rows, first_row = blockIdx.x % tiles * any_rows;
    const int head = blockIdx.x / tiles % args.heads, sample = blockIdx.x / tiles / args.heads;
    RowShare out = {};
    for (int cross = 0; cross < 2; ++cross) {
        const AnySide side = any_side(args, cross != 0, sample, head);
        OnlineSoftmax softmax;
        RowShare sum = {};
        __syncthreads();  // the last attention's tiles have been read
        load_rows(q, side.queries, sample, side.query_head, first_row, args.tokens, args.head_dim);
        for (int first = 0; first < side.length; first += any_rows) {
            __syncthreads();
            load_rows(k, side.keys, sample, side.key_head, first, side.length, args.head_dim);
            load_rows(v, side.values, sample, side.value_head, first, side.length, args.head_dim);
            __syncthreads();
            float p[2];
            scores_of(p, side, q, k, first, args.head_dim);
            scale_share(sum, softmax.take(p));
            add_rows(sum, weights, p, v, args.head_dim);
        }
        const float factor = softmax.inverse() * (cross != 0 ? args.gate_of(head) : 1.0f);
#pragma unroll
        for (int j = 0; j < own_fours; ++j) {
            out[j].x += sum[j].x * factor;
            out[j].y += sum[j].y * factor;
            out[j].z += sum[j].z * factor;
            out[j].w += sum[j].w * factor;
        }
    }
    const int row = first_row + own_row();
    if (row < args.tokens) store_row(args.out, sample, head, row, out, 1.0f, args.head_dim);
}

}  // namespace

void launch_any_forward(const Launcher& launcher, const DualAttentionArgs& args) {
    const int64_t tiles = (args.tokens + any_rows - 1) / any_rows;
    launcher(dual_attention_any_forward, tiles * args.heads * args.batch, any_threads, args);
}

}  // namespace blip3o_fast
