// The backward of `dual_attention_any.cu`, two kernels without atomics:
//
//     queries  a block per (sample, query head, 16 queries) walks the keys twice for each attention: for the statistics
//              of the rows (maximum, reciprocal sum, sum(P * dP)), then for dq
//     keys     a block per (sample, key head, 16 keys of either attention) walks the queries of all heads that read its
//              keys, in their order, for dk and dv
#include "dual_attention_any.cuh"

namespace blip3o_fast {

namespace {

__device__ float dot_shares(const RowShare& share, const Rows& rows, int head_dim) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < own_fours; ++j) {
        const int four = own_column() + 8 * j;
        if (four * 4 < head_dim) {
            const float4 x = rows[own_row()][four];
            sum += (share[j].x * x.x + share[j].y * x.y) + (share[j].z * x.z + share[j].w * x.w);
        }
    }
    return sum;
}

__global__ void __launch_bounds__(any_threads, 4) dual_attention_any_queries(const DualAttentionArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ Rows q, dout, k, v;
    __shared__ Weights weights;
    __shared__ float row_sums[any_rows];
    const int tiles = (args.tokens + any_rows - 1) / any_rows, tile = blockIdx.x % tiles;
    const int head = blockIdx.x / tiles % args.heads, sample = blockIdx.x / tiles / args.heads;
    const int row = tile * any_rows + own_row();
    const int64_t statistic = (int64_t{sample} * args.heads + head) * args.tokens + row;
    for (int cross = 0; cross < 2; ++cross) {
        const AnySide side = any_side(args, cross != 0, sample, head);
        const auto load_keys = [&](int first) {
            __syncthreads();
            load_rows(k, side.keys, sample, side.key_head, first, side.length, args.head_dim);
            load_rows(v, side.values, sample, side.value_head, first, side.length, args.head_dim);
            __syncthreads();
        };
        __syncthreads();  // the last attention's tiles have been read
        load_rows(q, side.queries, sample, side.query_head, tile * any_rows, args.tokens, args.head_dim);
        load_rows(dout, args.dout, sample, head, tile * any_rows, args.tokens, args.head_dim);
        OnlineSoftmax softmax;
        float delta = 0.0f;
        RowShare sum = {};  // of P v: only the gate learns from it
        for (int first = 0; first < side.length; first += any_rows) {
            load_keys(first);
            float p[2], dp[2];
            scores_of(p, side, q, k, first, args.head_dim);
            dot_rows(dp, dout, v, args.head_dim);
            const float shrink = softmax.take(p);
            delta = delta * shrink + own_row_sum(p[0] * dp[0] + p[1] * dp[1]);
            if (cross != 0) {
                scale_share(sum, shrink);
                add_rows(sum, weights, p, v, args.head_dim);
            }
        }
        const float base = softmax.base(), inverse = softmax.inverse();
        delta *= inverse;
        if (cross != 0) {
            // sum(P * dP) is the same and has the rounding of every dP, of which there are more and larger ones
            const float gained = own_row_sum(dot_shares(sum, dout, args.head_dim)) * inverse;
            if (own_column() == 0) row_sums[own_row()] = gained;
        }
        if (own_column() == 0 && row < args.tokens) {
            float* to = args.statistics + 3 * cross * args.statistic + statistic;
            to[0] = base;
            to[args.statistic] = inverse;
            to[2 * args.statistic] = delta;
        }
        RowShare dq = {};
        for (int first = 0; first < side.length; first += any_rows) {
            load_keys(first);
            float ds[2], dp[2];
            scores_of(ds, side, q, k, first, args.head_dim);
            dot_rows(dp, dout, v, args.head_dim);
#pragma unroll
            for (int i = 0; i < 2; ++i) ds[i] = exp2f(ds[i] - base) * inverse * (dp[i] - delta);
            add_rows(dq, weights, ds, k, args.head_dim);
        }
        const float factor = side.slope * (cross != 0 ? args.gate_of(head) : 1.0f);
        if (row < args.tokens)
            store_row(args.dqkq, sample, side.query_head, row, dq, factor, args.head_dim);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // rows that do not exist have dout = 0
        float sum = 0.0f;
        for (int i = 0; i < any_rows; ++i) sum += row_sums[i];
        args.gate_sums[(int64_t{sample} * tiles + tile) * args.heads + head] = sum;
    }
}

__global__ void __launch_bounds__(any_threads, 4) dual_attention_any_keys(const DualAttentionArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ Rows k, v, q, dout;
    __shared__ Weights weights;
    const int own_tiles = (args.tokens + any_rows - 1) / any_rows;
    const int tiles = own_tiles + (args.context + any_rows - 1) / any_rows, tile = blockIdx.x % tiles;
    const int key_head = blockIdx.x / tiles % args.key_heads, sample = blockIdx.x / tiles / args.key_heads;
    const bool cross = tile >= own_tiles;
    const int first_key = (cross ? tile - own_tiles : tile) * any_rows, key = first_key + own_row();
    const int first_head = key_head * args.group();
    const AnySide side = any_side(args, cross, sample, first_head);
    const bool seen = side.sees(key);
    load_rows(k, side.keys, sample, side.key_head, first_key, side.length, args.head_dim);
    load_rows(v, side.values, sample, side.value_head, first_key, side.length, args.head_dim);
    RowShare dk = {}, dv = {};
    for (int member = 0; member < args.group(); ++member) {
        const int head = first_head + member;
        const float gate = cross ? args.gate_of(head) : 1.0f;
        const float* statistics = args.statistics + (cross ? 3 * args.statistic : 0) +
                                  (int64_t{sample} * args.heads + head) * args.tokens;
        for (int first = 0; first < args.tokens; first += any_rows) {
            __syncthreads();
            load_rows(q, side.queries, sample, side.query_head + member, first, args.tokens, args.head_dim);
            load_rows(dout, args.dout, sample, head, first, args.tokens, args.head_dim);
            __syncthreads();
            float p[2], ds[2];
            dot_rows(p, k, q, args.head_dim);
            dot_rows(ds, v, dout, args.head_dim);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int query = first + own_column() + 8 * i;
                const float* at = statistics + query;
                const bool real = query < args.tokens && seen;
                p[i] = real ? exp2f(p[i] * side.score - at[0]) * at[args.statistic] * gate : 0.0f;
                ds[i] = real ? p[i] * (ds[i] - at[2 * args.statistic]) : 0.0f;
            }
            add_rows(dv, weights, p, dout, args.head_dim);
            add_rows(dk, weights, ds, q, args.head_dim);
        }
    }
    if (key >= side.length) return;
    const HeadsTensor& keys = cross ? args.dk2 : args.dqkq;
    const HeadsTensor& values = cross ? args.dv2 : args.dv1;
    store_row(keys, sample, side.key_head, key, dk, side.slope, args.head_dim);
    store_row(values, sample, side.value_head, key, dv, 1.0f, args.head_dim);
}

}  // namespace

void launch_any_backward(const Launcher& launcher, const DualAttentionArgs& args) {
    const int64_t own_tiles = (args.tokens + any_rows - 1) / any_rows;
    const int64_t tiles = own_tiles + (args.context + any_rows - 1) / any_rows;
    launcher(dual_attention_any_queries, own_tiles * args.heads * args.batch, any_threads, args);
    launcher(dual_attention_any_keys, tiles * args.key_heads * args.batch, any_threads, args);
}

}  // namespace blip3o_fast
